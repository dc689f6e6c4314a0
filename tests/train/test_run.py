"""The command line: help, plan, errors a person can act on, and what runs after training."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path

import click.testing
import PIL.Image
import pytest
import torch

from python_train import demo, loop, run
from python_train.config import PRESETS
from python_train.trainer import fastest_precision

SHORT = (
    "--channels 8 --blocks 1 --channel-mult 1 --batch 64 --duration 1Ki --snapshot 1Ki --checkpoint 1Ki --status 1Ki"
)


def invoke(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(run.main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for text in (
        "--preset",
        "--data",
        "--outdir",
        "--duration",
        "--batch-gpu",
        "--lr",
        "--decay",
        "--device",
        "--dry-run",
    ):
        assert text in result.output
    assert "Examples:" in result.output
    assert all(preset in result.output.replace("\n", "") for preset in PRESETS)


@pytest.mark.parametrize(("preset", "parameters"), [("img512-s", "280,212,837"), ("img64-xs", "124,710,949")])
def test_dry_run_of_a_preset_without_data(preset: str, parameters: str) -> None:
    result = invoke("--dry-run", "--preset", preset)
    assert result.exit_code == 0, result.output
    assert f"{parameters} parameters" in result.output
    assert "assuming 64x64" in result.output
    assert not os.listdir()


def test_dry_run_of_the_demo() -> None:
    result = invoke("-n")
    assert result.exit_code == 0, result.output
    for text in ("722,539 parameters", "1797 images of 8x8", "runs/digits", "device", "torch"):
        assert text in result.output
    assert not os.listdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset img32", "unknown preset 'img32'; the presets are: digits, img512-xxs"),
        ("--preset img64-s", "preset img64-s needs --data"),
        ("--data nowhere", "no such data set: nowhere"),
        ("--batch 100", "duration 81920 is not divisible by batch 100"),
        ("--batch-gpu 48", "batch per process 128 is not divisible by batch-gpu 48"),
        ("--duration 8M", "expected a number of images such as 4096, 128Ki"),
        ("--channel-mult 1,x", "expected positive integers separated by commas"),
        (
            "--channel-mult 1,1,1,1,1",
            "the network does not fit the data: UNet: img_resolution 8 is not divisible by 16",
        ),
        ("--device tpu", "device 'tpu' cannot be used here"),
        ("--device meta", "device 'meta' cannot be used here: expected cpu or cuda, and not meta"),
        ("--init-from a/training-state-0000001.pt", "is a training state; what is needed is a snapshot"),
        ("--device cuda:99", "device 'cuda:99' cannot be used here"),
        ("--precision fp8", "'fp8' is not one of"),
        ("--lr x", "'x' is not a valid float"),
        ("--slice 128", "slice 128 is shorter than the checkpoint interval 32768"),
    ],
)
def test_errors(arguments: str, message: str) -> None:
    result = invoke(*arguments.split(), "--outdir", "out")
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)  # not a traceback
    assert message in result.output.replace("\n", " ")
    assert not os.path.exists("out")


def test_short_run_resume_and_refusal() -> None:
    result = invoke(*SHORT.split(), "--outdir", "out")
    assert result.exit_code == 0, result.output
    assert "the run in out is complete: 1,024 images" in result.output
    assert "python -m python_train.generate --net out/network-snapshot-0000001-0.100.safetensors" in result.output
    again = invoke(*SHORT.split(), "--outdir", "out", "--duration", "2Ki", "--slice", "1Ki")
    assert again.exit_code == 0, again.output
    assert "resuming from out/training-state-0000001.pt" in again.output
    refused = invoke(*SHORT.split(), "--outdir", "out", "--lr", "0.5")
    assert refused.exit_code == 1
    assert "options.lr: 0.01 -> 0.5" in refused.output
    more = invoke(*SHORT.split(), "--outdir", "out", "--duration", "4Ki", "--slice", "1Ki")
    assert "stopped at 3,072 of 4,096 images; the same command continues" in more.output


def test_what_to_do_next(tmp_path: Path) -> None:
    """Commands that a shell takes; none for a network that has seen nothing."""
    result = invoke(*SHORT.split(), "--outdir", "my run")
    name = "my run/network-snapshot-0000001-0.100.safetensors"
    assert f"python_train.generate --net '{name}' --outdir 'my run/out' --seeds 0-63" in result.output
    result = invoke(*SHORT.split(), "--snapshot", "2Ki", "--outdir", "out")
    assert list(Path("out").glob("network-snapshot-0000000-*"))
    assert "the run in out is complete" in result.output
    assert "python_train.generate" not in result.output


def test_no_snapshot_at_the_end_is_told() -> None:
    intervals = "--batch 1024 --duration 24Ki --snapshot 10Ki --status 1Ki --sample 0 --checkpoint 0"
    result = invoke("-n", *intervals.split())
    assert "WARNING: the last snapshot will be at 20,480 of 24,576 images; --snapshot should divide" in result.output
    assert "WARNING" not in invoke("-n").output


def test_name_of_a_run_on_the_present_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    result = invoke("-n", "--data", ".", "--channels", "8")
    assert f"runs/{tmp_path.name}: " in result.output


def test_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    result = invoke(*SHORT.split(), "--outdir", "out")
    assert result.exit_code == 1
    assert "out is not empty and holds no run of this program" in result.output
    assert os.listdir("out") == ["thesis.tex"]


def test_unwritable_directory() -> None:
    result = invoke(*SHORT.split(), "--outdir", "/proc/nowhere/run")
    assert result.exit_code == 1
    assert "/proc/nowhere" in result.output


def test_full_disk() -> None:
    """A limit on file sizes: the first training state does not fit, everything already there stays whole."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        result = invoke(*SHORT.split(), "--outdir", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert result.exit_code == 1
    assert "cannot write out/training-state-0000001.pt: File too large" in result.output
    assert not [name for name in os.listdir("out") if name.endswith(".tmp") or name.startswith("training-state")]


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(2):
            PIL.Image.new("RGB", (8, 8), k).save(tmp_path / "set" / name / f"{k}.png")
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"\x89PNG broken")
    result = invoke(*SHORT.split(), "--data", "set", "--outdir", "out")
    assert result.exit_code == 1
    assert "b/1.png cannot be decoded" in result.output
    assert not os.path.exists("out")


def test_images_that_are_not_square(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for k in range(4):
        PIL.Image.new("RGB", (12, 8), (k, 50, 60 * k)).save(tmp_path / "set" / f"{k}.png")
    wide = SHORT.replace("--channel-mult 1", "--channel-mult 1,1").split()
    more = ["--uncond", "--xflip", "--cache", "0", "--workers", "0", "--outdir", "out", "--precision", "fp32"]
    result = invoke(*wide, "--data", "set", *more)
    assert result.exit_code == 0, result.output
    assert "8 images of 8x12, uint8, channels 3, half of them mirrored" in result.output
    assert "the run in out is complete" in result.output
    result = invoke(*wide, "--data", "set", "--uncond", "--channel-mult", "1,1,1,1", "--dry-run")
    assert result.exit_code == 1
    assert "does not fit the data" in result.output
    result = invoke(*wide, "--data", "set", *(option for option in more if option != "--xflip"))
    assert result.exit_code == 1
    assert "dataset.xflip: True -> None" in result.output


def test_only_the_demo_draws_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []
    monkeypatch.setattr(demo, "finish", lambda run_dir, device: finished.append((run_dir, device.type)))
    monkeypatch.setattr(loop, "train", lambda options, *args, **kwargs: options.duration)
    assert invoke("--device", "cpu").exit_code == 0
    assert finished == [(Path("runs/digits"), "cpu")]
    assert invoke("--device", "cpu", "--outdir", "elsewhere").exit_code == 0
    assert finished[1:] == [(Path("elsewhere"), "cpu")]
    assert invoke("--duration", "1Ki", "--device", "cpu").exit_code == 0
    assert len(finished) == 2


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    result = invoke("--device", "cpu")
    assert result.exit_code == 1
    assert "the same command continues from the latest training state" in result.output


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "fp32"),
        ({"avx2": True, "avx512_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_precision_auto(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    result = invoke("-n", "--device", "cpu", "--precision", "auto")
    assert re.search(rf"^precision +{expected}$", result.output, re.MULTILINE), result.output
    assert fastest_precision(torch.device("cuda:1")) == "fp16"
