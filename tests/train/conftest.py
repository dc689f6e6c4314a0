"""What the tests of the training program share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import edm2ext

_BACKENDS = ["reference", "native"] if edm2ext.build_info()["native"] else ["reference"]


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for each backend that is there."""
    with edm2ext.set_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from threads, and bit-exactness must not depend on what else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
