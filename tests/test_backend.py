"""Choice of the backend, and what each call is then served by."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import edm2ext
from edm2ext import _library, backend, ops, reference
from edm2ext.ops.accumulate_snapshots import sum_snapshots
from edm2ext.optim import FusedAdam


class Recorder(TorchDispatchMode):
    """Collects the native ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001 - torch's signature
        if func.namespace == "edm2":
            self.ops.add(func._opname)
        return func(*args, **(kwargs or {}))


def _everything(dtype: torch.dtype) -> None:
    """Call every function, forward and backward."""
    x = torch.randn(2, 6, 4, 4, dtype=dtype, requires_grad=True)
    c, w = torch.randn(2, 6, dtype=dtype), torch.randn(6, 6, 3, 3, dtype=dtype, requires_grad=True)
    vector = torch.randn(3, dtype=dtype, requires_grad=True)
    gain = torch.tensor(0.5, requires_grad=True)
    wide = torch.ones(2, 8, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    outputs = [
        ops.pixel_norm(x),
        *ops.pixel_norm(x, silu=True),
        ops.mp_silu(x),
        ops.mp_silu_modulated(x, c),
        ops.mp_silu_modulated(x, c, 0.5, torch.arange(2)),
        ops.mp_sum(x, x),
        ops.mp_sum(x, x, clip=1.0),
        ops.mp_cat(x, x),
        *ops.mp_cat(x, x, silu=True),
        ops.mp_fourier(vector, torch.randn(4), torch.rand(4)),
        ops.resample_up(x),
        ops.resample_down(x),
        *ops.resample_down_pixel_norm(x),
        ops.precondition_output(x.detach(), x, gain.detach()),
        ops.normalize_weight(w),
        ops.effective_weight(w, gain),
        *ops.effective_weight([w, w], gain),
        ops.mp_conv2d(x, w),
        ops.mp_conv2d(wide, w[:, :1].repeat(1, 8, 1, 1)),
        ops.mp_linear(x, w[:, :4, 0, 0].repeat(1, 1)),
        ops.cosine_attention(x, 2),
    ]
    sum(out.sum() for out in outputs).backward()
    image, sigma = x.detach().to(reference.image_dtype(dtype)), torch.rand(2)
    ops.precondition_input(image, sigma, dtype=dtype)
    ops.denoising_loss(x, image, image, sigma, sigma)
    step = (image, image, *torch.rand(2, dtype=image.dtype))
    ops.sampler_step(*step)
    ops.sampler_step(*step, network=ops.NetworkInput(0.5, dtype, torch.channels_last))
    FusedAdam([w], lr=0.1).step()
    ops.force_normalize_(w)
    ops.prepare_weights([w])
    ops.ema_update_([[torch.zeros_like(w)]], [w], [0.5])
    if dtype != torch.float64:
        ops.accumulate_snapshots([w], [[1.0]])
        sum_snapshots([w], torch.ones(1, 1, dtype=torch.float64), torch.empty(1, *w.shape).half())


def _recorded(dtype: torch.dtype) -> set[str]:
    with Recorder() as recorder:
        _everything(dtype)
    return recorder.ops


def test_the_native_library_is_there() -> None:
    """A build that went wrong must not hide behind the reference."""
    assert _library.LOADED, _library.REASON
    assert edm2ext.build_info()["native"]


def test_native_kernels_serve_every_function(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = frozenset({torch.float32, torch.bfloat16})
    monkeypatch.setattr(importlib.import_module("edm2ext.ops.conv_weight_grad"), "_FASTER", faster)
    every = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("edm2::")]
    on_cpu = [name for name in every if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    names = {name.removeprefix("edm2::") for name in on_cpu}
    for choice in ("auto", "native"):
        with edm2ext.set_backend(choice):
            assert _recorded(torch.float32) == names
            assert _recorded(torch.bfloat16) == names - {"adam_step_"}
            assert _recorded(torch.float64) == names - {"accumulate_snapshots_", "sum_snapshots_", "conv_weight_grad"}


def test_reference_never_calls_native_kernels() -> None:
    with edm2ext.set_backend("reference"):
        assert _recorded(torch.float32) == set()


def test_fp16_on_the_cpu_goes_to_the_reference() -> None:
    assert _recorded(torch.float16) == {
        "accumulate_snapshots_",
        "sum_snapshots_",
        "sampler_step",
    }  # whose state is fp32


def test_function_and_context_manager() -> None:
    assert edm2ext.get_backend() == "auto"
    try:
        edm2ext.set_backend("reference")
        assert edm2ext.get_backend() == "reference"
        with edm2ext.set_backend("native"):
            assert edm2ext.get_backend() == "native"
            with edm2ext.set_backend("auto"):
                assert edm2ext.get_backend() == "auto"
            assert edm2ext.get_backend() == "native"
        assert edm2ext.get_backend() == "reference"
    finally:
        edm2ext.set_backend("auto")


def test_choice_returns_after_an_error() -> None:
    with pytest.raises(KeyError), edm2ext.set_backend("reference"):
        raise KeyError
    assert edm2ext.get_backend() == "auto"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="set_backend: backend must be one of auto, native, reference, got 'fast'"):
        edm2ext.set_backend("fast")
    assert edm2ext.get_backend() == "auto"


def test_meta_tensors_need_no_cuda_kernels() -> None:
    x = torch.empty(2, 6, 4, 4, device="meta")
    assert ops.pixel_norm(x).shape == x.shape
    assert ops.cosine_attention(x, 1).shape == (2, 2, 4, 4)
    assert ops.mp_cat(x, x, silu=True)[1].shape == (2, 12, 4, 4)


def test_meta_tensors_take_the_path_of_cuda_tensors() -> None:
    """Where the library holds a CUDA kernel, whether or not it could run here."""
    x = torch.empty(2, 6, 4, 4, device="meta", dtype=torch.float16, requires_grad=True)
    with Recorder() as recorder:
        ops.pixel_norm(x).sum().backward()
    compiled = edm2ext.build_info()["cuda_compiled"]
    assert recorder.ops == ({"pixel_norm", "pixel_norm_backward"} if compiled else set())
    with Recorder() as recorder:
        ops.pixel_norm(x.double())
    assert recorder.ops == set()


# ---- GPUs for which nothing was compiled ----


@pytest.mark.parametrize(
    ("arch", "runs", "fails"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (8, 7)]),
        ("90a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("100a", [(10, 0)], [(10, 1), (10, 3), (12, 0)]),
        ("100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
        ("87", [(8, 7)], [(8, 9)]),
    ],
)
def test_which_gpu_runs_which_code(arch: str, runs: list[tuple[int, int]], fails: list[tuple[int, int]]) -> None:
    assert all(_library._runs_on(arch, capability) for capability in runs)
    assert not any(_library._runs_on(arch, capability) for capability in fails)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees two GPUs, of which the library knows the second."""
    monkeypatch.setattr(_library, "_capabilities", lambda: ((8, 9), (9, 0)))
    monkeypatch.setattr(_library, "_compiled_archs", lambda: ("80a", "90a"))
    monkeypatch.setattr(_library, "cuda_obstacle", lambda: "")
    monkeypatch.setattr(_library, "_runs_on_gpu", {})


class OnGPU:
    """As much of a CUDA tensor as the choice of backend looks at."""

    def __init__(self, index: int) -> None:
        self.is_cpu, self.is_cuda, self.dtype, self.get_device = False, True, torch.float16, lambda: index


def test_a_gpu_without_code_takes_the_reference(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend.Kernels(cpu=True, cuda=True, meta=True)
    assert [backend.native(OnGPU(index), kernels) for index in (0, 1)] == [False, True]
    info = edm2ext.build_info()
    assert info["cuda"]
    assert info["cuda_reason"] == ""
    missing = "cuda:0 has compute capability 8.9, the library kernels for 80a, 90a"
    assert info["cuda_gpus"] == {"cuda:0": missing, "cuda:1": ""}
    monkeypatch.setattr(_library, "_capabilities", lambda: ((8, 9),))
    info = edm2ext.build_info()
    assert not info["cuda"]
    assert info["cuda_reason"] == missing


def test_the_compiler_keeps_what_a_gpu_runs(two_gpus: None) -> None:
    double_or_not = torch.compile(lambda x: 2 * x if _library.runs_on_gpu(1) else x, backend="eager", fullgraph=True)
    assert double_or_not(torch.ones(())) == 2


def test_reference_and_ops_have_the_same_names() -> None:
    arguments = {"CatWith", "CosineAttention", "ModulatedSiLU", "SumWith"}  # of convolutions
    assert all(callable(getattr(reference, name)) for name in ops.__all__ if name not in arguments)


WITHOUT_LIBRARY = """
import torch, sys
from pathlib import Path
is_file = Path.is_file
Path.is_file = lambda self: not self.name.endswith(".so") and is_file(self)
import edm2ext
Path.is_file = is_file
info = edm2ext.build_info()
assert not info["native"] and "not found" in info["reason"], info
x = torch.randn(2, 3, 4, 4, requires_grad=True)
edm2ext.nn.MPConv(3, 4, 3)(edm2ext.ops.mp_silu(x)).sum().backward()
assert x.grad.isfinite().all()
try:
    edm2ext.set_backend("native")
except RuntimeError as error:
    assert "set_backend: the native library is not available: libedm2_ops.so was not found" in str(error), error
else:
    raise AssertionError("no error")
assert edm2ext.get_backend() == "auto"
"""


def test_without_the_library_everything_runs_on_the_reference() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_LIBRARY], check=True)


def test_description_of_the_installation() -> None:
    result = subprocess.run([sys.executable, "-m", "edm2ext"], check=True, capture_output=True, text=True)
    assert f"torch {torch.__version__}" in result.stdout
    assert "CUDA usable:" in result.stdout


def test_an_older_library_is_named() -> None:
    with pytest.raises(ImportError, match=r"libedm2_ops\.so has no pixel_nrom: .* build it again \(make setup"):
        backend.op("pixel_nrom")
