"""Cosine attention."""

import importlib
import math

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare
from torch.utils._python_dispatch import TorchDispatchMode

from edm2ext import ops, reference, set_backend
from edm2ext.backend import Kernels

attention_module = importlib.import_module("edm2ext.ops.cosine_attention")  # the name is also the function's

# heads, and [N, 3C, *] with few pixels (explicit products) and with many (fused attention)
CASES = [
    (1, (2, 24, 3, 5)),
    (3, (2, 36, 4, 4)),
    (2, (1, 24, 17, 31)),
    (2, (2, 96, 8, 8)),
    (2, (2, 12, 7)),
    (2, (1, 12, 2, 3, 2)),
]


def _units(shape: tuple[int, ...]) -> float:
    """torch's fused attention is less accurate than its plain products."""
    return 8 if math.prod(shape[2:]) > 256 else 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shape"), CASES)
def test_shapes_and_dtypes(heads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("cosine_attention", [torch.randn(shape)], dtype=dtype, num_heads=heads, units=_units(shape))


@pytest.mark.parametrize("expanded_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shape"), [(1, (2, 24, 4, 4)), (2, (2, 36, 3, 5)), (2, (2, 24, 16, 17))])
def test_layouts(heads: int, shape: tuple[int, ...], layout: str, expanded_grad: bool) -> None:
    options = {"layout": layout, "expanded_grad": expanded_grad, "units": _units(shape)}
    compare("cosine_attention", [torch.randn(shape)], **options, num_heads=heads)


@pytest.mark.parametrize("pixels", [2, 17])
def test_one_pixel_decides(backend: str, pixels: int) -> None:
    """Queries and keys that agree at one pixel only: its value is taken nearly alone."""
    depth = 320
    q = torch.eye(depth)[:, : pixels**2]
    v = torch.randn(depth, pixels**2)
    qkv = torch.stack([q, q, v], dim=1).reshape(1, 3 * depth, pixels, pixels) * 3
    out = ops.cosine_attention(qkv, 1)
    expected = v / v.square().mean(0).sqrt()
    torch.testing.assert_close(out.reshape(depth, -1), expected, rtol=0, atol=0.2)


def test_reference_by_hand() -> None:
    """Channel (h * d + i) * 3 + j is channel i of head h of q, k or v (spec 2.12)."""
    qkv = torch.randn(1, 12, 3, dtype=torch.float64)
    channels = qkv.reshape(2, 2, 3, 3)
    outs = []
    for head in range(2):
        q, k, v = (channels[head, :, j] / (1e-4 + channels[head, :, j].square().mean(0).sqrt()) for j in range(3))
        weights = (q.T @ k / 2**0.5).softmax(1)
        outs.append(v @ weights.T)
    torch.testing.assert_close(reference.cosine_attention(qkv, 2), torch.cat(outs)[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [4, 24])
def test_autocast_sets_the_dtype_of_products(backend: str, dtype: torch.dtype, pixels: int) -> None:
    qkv = torch.randn(2, 48, pixels, pixels, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = ops.cosine_attention(qkv, 2)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    assert grad_qkv.dtype == torch.float32
    exact_in = qkv.detach().double().requires_grad_()
    exact = reference.cosine_attention(exact_in, 2)
    (exact_grad,) = torch.autograd.grad(exact, exact_in, grad.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact.double(), rtol=0, atol=8 * unit)
    torch.testing.assert_close(grad_qkv.double(), exact_grad, rtol=0, atol=8 * unit * exact_grad.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_may_be_modified_in_place(backend: str, layout: str) -> None:
    qkv = LAYOUTS[layout](torch.randn(2, 24, 3, 5)).requires_grad_()
    expected = torch.autograd.grad(2 * ops.cosine_attention(qkv, 2).sum(), qkv)
    assert torch.equal(torch.autograd.grad(ops.cosine_attention(qkv, 2).mul_(2).sum(), qkv)[0], expected[0])


class Calls(TorchDispatchMode):
    """Collects the names of the ops that run, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func._schema.name)
        return out


@pytest.fixture
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors take the path of CUDA tensors wherever there are CUDA kernels."""
    monkeypatch.setattr(attention_module, "_KERNELS", Kernels(cpu=True, cuda=True, meta=True))


@pytest.mark.parametrize(
    ("dtype", "depth", "product"),
    [
        (torch.float16, 64, "flash"),
        (torch.bfloat16, 24, "flash"),
        (torch.float32, 20, "efficient"),
        (torch.float16, 20, "explicit"),
        (torch.float16, 264, "explicit"),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_torchs_attention_multiplies_and_nothing_is_copied(
    gpu_path: None, dtype: torch.dtype, depth: int, product: str, memory_format: torch.memory_format
) -> None:
    qkv = torch.empty(2, 6 * depth, 4, 8, dtype=dtype, device="meta").contiguous(memory_format=memory_format)
    qkv.requires_grad_()
    with set_backend("native"), Calls() as calls:
        out = ops.cosine_attention(qkv, 2)
        (grad,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert out.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)
    if product == "explicit":
        assert calls.names.count("aten::bmm") == 3
        return
    expected = ["edm2::qkv_norm", f"aten::_scaled_dot_product_{product}_attention"]
    expected += ["aten::empty_like", f"aten::_scaled_dot_product_{product}_attention_backward"]
    expected += ["edm2::qkv_norm_backward"]
    copied = [name for name in calls.names if name not in expected]
    assert [name for name in calls.names if name in expected] == expected
    assert len(copied) <= (0 if memory_format == torch.channels_last else 1)  # merged heads, transposed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("products", ["flash", "efficient"])
def test_what_a_gpus_attention_is_told(monkeypatch: pytest.MonkeyPatch, products: str, layout: str) -> None:
    """torch's CPU attention stands in, answering in the memory layout of those of a GPU."""

    def of_gpu(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
        out, logsumexp = attention_module._flash_on_cpu(q, k, v)
        return of_gpu(out), logsumexp, None, None, q.shape[2], k.shape[2], torch.tensor(1), torch.tensor(2), None

    def flash_backward(grad, q, k, v, out, logsumexp, *rest) -> tuple:  # noqa: ANN001, ANN002
        assert rest[:6] == (None, None, q.shape[2], k.shape[2], 0.0, False)
        assert rest[6:] == (torch.tensor(1), torch.tensor(2))
        return attention_module._flash_on_cpu_backward(grad.contiguous(), q, k, v, out, logsumexp, 0.0, False)

    def efficient(q, k, v, bias, want_logsumexp) -> tuple:  # noqa: ANN001
        assert bias is None
        assert want_logsumexp
        return (*flash(q, k, v)[:2], torch.tensor(1), torch.tensor(2))

    def efficient_backward(grad, q, k, v, bias, out, logsumexp, *rest) -> tuple:  # noqa: ANN001, ANN002
        assert rest == (torch.tensor(1), torch.tensor(2), 0.0, [True, True, True, False])
        arguments = (grad.contiguous(), q, k, v, out, logsumexp, 0.0, False)
        return *attention_module._flash_on_cpu_backward(*arguments), bias

    monkeypatch.setattr(attention_module, "_products", lambda q: products)
    for stand_in in (flash, flash_backward, efficient, efficient_backward):
        monkeypatch.setattr(attention_module, f"_{stand_in.__name__}", stand_in)
    compare("cosine_attention", [torch.randn(2, 48, 4, 5)], layout=layout, num_heads=2, units=8)


def test_bad_input(backend: str) -> None:
    qkv = torch.randn(1, 12, 2, 2)
    with pytest.raises(ValueError, match=r"cosine_attention: qkv must have 3 \* num_heads \* d channels, got 12 .*=3"):
        ops.cosine_attention(qkv, 3)
    with pytest.raises(ValueError, match="cosine_attention: num_heads must be at least 1, got 0"):
        ops.cosine_attention(qkv, 0)
    with pytest.raises(ValueError, match=r"cosine_attention: qkv must be \[batch, channels, ...\], got shape \[12\]"):
        ops.cosine_attention(qkv[0, :, 0, 0], 1)
