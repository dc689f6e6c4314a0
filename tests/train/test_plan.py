"""Predictions of what a run will take."""

import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import edm2ext
from python_train import plan, run
from python_train.config import make_options

needs_kernels = pytest.mark.skipif(not edm2ext.build_info()["cuda_compiled"], reason="built without CUDA")
DIGITS = (8, 1, 10)
PARAMETERS = 722_539


@needs_kernels
def test_counts_grow_with_the_images() -> None:
    options = make_options("digits")
    one, two, four = plan.count_rounds(options, *DIGITS, (16, 32, 64))
    assert four.flops - two.flops == 2 * (two.flops - one.flops) > 0
    assert four.peak - two.peak == pytest.approx(2 * (two.peak - one.peak), rel=0.02)
    assert one.launches == four.launches > 50
    assert one.optimizer_bytes == four.optimizer_bytes >= 4 * 7 * PARAMETERS  # reads at least grad, moments, averages


@needs_kernels
def test_activations_are_halved_by_half_precision_and_fewer_if_recomputed() -> None:
    def per_image(**overrides: object) -> float:
        few, more = plan.count_rounds(make_options("digits", **overrides), *DIGITS, (32, 64))
        return (more.peak - few.peak) / 32

    single, half = per_image(precision="fp32"), per_image(precision="fp16")
    inputs_of_convolutions = 6 * 2 * 32 * 64 * 2  # of the first level's six blocks, in fp16
    assert inputs_of_convolutions < half < 0.6 * single
    assert per_image(precision="fp32", recompute=True) < 0.7 * single


@needs_kernels
def test_prediction_is_consistent() -> None:
    options = make_options("digits", batch=64, batch_gpu=8, precision="fp16")
    gpu = plan.GPUS["H100"]
    found = plan.predict(options, gpu, 2, *DIGITS, PARAMETERS)
    assert found.micro_batch == 8
    assert 0 < found.mfu < plan.PEAK_SHARE
    expected = found.flops_per_image * found.images_per_second / 2 / (gpu.tflops_16 * 1e12)
    assert found.mfu == pytest.approx(expected)
    assert found.peak_memory < found.gpu.memory * 2**30
    assert found.peak_memory >= plan.parameter_bytes(options, PARAMETERS, 2) == PARAMETERS * (6 * 4 + 2)
    slower = plan.predict(options, plan.GPU("slow", 1, 10, 1, 0.1), 2, *DIGITS, PARAMETERS)
    assert slower.images_per_second < found.images_per_second / 5


@needs_kernels
@pytest.mark.parametrize(("gigabytes", "recompute"), [(1.0, False), (0.035, False), (0.035, True)])
def test_largest_micro_batch_fits_and_hardly_more_does(gigabytes: float, recompute: bool) -> None:
    """Whether activations or gradients take most of the memory, and whatever number at a time is planned."""
    options = make_options("digits", batch=4096, precision="fp16", model_channels=64, recompute=recompute)
    gpu = plan.GPU("small", gigabytes, 100, 10, 1)
    found = {
        plan.predict(replace(options, batch_gpu=n), gpu, 1, *DIGITS, PARAMETERS).largest_micro_batch for n in (1, 64)
    }
    (largest,) = found
    sizes = (largest, round(1.2 * largest))
    below, above = plan.count_rounds(options, *DIGITS, sizes)
    room = plan.FREE_MEMORY * gigabytes * 2**30 - plan.parameter_bytes(options, PARAMETERS, 1)
    assert 0 < below.peak <= room < above.peak


@needs_kernels
def test_what_does_not_fit() -> None:
    options = make_options("digits", batch=120, precision="fp16")
    big, small = (
        plan.predict(options, plan.GPU("g", size, 100, 10, 1), 1, *DIGITS, PARAMETERS) for size in (0.04, 0.001)
    )
    assert 1 < big.largest_micro_batch < 120
    text = dict(plan.describe(big, options, 1))["memory"]
    assert f"DOES NOT FIT: at most {big.largest_micro_batch} images at a time do, such as --batch-gpu " in text
    assert 120 % int(text.split()[-1]) == 0
    assert dict(plan.describe(small, options, 1))["memory"].endswith("DOES NOT FIT, however few images at a time")


@needs_kernels
def test_arithmetic_of_a_preset_is_the_published_one() -> None:
    """Forward and backward of EDM2-S: three times the papers' count, at 2 flops a multiply-add (spec 3.6)."""
    one, _ = plan.count_rounds(make_options("img512-s"), 64, 4, 1000, (1, 2))
    assert one.flops == pytest.approx(3 * 2 * (100.225e9 + 0.579e9), rel=0.01)


@needs_kernels
def test_images_that_are_not_square() -> None:
    """Half as high, half the work (but for what does not depend on the pixels)."""
    options = make_options("digits", precision="fp16")
    (square,), (wide,) = (plan.count_rounds(options, 16, 4, 10, (64,), size) for size in (None, (8, 16)))
    assert 0.4 < wide.flops / square.flops < 0.55
    assert 0.4 < wide.peak / square.peak < 0.6
    facts = (plan.GPUS["H100"], 1, 16, 4, 10, PARAMETERS)
    assert plan.predict(options, *facts, (8, 16)).flops_per_image < 0.55 * plan.predict(options, *facts).flops_per_image
    problems = plan.convolutions(options, 16, 4, 10, 3, (8, 16))
    assert {(problem.height, problem.width) for problem in problems} == {(8, 16), (4, 8)}


@pytest.mark.parametrize(
    ("duration", "checkpoint", "keep", "keep_every", "kept"),
    [
        (8192, 1024, 3, 0, [6144, 7168, 8192]),
        (8192, 1024, 3, 2048, [2048, 4096, 6144, 7168, 8192]),
        (8192, 1024, 0, 2048, range(1024, 8193, 1024)),
        (8192, 1024, 20, 0, range(1024, 8193, 1024)),
        (7680, 1024, 1, 2048, [2048, 4096, 6144, 7680]),
        (7680, 1024, 2, 7168, [7168, 7680]),
        (7680, 8192, 3, 0, [7680]),
        (8192, 0, 3, 0, []),
    ],
)
def test_training_states_that_are_kept(
    duration: int, checkpoint: int, keep: int, keep_every: int, kept: list[int]
) -> None:
    options = make_options(
        "digits", batch=512, duration=duration, checkpoint=checkpoint, keep=keep, keep_every=keep_every
    )
    assert plan.states_kept(options) == len(kept)


def test_dry_run_of_several_gpus() -> None:
    arguments = ["--dry-run", "--preset", "img512-xxs", "--batch-gpu", "32", "--precision", "auto"]
    result = CliRunner().invoke(run.main, [*arguments, "--gpu", "8xH100"])
    assert result.exit_code == 0, result.output
    assert "(8 processes x 8 rounds x 32)" in result.output
    assert "fp16" in result.output
    if edm2ext.build_info()["cuda_compiled"]:
        assert "images/s on 8 GPUs, " in result.output
    for value, message in (("3xH100", "batch 2048 is not divisible by the 3 processes"), ("0xH100", "expected one of"),
                           ("8xB200", "expected one of A100-40GB, "), ("8x", "expected one of")):  # fmt: skip
        result = CliRunner().invoke(run.main, [*arguments, "--gpu", value])
        assert result.exit_code != 0
        assert message in result.output.replace("\n", " ")
    result = CliRunner().invoke(run.main, ["--gpu", "H100"])
    assert result.exit_code == 1
    assert "--gpu says what --dry-run shall count on" in result.output


def test_dry_run_of_a_named_gpu() -> None:
    result = CliRunner().invoke(run.main, ["--dry-run", "--gpu", "A100-80GB"])
    assert result.exit_code == 0, result.output
    assert "11 snapshots of 2 averages (sigma_rel 0.05 and 0.1)" in result.output
    if edm2ext.build_info()["cuda_compiled"]:
        assert "of 80 GiB on each A100-80GB (predicted)" in result.output
        assert "MFU (predicted, not measured)" in result.output
    else:
        assert "predicted nothing: the library holds no CUDA kernels" in result.output


def test_dry_run_without_a_gpu_says_so() -> None:
    result = CliRunner().invoke(run.main, ["--dry-run", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "name one: --gpu A100-40GB|A100-80GB|H100" in result.output


@pytest.mark.parametrize(
    ("name", "gigabytes", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40GB"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA GeForce RTX 4090", 23.5, "RTX-4090"),
        ("Tesla T4", 14.6, None),
    ],
)
def test_gpu_at_hand(monkeypatch: pytest.MonkeyPatch, name: str, gigabytes: float, expected: str | None) -> None:
    class Properties:
        total_memory = math.floor(gigabytes * 2**30)

    Properties.name = name
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = plan.gpu_at_hand(torch.device("cuda:0"))
    assert (found.name if found else None) == expected
    assert plan.gpu_at_hand(torch.device("cpu")) is None
