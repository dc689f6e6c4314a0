"""The layers against numbers of the reference system (tests/golden/layers.safetensors, float32)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from edm2ext import ops
from edm2ext.nn import MPConv, MPFourier, MPLinear

GOLDEN = Path(__file__).parents[1] / "golden" / "layers.safetensors"
FORWARD, GRADIENT = 1e-5, 1e-4  # relative L2 errors

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "pixel_norm": ops.pixel_norm,
    "normalize_weight": ops.normalize_weight,
    "normalize_small": ops.normalize_weight,
    "mp_silu": ops.mp_silu,
    "mp_sum_t03": lambda a, b: ops.mp_sum(a, b, 0.3),
    "mp_cat_t05": lambda a, b: ops.mp_cat(a, b, 0.5),
    "mp_cat_t03": lambda a, b: ops.mp_cat(a, b, 0.3),
    "resample_down": ops.resample_down,
    "resample_up": ops.resample_up,
    "resample_down_1331": lambda x: ops.resample_down(x, (1, 3, 3, 1)),
    "resample_up_1331": lambda x: ops.resample_up(x, (1, 3, 3, 1)),
}
LAYERS = [
    "mp_conv3x3_train",
    "mp_conv3x3_eval",
    "mp_conv1x1_train",
    "mp_conv3x3_odd",
    "mp_linear_train",
    "mp_linear_eval",
]


@pytest.fixture(scope="module")
def golden() -> Iterator[dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        yield {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping


def assert_close(got: Tensor, expected: Tensor, limit: float) -> None:
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= limit, f"relative L2 error {error:.2e}, allowed {limit:.0e}"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(backend: str, golden: dict[str, Tensor], name: str, memory_format: torch.memory_format) -> None:
    names = [key.removeprefix(f"{name}.in.") for key in golden if key.startswith(f"{name}.in.")]
    inputs = [golden[f"{name}.in.{key}"].contiguous(memory_format=memory_format).requires_grad_() for key in names]
    out = FUNCTIONS[name](*inputs)
    assert_close(out, golden[f"{name}.out"], FORWARD)
    grads = torch.autograd.grad(out, inputs, golden[f"{name}.grad_out"])
    for key, grad in zip(names, grads, strict=True):
        assert_close(grad, golden[f"{name}.grad.{key}"], GRADIENT)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(backend: str, golden: dict[str, Tensor], name: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        case = json.loads(file.metadata()["cases"])[name]
    weight, x, gain = (golden[f"{name}.in.{key}"].clone() for key in ("weight", "x", "gain"))
    out_channels, in_channels = weight.shape[:2]
    layer = (
        MPConv(in_channels, out_channels, case["kernel"][0]) if case["kernel"] else MPLinear(in_channels, out_channels)
    )
    layer.load_state_dict({"weight": weight})
    layer.train(case["training"])
    x.requires_grad_()
    gain.requires_grad_()
    out = layer(x, gain)
    assert_close(out, golden[f"{name}.out"], FORWARD)
    out.backward(golden[f"{name}.grad_out"])
    assert_close(layer.weight.detach(), golden[f"{name}.weight_after"], FORWARD)
    for key, grad in (("x", x.grad), ("weight", layer.weight.grad), ("gain", gain.grad)):
        assert_close(grad, golden[f"{name}.grad.{key}"], GRADIENT)


def test_fourier(backend: str, golden: dict[str, Tensor]) -> None:
    layer = MPFourier(32)
    layer.load_state_dict({key: golden[f"mp_fourier.{key}"] for key in ("freqs", "phases")})
    assert_close(layer(golden["mp_fourier.in.x"]), golden["mp_fourier.out"], FORWARD)


def test_every_case_is_covered() -> None:
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
    assert {name for name in cases if not name.startswith("block_")} == {*FUNCTIONS, *LAYERS}
