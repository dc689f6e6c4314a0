"""2x up- and downsampling."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops

FILTERS = [(1, 1), (1, 3, 3, 1), (1, 2), (0.5, 1, -2, 1, 3, 0.25)]
NAMES = ["resample_down", "resample_up"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 5, 7, 9), (2, 17, 2, 3), (1, 1, 2, 2)])
def test_shapes_dtypes_and_filters(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, taps: tuple[float, ...]
) -> None:
    compare(name, [torch.randn(shape)], dtype=dtype, filter=taps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded_grad", [False, True])
@pytest.mark.parametrize("taps", FILTERS[:2])
def test_layouts(name: str, layout: str, expanded_grad: bool, taps: tuple[float, ...]) -> None:
    for shape in ((2, 19, 6, 10), (2, 5, 7, 5)):
        compare(name, [torch.randn(shape)], layout=layout, expanded_grad=expanded_grad, filter=taps)


def test_box_filter_is_mean_and_nearest_neighbour(backend: str) -> None:
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(ops.resample_down(x), F.avg_pool2d(x, 2))
    assert torch.equal(ops.resample_up(x), F.interpolate(x, scale_factor=2, mode="nearest"))


def test_no_matrix_product_under_autocast(backend: str) -> None:
    x = torch.randn(2, 3, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        down, up = ops.resample_down(x, (1, 3, 3, 1)), ops.resample_up(x, (1, 3, 3, 1))
    assert down.dtype == up.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(backend: str, name: str) -> None:
    function = getattr(ops, name)
    with pytest.raises(ValueError, match=rf"{name}: x must be \[batch, channels, height, width\], got shape \[3, 4\]"):
        function(torch.randn(3, 4))
    with pytest.raises(ValueError, match=f"{name}: filter must have an even number of taps, got 3"):
        function(torch.randn(1, 1, 4, 4), (1, 2, 1))
    with pytest.raises(ValueError, match=f"{name}: filter must not sum to 0"):
        function(torch.randn(1, 1, 4, 4), (1, -1))


def test_too_small_to_halve(backend: str) -> None:
    with pytest.raises(
        ValueError, match=r"resample_down: x must be at least 2 pixels high and wide, got \[1, 1, 1, 4\]"
    ):
        ops.resample_down(torch.randn(1, 1, 1, 4))
