"""The golden networks on a GPU: in fp32 as on the CPU, in fp16 and bf16 beside the error that plain torch makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from golden_network import FORWARD, GRADIENT, NETWORKS, Golden, Replay, error, worst
from torch import Tensor

import edm2ext

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(golden: Golden) -> Golden:
    golden.tensors = {key: value.to(DEVICE) for key, value in golden.tensors.items()}
    return golden


def results(golden: Golden, dtype: torch.dtype, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The denoised images of the evaluation, and the gradients of the first step."""
    with edm2ext.set_backend(backend):
        net = golden.network().to(DEVICE)
        net.compute_dtype = dtype
        with torch.no_grad():
            denoised = net.eval()(golden["eval.x"], golden["eval.sigma"], golden.get("eval.labels"))
        replay = Replay(golden, golden.trainer(DEVICE))  # of another network: it keeps gradients from the gains
        loss = replay(net.train(), golden["step0.images"], golden.get("step0.labels"))
        (loss.sum() / golden.meta["batch"]).backward()
        return denoised, {name: param.grad for name, param in net.named_parameters()}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32(name: str, backend: str) -> None:
    golden = on_gpu(Golden(name))
    denoised, grads = results(golden, torch.float32, backend)
    assert error(denoised, golden["eval.D"]) <= FORWARD
    assert worst(grads, golden.state("grad0")) <= GRADIENT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_as_close_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    golden = on_gpu(Golden(name))
    native, plain = (results(golden, dtype, backend) for backend in ("native", "reference"))
    unit = torch.finfo(dtype).eps
    assert error(native[0], golden["eval.D"]) <= 2 * error(plain[0], golden["eval.D"]) + unit
    assert worst(native[1], golden.state("grad0")) <= 2 * worst(plain[1], golden.state("grad0")) + unit
