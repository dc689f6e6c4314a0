"""The traffic counter, against counts made by hand."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

import edm2ext
from benchmarks import traffic
from edm2ext import ops
from edm2ext.nn import MPConv, MPLinear
from edm2ext.ops import conv_choice
from edm2ext.traffic import PHASES, Key, PeakMemory, Traffic, counting
from python_train.config import make_options
from python_train.network import Precond

needs_kernels = pytest.mark.skipif(not edm2ext.build_info()["cuda_compiled"], reason="built without CUDA")
needs_convolutions = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("edm2::mp_conv2d", "CUDA"), reason="built without EDM2EXT_CONV"
)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


X = 2 * 3 * 4 * 4 * 2  # bytes of x


@pytest.fixture
def x() -> Tensor:
    return meta(2, 3, 4, 4)


def counted(counter: traffic.Counter) -> dict[str, tuple[str, int, int, int]]:
    """{op: (kind, launches, bytes read, bytes written)}."""
    return {key.op: (key.kind, row.launches, row.read, row.written) for key, row in counter.rows.items()}


def test_inputs_are_read_and_outputs_written(x: Tensor):
    with counting() as counter:
        torch.cat([x + x, x.float()], dim=1)
    assert counted(counter) == {
        "add": ("plain", 1, 2 * X, X),
        "_to_copy": ("plain", 1, X, 2 * X),
        "cat": ("plain", 1, 3 * X, 4 * X),
    }


def test_in_place(x: Tensor):
    with counting() as counter:
        x.mul_(x[:1])  # reads both, writes the first
        x.copy_(meta(1, 1, 1, 1).expand_as(x))  # overwrites
        x.zero_()
        torch._foreach_add_([x, x], 1.0)
        torch.add(x, x, out=x)
    assert counted(counter) == {
        "mul_": ("plain", 1, X + X // 2, X),
        "copy_": ("plain", 1, 2, X),
        "zero_": ("plain", 1, 0, X),
        "_foreach_add_": ("plain", 1, 2 * X, 2 * X),
        "add": ("plain", 1, 2 * X, X),
    }


def test_views_and_allocations_are_free(x: Tensor):
    with counting() as counter:
        x.view(2, -1).t().detach()[1:].unsqueeze(0).expand(5, -1, -1)
        x.unbind()
        torch.empty_like(x)
        x.new_empty(3)
        torch.ones(3).sum()  # on the CPU
    assert counter.rows == {}


def test_expanded_inputs_count_once(x: Tensor):
    with counting() as counter:
        x * meta(3, 1, 1).expand(2, 3, 4, 4)
        x.sum(dim=(2, 3))
    assert counted(counter) == {"mul": ("plain", 1, X + 6, X), "sum": ("plain", 1, X, 12)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products(x: Tensor, layout: torch.memory_format):
    x, w = x.contiguous(memory_format=layout).requires_grad_(), meta(5, 3, 3, 3).requires_grad_()
    with counting() as counter:
        y = F.conv2d(x, w, padding=1)
        y.backward(meta(*y.shape).contiguous(memory_format=layout))
        torch.bmm(meta(2, 3, 4), meta(2, 4, 5))
    assert y.is_contiguous(memory_format=layout)
    assert x.grad.is_contiguous(memory_format=layout)
    weight, out = 5 * 27 * 2, 2 * 5 * 16 * 2
    assert counter.rows[Key("forward", "product", "convolution")] == Traffic(1, X + weight, out)
    assert counter.rows[Key("backward", "product", "convolution_backward")] == Traffic(1, out + X + weight, X + weight)
    assert counter.rows[Key("update", "product", "bmm")] == Traffic(1, 2 * (24 + 40), 2 * 30)
    assert counter.total(kind="product").launches == 3


def test_attention_is_a_product():
    q, k, v = (meta(2, 4, 16, 64).requires_grad_() for _ in range(3))
    with counting() as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.total(phase="forward", kind="product").launches == 1
    assert counter.total(phase="backward", kind="product").launches == 1
    assert q.grad.stride() == q.stride()


def test_flops_of_products():
    """2 a multiply-add, in both directions."""
    x, w = meta(2, 3, 4, 4).requires_grad_(), meta(5, 3, 3, 3).requires_grad_()
    with counting() as counter:
        F.conv2d(x, w, padding=1).sum().backward()
    once = 2 * (2 * 16) * 5 * 27
    assert counter.flops == 3 * once
    with counting() as counter:
        meta(3, 4) @ meta(4, 5) + 1
    assert counter.flops == 2 * 60


@needs_convolutions
def test_flops_of_our_convolutions():
    x = meta(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = meta(24, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    with edm2ext.set_backend("native"), counting() as counter:
        y = ops.mp_conv2d(x, w, prepared=True)
        y.backward(torch.empty_like(y))
    assert counter.flops == 3 * 2 * (2 * 64) * 24 * 16 * 9


def test_peak_memory():
    """What is there before does not count, nor do views, nor what is gone."""
    x = meta(1000)
    with counting(), PeakMemory() as peak:
        y = (x + 1)[1:]
        del y
        y = x + 1
        z = y + y
        assert peak.bytes == 4000
        z.add_(y)
        del y
        assert (z * 2).shape == x.shape
    assert peak.bytes == 4000


def test_the_host_asks(x: Tensor):
    with counting() as counter:
        assert bool(x.isfinite().all())
    assert counter.synchronisations == 1


@needs_kernels
def test_native_ops_count_what_their_launchers_declare(x: Tensor):
    x.requires_grad_()
    c = meta(2, 3).requires_grad_()
    with edm2ext.set_backend("native"), counting() as counter:
        ops.mp_silu_modulated(x, c).backward(x.detach())
        ops.mp_silu(meta(4, 3).t())
    assert counter.rows[Key("forward", "native", "mp_silu_modulated")] == Traffic(1, X + 12, X)
    assert counter.rows[Key("backward", "native", "mp_silu_modulated_backward")] == Traffic(1, 2 * X + 12, X + 12)
    assert counter.rows[Key("update", "native", "mp_silu")] == Traffic(1, 24, 24)
    assert counter.rows[Key("update", "plain", "clone in mp_silu")] == Traffic(1, 24, 24)


@needs_kernels
def test_workspace_and_second_launch():
    x, c = meta(2, 8, 65, 65).requires_grad_(), meta(2, 8).requires_grad_()
    with edm2ext.set_backend("native"), counting() as counter:
        ops.mp_silu_modulated(x, c).backward(x.detach())
    row = counter.rows[Key("backward", "native", "mp_silu_modulated_backward")]
    size, sums = 2 * 8 * 65 * 65 * 2, 2 * 2 * 8 * 4  # two chunks of each plane
    assert row == Traffic(2, 2 * size + 32 + sums, size + sums + 32, workspace=sums)


@needs_kernels
def test_sums_and_concatenations_read_and_write_once(x: Tensor):
    a, b, grad = x.requires_grad_(), meta(2, 5, 4, 4).requires_grad_(), meta(2, 8, 4, 4)
    both, mask = 8 * X // 3, X // 16
    with edm2ext.set_backend("native"), counting() as counter:
        outputs = [ops.mp_sum(a, a), *ops.mp_sum(a, a, clip=256.0, twice=True)]
        outputs += [ops.mp_cat(a, b), *ops.mp_cat(a, b, silu=True)]
        torch.autograd.backward(outputs, [*[x.detach()] * 3, grad, grad, grad])
    assert {key.op: row for key, row in counter.rows.items() if key.kind == "native"} == {
        "mp_sum": Traffic(1, 2 * X, X),
        "mp_sum_clipped": Traffic(1, 2 * X, X + mask),
        "mp_sum_backward": Traffic(2, X + 2 * X + mask, 4 * X),
        "mp_cat": Traffic(1, both, both),
        "mp_cat_backward": Traffic(1, both, both),
        "mp_cat_silu": Traffic(1, both, 2 * both),
        "mp_cat_silu_backward": Traffic(1, 3 * both, both),
    }


@needs_kernels
def test_images_are_read_and_written_once():
    """Preconditioning, the loss with its gradients, and a step of the sampler."""
    image, pixels, batch = 2 * 3 * 64 * 64 * 4, 2 * 64 * 64, 2
    x, y, f = meta(2, 3, 64, 64, dtype=torch.float32), meta(2, 3, 64, 64, dtype=torch.float32), meta(2, 3, 64, 64)
    sigma, u = meta(2, dtype=torch.float32), meta(2, dtype=torch.float32)
    t = meta(1, dtype=torch.float32)
    network = ops.NetworkInput(0.5, torch.float16, torch.channels_last)
    with edm2ext.set_backend("native"), counting() as counter:
        ops.precondition_input(x, sigma, *network)
        ops.precondition_output(x, f.requires_grad_(), sigma[:1]).backward(y)
        ops.denoising_loss(f.detach(), x, y, sigma, u)
        ops.sampler_step(x, y, t, t)
        ops.sampler_step(x, y, t, t, guide=y, start=x, noise=y, network=network)
    half, input_bytes = image // 2, (image // 4 + pixels) * 2
    sums = batch * 24 * 4  # 24 chunks of each sample
    assert {key.op: row for key, row in counter.rows.items() if key.kind == "native"} == {
        "precondition_input": Traffic(1, image + 8, input_bytes),
        "precondition_output": Traffic(1, image + half + 4, image),
        "precondition_output_backward": Traffic(1, image + 4, half),
        "denoising_loss": Traffic(2, half + 2 * image + 16 + sums + 16, half + sums + 16, workspace=sums),
        "sampler_step": Traffic(1, 2 * image + 8, image),
        "sampler_step_input": Traffic(1, 5 * image + 8, image + input_bytes),
    }


@needs_kernels
def test_snapshots_are_read_once_whatever_the_outputs():
    inputs, coefs = [meta(100), meta(100), meta(100, dtype=torch.float32)], torch.ones(3, 50)
    with edm2ext.set_backend("native"), counting() as counter:
        ops.accumulate_snapshots(inputs, coefs, meta(50, 100, dtype=torch.float32))
    sums = 50 * 400
    assert counted(counter) == {"accumulate_snapshots_": ("native", 1, 800 + sums, sums)}


@needs_convolutions
def test_convolutions_read_and_write_once():
    x = meta(8, 16, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = meta(24, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    with edm2ext.set_backend("native"), counting() as counter:
        y = ops.mp_conv2d(x, w, prepared=True)
        y.backward(torch.empty_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    size_x, size_y, size_w = (2 * t.numel() for t in (x, y, w))
    assert counter.rows[Key("forward", "product", "mp_conv2d")] == Traffic(1, size_x + size_w, size_y)
    row = counter.rows[Key("backward", "product", "mp_conv2d_backward_input")]
    assert row == Traffic(1, size_y + size_w, size_x)
    row = counter.rows[Key("backward", "product", "mp_conv2d_backward_weight")]
    assert row.launches == 2  # the sum over pixels is split
    parts = row.workspace
    assert parts > 0
    assert row == Traffic(2, size_x + size_y + parts, parts + 2 * size_w, workspace=parts)


@needs_convolutions
def test_sums_after_convolutions_write_a_bit_an_element_more():
    x = meta(8, 16, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    w, skip = meta(24, 16, 3, 3).requires_grad_(), meta(8, 24, 64, 64)
    skip = skip.contiguous(memory_format=torch.channels_last).requires_grad_()
    with edm2ext.set_backend("native"), counting() as counter:
        outputs = ops.mp_conv2d(x, w, prepared=True, then=ops.SumWith(skip, clip=256.0, twice=True))
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    size_x, size_y, size_w, mask = 2 * x.numel(), 2 * skip.numel(), 2 * w.numel(), skip.numel() // 8
    row = counter.rows[Key("forward", "product", "mp_conv2d_sum")]
    assert row == Traffic(1, size_x + size_w + size_y, size_y + mask)
    assert counter.rows[Key("backward", "native", "mp_sum_backward")] == Traffic(1, 2 * size_y + mask, 2 * size_y)


@needs_convolutions
@pytest.mark.parametrize("stored", [False, True])
def test_concatenations_are_not_stored_for_convolutions(stored: bool):
    a, b = (meta(8, c, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_() for c in (64, 32))
    w = meta(24, 96, 1, 1).requires_grad_()
    problem = conv_choice.Problem(0, 8, 64, 64, 96, 24, 1, 1, torch.float16, "", True, cat=64)
    with edm2ext.set_backend("native"), counting() as counter, conv_choice.trying(problem, None if stored else []):
        outputs = ops.mp_cat_conv2d(a, b, w, prepared=True)
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    size_x, size_y, size_w = 2 * 96 * 8 * 64 * 64, 2 * outputs[0].numel(), 2 * w.numel()
    cat, conv = ("mp_cat_silu", "mp_conv2d") if stored else ("mp_cat_silu_only", "mp_cat_conv2d")
    grad = "mp_cat_silu_backward" if stored else "mp_cat_silu_only_backward"
    assert counter.rows[Key("forward", "native", cat)] == Traffic(1, size_x, 2 * size_x if stored else size_x)
    assert counter.rows[Key("forward", "product", conv)] == Traffic(1, size_x + size_w, size_y)
    assert counter.rows[Key("backward", "native", grad)] == Traffic(1, 3 * size_x, size_x)
    row = counter.rows[Key("backward", "product", f"{conv}_backward_weight")]
    assert row == Traffic(2, size_x + size_y + row.workspace, row.workspace + 2 * size_w, workspace=row.workspace)
    assert counter.rows[Key("backward", "product", "mp_conv2d_backward_input")].launches == 1
    assert counter.flops == 3 * 2 * (8 * 64 * 64) * 24 * 96


# ---- a step ----


def layers() -> tuple[int, int]:
    """Convolutions of the network, and linear layers outside of its blocks, whose linear layers run as one."""
    with torch.device("meta"):
        net = Precond(**make_options("digits").network_config(8, 1, 10))
    linears = [name for name, module in net.named_modules() if isinstance(module, MPLinear)]
    convolutions = sum(isinstance(module, MPConv) for module in net.modules())
    return convolutions, sum("block" not in name and not name.endswith("emb_linear") for name in linears)


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_kernels)])
def test_a_step_multiplies_by_every_weight_once(name: str):
    counter = traffic.count_step("digits", 4, "fp16", name)
    convolutions, linears = layers()
    for phase, op in (("forward", "convolution"), ("backward", "convolution_backward")):
        torchs = counter.rows[Key(phase, "product", op)].launches
        own = [key for key in counter.rows if key.phase == phase and key.op.startswith(("mp_conv2d", "mp_cat_conv2d"))]
        ours = sum(counter.rows[key].launches for key in own if not key.op.endswith("backward_weight"))
        more = torchs + ours - convolutions
        assert 0 <= more <= max(2, ours // 2)  # in plain torch resampling is one; ours are two where sums are split
    assert counter.rows[Key("forward", "product", "mm")].launches == linears
    assert counter.rows[Key("forward", "product", "addmm")].launches == 1
    assert (counter.total(kind="native").launches > 0) == (name == "native")


@needs_kernels
def test_native_launches_and_moves_less():
    plain, native = (traffic.count_step("digits", 4, "fp16", name) for name in ("reference", "native"))
    for phase in PHASES:
        assert native.total(phase=phase).launches < plain.total(phase=phase).launches
    assert native.total(phase="forward").bytes < plain.total(phase="forward").bytes


def test_command_line(tmp_path: Path):
    file = tmp_path / "traffic.json"
    arguments = ["--preset", "digits", "--batch", "4", "--backend", "reference", "--json", str(file)]
    result = CliRunner().invoke(traffic.main, arguments)
    assert result.exit_code == 0, result.output
    assert "| **forward + backward** |" in result.output
    found = json.loads(file.read_text())
    assert found["dtype"] == "fp32"
    rows = [row for row in found["rows"] if row["phase"] != "update"]
    total = sum(row["launches"] for row in rows)
    assert f"| **forward + backward** | {total:,} |" in result.output
