"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch

import edm2ext


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each backend. A missing native library is an error here, not a reason to skip."""
    with edm2ext.set_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
