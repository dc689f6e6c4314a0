"""Post-hoc EMA on a GPU: the same results as on the CPU, and updates that do not wait for the device."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import edm2ext
from edm2ext import phema
from edm2ext.phema import PowerEMA

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)


@pytest.mark.parametrize("memory", [1 << 16, 1 << 28])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_on_the_gpu(tmp_path: Path, dtype: torch.dtype, memory: int) -> None:
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"{i}.safetensors")
        header = {"nimg": 1024 * (1 + i // 2), "sigma_rel": 0.05 * (1 + i % 2)}
        save_file(
            {"w": torch.randn(4001).to(dtype), "b": torch.randn(()).to(dtype)}, paths[-1], {"edm2": json.dumps(header)}
        )
    targets = [phema.Target(0.03), phema.Target(0.2), phema.Target(0.1, 4096)]
    on_gpu = phema.reconstruct(paths, targets, dtype=dtype, device="cuda", memory=memory)
    on_cpu = phema.reconstruct(paths, targets, dtype=dtype, memory=memory)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-4)


def test_update_does_not_wait() -> None:
    net = torch.nn.Linear(64, 64, device="cuda")
    ema = PowerEMA(net)
    ema.update(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
