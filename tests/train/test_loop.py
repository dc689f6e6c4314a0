"""The training loop: learning rate, accumulation, non-finite gradients, cadence, and resuming bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import TINY, command, environment, final_files, run, same
from torch import Tensor

from edm2ext import ops
from python_train import UserError, checkpoint, data, loop, noise_levels
from python_train.loop import stop_point
from python_train.loss import EDM2Loss
from python_train.network import Precond
from python_train.run_dir import RunDir
from python_train.stop import Stopped, StopRequest
from python_train.trainer import Trainer, learning_rate
from python_train.world import World, open_world


def trainer(**overrides: object) -> Trainer:
    options = dataclasses.replace(TINY, **overrides)
    torch.manual_seed(0)
    return Trainer(loop.build_network(options, 8, 1, 10), options)


def random_batches(batch: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        images = torch.randint(0, 256, [batch, 1, 8, 8], dtype=torch.uint8, generator=generator)
        yield images, torch.eye(10)[torch.randint(0, 10, [batch], generator=generator)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    torch.set_num_threads(1)
    outdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(TINY, outdir) == 4096
    return final_files(outdir)


# ------------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("nimg", "decay", "expected"),
    [
        (0, 70000, 0),
        (2048, 70000, 2.048e-6),
        (2**20, 70000, 0.001048576),
        (5_000_000, 70000, 0.005),
        (10_000_000, 70000, 0.01),
        (143_360_000, 70000, 0.01),
        (573_440_000, 70000, 0.005),
        (2**31, 70000, 0.00258374151),
        (2**31, 35000, 0.00182698115),
    ],
)
def test_learning_rate(nimg: int, decay: float, expected: float) -> None:
    assert learning_rate(nimg, 2048, 0.01, decay, 10_000_000) == pytest.approx(expected, rel=1e-8)


def test_learning_rate_switches() -> None:
    assert learning_rate(0, 2048, 0.01, 70000, 0) == 0.01
    assert learning_rate(2**40, 2048, 0.01, 0, 10_000_000) == 0.01


# ------------------------------------------------------------------------------------------------------- optimizer step


def test_first_step_has_rate_zero_but_moves_the_moments() -> None:
    t = trainer()
    t.step(random_batches(64))
    assert (t.lr, t.nimg) == (0.0, 64)
    norms = t.net.unet.emb_noise.weight.square().mean(dim=1).sqrt()
    torch.testing.assert_close(norms, torch.full_like(norms, 0.9999), rtol=0, atol=1e-4)
    assert any(state["exp_avg"].any() for state in t.optimizer.state.values())
    for profile in t.ema.profiles:  # beta = 0 in the first step: the initial weights vanish
        assert all(torch.equal(ema, param) for ema, param in zip(profile, t.params, strict=True))


def test_accumulation_is_the_same_mathematics() -> None:
    """With the random numbers out of the way, rounds of 16 give the gradient of a batch of 64."""

    class NoNoise:
        def backward(self, net: torch.nn.Module, images: Tensor, labels: Tensor, scale: float) -> Tensor:
            sigma = torch.linspace(0.5, 1.0, 10)[labels.argmax(dim=1)].reshape(-1, 1, 1, 1)
            return EDM2Loss().backward_at(net, images, labels, sigma, images, scale)

    images, labels = next(random_batches(64))
    moments = []
    for batch_gpu in (None, 16):
        t = trainer(batch_gpu=batch_gpu, dropout=0.0, seed=1)
        t.net.unet.out_gain.data.fill_(1)
        t.loss = NoNoise()
        t.step(iter(zip(images.split(t.micro_batch), labels.split(t.micro_batch), strict=True)))
        moments.append([state["exp_avg"] for state in t.optimizer.state.values()])
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_nonfinite_gradients() -> None:
    t = trainer()
    stream = random_batches(64)
    t.step(stream)
    target = t.net.unet.enc["8x8_block0"].conv_res1.weight
    spoiled = torch.zeros_like(target)
    spoiled.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    target.register_hook(lambda grad: grad + spoiled)
    t.step(stream)
    t.step(stream)
    assert t.nonfinite() == {"unet.enc.8x8_block0.conv_res1.weight": 6}
    assert all(param.isfinite().all() for param in t.params)
    again = trainer()
    again.load_state_dict(t.state_dict())
    assert again.nonfinite() == t.nonfinite()


def test_huge_gradients_are_finite() -> None:
    t = trainer()
    t.net.unet.out_conv.weight.register_hook(lambda grad: torch.full_like(grad, 1e30))
    t.step(random_batches(64))
    assert not t.nonfinite()


def test_normalised_in_the_step_means_the_same() -> None:
    """Weights are normalised after each step instead of before each forward pass: the same losses, and the same network
    once both are normalised."""
    trainers = [trainer(force_normalize=mode, batch_gpu=32, rampup=0, dropout=0.0) for mode in ("forward", "step")]
    losses = []
    for t in trainers:
        stream = random_batches(32)
        for _ in range(4):
            t.step(stream)
            losses.append(t.mean_loss())
        ops.force_normalize_([layer.weight for layer in t.prepared.layers])
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)
    for a, b in zip(trainers[0].params, trainers[1].params, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_mean_loss_ignores_nonfinite_samples() -> None:
    t = trainer()
    assert math.isnan(t.mean_loss())
    t.step(random_batches(64))
    first = t.mean_loss()
    assert 0.1 < first < 10
    assert math.isnan(t.mean_loss())
    t.net.logvar_linear.weight.data.fill_(math.nan)
    t.step(random_batches(64))
    assert math.isnan(t.mean_loss())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_train(precision: str) -> None:
    t = trainer(precision=precision, lr=0.02, rampup=0, dropout=0.0)
    digits = data.open_dataset()
    digits.preload()
    t.encoder = digits.encoder()
    stream = data.batches(digits, 64, data.IndexStream(digits.num_images, 0), torch.device("cpu"))
    losses = []
    for _ in range(30):
        t.step(stream)
        losses.append(t.mean_loss())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_loss_scaling_is_divided_out() -> None:
    """By a power of two, exactly. A dynamic scale goes down where gradients overflow."""
    moments = []
    for scaling in (1.0, 1024.0, "dynamic"):
        t = trainer(loss_scaling=scaling, dropout=0.0)
        stream = random_batches(64)
        for _ in range(3):
            t.step(stream)
        moments.append([state["exp_avg"] for state in t.optimizer.state.values()])
    assert t.loss_scale.scale == 1
    for scaled in moments[1:]:
        for a, b in zip(moments[0], scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    t.net.unet.out_conv.weight.register_hook(lambda grad: torch.full_like(grad, math.inf))
    t.step(stream)
    assert t.loss_scale.scale == 0.5
    again = trainer(loss_scaling="dynamic", dropout=0.0)
    again.load_state_dict(t.state_dict())
    assert again.loss_scale.scale == 0.5
    assert trainer(loss_scaling=0.25).loss_scale.scale == 0.25
    with pytest.raises(UserError, match="loss_scaling must be 'dynamic' or between 2\\^-24 and"):
        dataclasses.replace(TINY, loss_scaling=0.0).validate()


def test_small_gradients_survive_float16_with_a_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 on the CPU, in plain torch: gradients too small for it vanish, unless they are scaled."""
    monkeypatch.setattr(Precond, "_dtype_on", lambda self, device: self.compute_dtype)
    found = []
    for precision, scaling in (("fp32", 1.0), ("fp16", 1.0), ("fp16", 2.0**14)):
        t = trainer(precision=precision, loss_scaling=scaling, dropout=0.0)
        backward_at = t.loss.backward_at
        t.loss.backward_at = lambda *args, backward_at=backward_at: backward_at(*args[:-1], args[-1] * 2**-14)
        t.step(random_batches(64))
        moments = [state["exp_avg"].flatten() for state in t.optimizer.state.values()]
        found.append(torch.cat(moments))
        assert not t.nonfinite()
    exact = found[0]
    errors = [float((x - exact).norm() / exact.norm()) for x in found[1:]]
    assert errors[0] > 3 * errors[1], errors
    assert errors[1] < 0.02


def test_world_of_one() -> None:
    world = World()
    assert world.sum(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    world.check_equal(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="device 'tpu' cannot be used here"), open_world("tpu"):
        pass


# -------------------------------------------------------------------------------------------------------------- cadence


def test_run_directory(uninterrupted: dict[str, object], tmp_path: Path) -> None:
    assert list(uninterrupted["snapshots"]) == [
        f"network-snapshot-{kimg:07d}-{sigma_rel}.safetensors" for kimg in (0, 2, 4) for sigma_rel in ("0.050", "0.100")
    ]
    stats = uninterrupted["stats"]
    assert [kimg for kimg, _, _ in stats] == [512 * i / 1000 for i in range(1, 9)]
    assert stats[-1][1] < stats[0][1]
    assert stats[0][2] == pytest.approx(learning_rate(512 - 64, 64, 0.01, 20, 1000), rel=1e-4)
    options = uninterrupted["options"]
    assert options["options"]["lr"] == 0.01
    assert options["dataset"]["name"] == "digits"


def test_status_and_checkpoint_files(tmp_path: Path) -> None:
    outdir = tmp_path / "a" / "b"
    assert run(dataclasses.replace(TINY, duration=1152, snapshot=0), outdir) == 1152
    assert sorted(path.name for path in outdir.iterdir()) == [
        "log.txt",
        "options.json",
        "stats.jsonl",
        "training-state-0000001.pt",
    ]
    first, *_, last = [json.loads(line) for line in (outdir / "stats.jsonl").read_text().splitlines()]
    kinds = ("activations_max", "activations_mean", "weights_max", "weights_mean", "clipped")
    assert {key for key in first if key.startswith("Magnitude/")} == {
        f"Magnitude/{bucket}/{kind}" for bucket in ("Enc 8", "Enc 4", "Dec 4", "Dec 8") for kind in kinds
    }
    levels = [f"{sigma:.3g}" for sigma in noise_levels.training_levels(TINY.P_mean, TINY.P_std)]
    assert {key for key in first if key.startswith("Noise/")} == {
        f"Noise/{level}/{kind}" for level in levels for kind in ("error", "expected")
    }
    assert {key for key in first if not key.startswith(("Magnitude/", "Noise/"))} == {
        "Loss/loss",
        "Loss/learning_rate",
        "Loss/effective_learning_rate",
        "Loss/nonfinite_gradients",
        "Progress/kimg",
        "Timing/total_sec",
        "Timing/sec_per_tick",
        "Timing/sec_per_kimg",
        "Timing/maintenance_sec",
        "Resources/cpu_mem_gb",
        "Resources/peak_gpu_mem_gb",
        "Resources/peak_gpu_mem_reserved_gb",
        "timestamp",
    }
    assert math.isnan(first["Loss/loss"])
    assert last["Progress/kimg"] == 1.152
    assert last["Resources/cpu_mem_gb"] > 0.05
    log = (outdir / "log.txt").read_text()
    assert "kimg 1.2" in log
    before = (outdir / "stats.jsonl").read_text()
    assert run(dataclasses.replace(TINY, duration=1152, snapshot=0), outdir) == 1152  # complete: changes nothing
    assert (outdir / "stats.jsonl").read_text() == before
    assert "complete at 1,152 images" in (outdir / "log.txt").read_text()


def test_nonfinite_warning_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward_at = EDM2Loss.backward_at
    monkeypatch.setattr(EDM2Loss, "backward_at", lambda self, *args: backward_at(self, *args[:-1], math.inf))
    run(dataclasses.replace(TINY, duration=1024, checkpoint=0, snapshot=0), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "WARNING: gradient values that were not finite since 0 images, counted as 0: unet.emb_noise.weight (" in log


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    run(dataclasses.replace(TINY, checkpoint=1024, duration=5 * 1024, snapshot=0, status=0), tmp_path / "run")
    assert [path.name for path in checkpoint.list_states(tmp_path / "run")] == [
        f"training-state-{kimg:07d}.pt" for kimg in (5, 4, 3)
    ]


def test_stop_point() -> None:
    options = dataclasses.replace(TINY, slice=2560)
    assert stop_point(options, 0) == 2048
    assert stop_point(options, 2048) == 4096
    assert stop_point(dataclasses.replace(options, checkpoint=0), 0) == 2048
    assert stop_point(dataclasses.replace(options, checkpoint=0, snapshot=0), 0) == 2560
    assert stop_point(TINY, 1024) == 4096
    with pytest.raises(UserError, match="no progress"):
        stop_point(dataclasses.replace(options, slice=512), 0)


# --------------------------------------------------------------------------------------------------------------- resume


def test_slices_are_bit_exact(uninterrupted: dict[str, object], tmp_path: Path) -> None:
    sliced = dataclasses.replace(TINY, slice=2048)
    assert run(sliced, tmp_path / "run") == 2048
    assert run(sliced, tmp_path / "run") == 4096
    files = final_files(tmp_path / "run")
    assert files["options"]["options"]["slice"] == 2048
    for key in ("state", "snapshots", "stats"):
        assert same(files[key], uninterrupted[key]), key


def test_a_slice_is_saved_without_checkpoints(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, checkpoint=0, slice=2048, status=0)
    assert run(options, tmp_path / "run") == 2048
    assert run(options, tmp_path / "run") == 4096
    assert [path.name for path in checkpoint.list_states(tmp_path / "run")] == ["training-state-0000002.pt"]
    with pytest.raises(UserError, match="slice 512 is shorter than the snapshot interval 2048"):
        stop_point(dataclasses.replace(options, slice=512), 0)


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, nimg: int) -> None:
    """Make the training step of image ``nimg`` fail."""
    step = Trainer.step

    def crashing(self: Trainer, batches: object) -> None:
        if self.nimg == nimg:
            raise Crash
        step(self, batches)

    monkeypatch.setattr(Trainer, "step", crashing)


@pytest.mark.parametrize("changed", [{}, {"batch_gpu": 32}, {"force_normalize": "step"}])
def test_crash_and_resume_is_bit_exact(
    uninterrupted: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    options, expected = TINY, uninterrupted
    if changed:
        options = dataclasses.replace(TINY, **changed, duration=2048)
        run(options, tmp_path / "whole")
        expected = final_files(tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(patch, options.duration - 640)
        with pytest.raises(Crash):
            run(options, tmp_path / "run")
    assert run(options, tmp_path / "run") == options.duration
    assert same(final_files(tmp_path / "run"), expected)


def test_changed_options_are_refused(tmp_path: Path) -> None:
    short = dataclasses.replace(TINY, duration=1024, snapshot=0)
    outdir = tmp_path / "run"
    run(short, outdir)
    before = {path.name: path.read_bytes() for path in outdir.iterdir() if path.name != "log.txt"}
    changed = dataclasses.replace(short, lr=0.02, model_channels=16)
    with pytest.raises(UserError) as refused:
        run(changed, outdir)
    for line in ("options.lr: 0.01 -> 0.02", "options.model_channels: 8 -> 16", "network.model_channels", "--override"):
        assert line in str(refused.value)
    assert {path.name: path.read_bytes() for path in outdir.iterdir() if path.name != "log.txt"} == before
    with pytest.raises(UserError, match=r"does not fit this network \(Error.* and \d+ more\); choose"):
        run(changed, outdir, override=True)
    assert {path.name: path.read_bytes() for path in outdir.iterdir() if path.name != "log.txt"} == before
    assert run(dataclasses.replace(short, lr=0.02, duration=2048), outdir, override=True) == 2048
    assert json.loads((outdir / "options.json").read_text())["options"]["lr"] == 0.02
    free = dataclasses.replace(short, lr=0.02, duration=3072, status=256, snapshot=1024, checkpoint=3072, slice=3072)
    assert run(free, outdir) == 3072


def test_another_micro_batch_continues_when_asked_for(tmp_path: Path) -> None:
    outdir = tmp_path / "run"
    whole = dataclasses.replace(TINY, duration=1024, snapshot=0, status=0)
    run(whole, outdir)
    halves = dataclasses.replace(whole, duration=2048, batch_gpu=32)
    with pytest.raises(UserError, match=r"options\.batch_gpu: None -> 32"):
        run(halves, outdir)
    assert run(halves, outdir, override=True) == 2048
    assert "options have changed, so the run will not be, bit for bit, what either would have made of it: options." \
           "batch_gpu: None -> 32" in (outdir / "log.txt").read_text()  # fmt: skip
    assert run(dataclasses.replace(halves, duration=3072), outdir) == 3072
    run(dataclasses.replace(whole, duration=2048), tmp_path / "other")
    states = [checkpoint.load_state(folder / "training-state-0000002.pt") for folder in (outdir, tmp_path / "other")]
    for a, b in zip(*(state["net"].values() for state in states), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.5)  # the same mathematics on other random numbers
    assert not same(states[0]["net"], states[1]["net"])


def test_foreign_and_unwritable_directories(tmp_path: Path) -> None:
    description = {"options": {}}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunDir(tmp_path, description)
    with pytest.raises(UserError, match="is not a directory"):
        RunDir(tmp_path / "notes.txt", description)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(OSError, match="/proc/nowhere"):
        RunDir(Path("/proc/nowhere"), description)
    first = RunDir(tmp_path / "run", description)
    with pytest.raises(UserError, match="another process is training"):
        RunDir(tmp_path / "run", description)
    first.close()
    (tmp_path / "run" / ".training-state-0000001.pt.123.tmp").touch()
    RunDir(tmp_path / "run", description).close()
    assert sorted(os.listdir(tmp_path / "run")) == ["log.txt", "options.json"]
    (tmp_path / "run" / "options.json").write_text("{")
    with pytest.raises(UserError, match=r"options\.json is damaged"):
        RunDir(tmp_path / "run", description)


def test_data_that_changed_is_refused(tmp_path: Path) -> None:
    one = dataclasses.replace(TINY, duration=1024)
    run(one, tmp_path / "run")
    with pytest.raises(UserError, match=r"dataset\.label_dim: 10 -> 0"):
        run(dataclasses.replace(one, cond=False), tmp_path / "run")


# --------------------------------------------------------------------------------------------------- separate processes


def test_two_processes(tmp_path: Path) -> None:
    """Two gloo processes under torchrun train in step, write once, and resume bit-exactly. Where the first is refused,
    the second does not wait for it until it is killed."""

    def launch(*more: str) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        arguments = [*command(tmp_path / "run")[1:], "--batch-gpu", "16", "--duration", "2Ki", *more]
        return subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True)

    def torchrun() -> dict[str, object]:
        done = launch()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr, done.stderr
        return final_files(tmp_path / "run")

    whole = torchrun()
    assert whole["options"]["processes"] == 2
    assert whole["stats"][-1][1] < whole["stats"][0][1]
    checkpoint.list_states(tmp_path / "run")[0].unlink()
    assert same(torchrun(), whole)
    refused = launch("--lr", "0.3")
    assert refused.returncode != 0
    assert refused.stderr.count("options.lr: 0.01 -> 0.3") == 1
    assert "Signal 9" not in refused.stderr


_WORLD_THAT_ENDS = """
import sys
from pathlib import Path
from python_train import config, data, loop, world

options = config.make_options("digits", model_channels=8, num_blocks=1, batch=32, duration=64)
with world.open_world("cpu") as processes:
    loop.train(options, data.open_dataset(options.data), sys.argv[1], processes)
names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
sys.exit(" ".join(name for name in names if "gloo" in name) or None)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists the threads of a process by /proc")
def test_no_thread_of_the_process_group_is_left(tmp_path: Path) -> None:
    """One that is alive when the interpreter ends may abort the process."""
    (tmp_path / "script.py").write_text(_WORLD_THAT_ENDS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "run")]
    done = subprocess.run([*launch, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_the_state_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    handler = signal.getsignal(number)
    options = dataclasses.replace(TINY, duration=1024, checkpoint=0, snapshot=0)
    with monkeypatch.context() as patch:
        step = Trainer.step

        def signalled(self: Trainer, batches: object) -> None:
            if self.nimg == 320:
                os.kill(os.getpid(), number)
            step(self, batches)

        patch.setattr(Trainer, "step", signalled)
        name = signal.Signals(number).name
        with pytest.raises(Stopped, match=rf"asked to stop \({name}\): 384 images are done and saved"):
            run(options, tmp_path / "run")
    assert signal.getsignal(number) == handler
    assert [path.name for path in checkpoint.list_states(tmp_path / "run")] == [checkpoint.state_name(384)]
    run(dataclasses.replace(options, checkpoint=1024), tmp_path / "run")
    run(dataclasses.replace(options, checkpoint=1024), tmp_path / "whole")
    resumed, whole = (final_files(tmp_path / name)["state"] for name in ("run", "whole"))
    assert same(resumed, whole)


def test_a_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with StopRequest(World()) as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.agreed()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
