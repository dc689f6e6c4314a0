"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process that has them from the start."""

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

KERNELS = ["pixel_norm", "mp_silu", "mp_sum", "mp_cat", "mp_fourier", "resample", "resample_down_pixel_norm"]
KERNELS += ["cosine_attention", "ema_update", "adam_step", "normalize_weight", "accumulate_snapshots"]
KERNELS += ["precondition", "denoising_loss", "sampler_step"]
FILES = ["test_emulator.py", *(f"test_emulated_{name}.py" for name in KERNELS)]


def run_sanitized(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python with the sanitizers loaded, and emulated kernels compiled for them."""
    name = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(name.strip()).is_absolute():
        pytest.skip("g++ has no libasan.so")
    environment = {
        **os.environ,
        "EDM2EXT_EMULATION_SANITIZED": "1",
        "LD_PRELOAD": name.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until the end
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=emulated.HERE, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_kernels_under_sanitizers():
    run = run_sanitized("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("probe_reverse', torch.ones(256), 5, True", "heap-buffer-overflow"),
        ("probe_reverse_dynamic', torch.ones(100), 100, 396", "use-after-poison"),
        ("probe_indices', torch.ones(361, dtype=torch.int32).view(torch.uint8)[1:]", "misaligned address"),
    ],
)
def test_sanitizers_see_the_kernels(call: str, message: str):
    run = run_sanitized("-c", f"import emulated, torch; emulated.load('emulator_probe').call('{call})")
    assert run.returncode != 0
    assert message in run.stderr, run.stderr[-3000:]
