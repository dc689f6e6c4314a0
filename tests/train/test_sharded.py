"""FSDP2: several processes that share the parameters out compute what one does, and their states load in any number."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_parallel import BATCH, STEPS, Stored, processes, relative_error
from torch import Tensor

from edm2ext import reference, tune
from edm2ext.phema import PowerEMA
from python_train import UserError, checkpoint, config, data, loop, run, sharded_state
from python_train.config import make_options
from python_train.loop import build_network
from python_train.trainer import Trainer
from python_train.world import World

SAVED_AFTER = 3
CHOICES = {"forward 8x64x64 192->192 3x3 float16": "torch"}  # of edm2ext.tune


def make_trainer(world: World, **overrides: object) -> Trainer:
    options = make_options(
        "digits",
        model_channels=16,
        batch=BATCH,
        duration=BATCH * STEPS,
        rampup=0,
        lr=0.01,
        force_normalize="step",
        loss_scaling="dynamic",
        **overrides,
    )
    torch.manual_seed(world.rank)  # rank 0's weights are broadcast
    net = build_network(options, 8, 1, 10)
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    trainer = Trainer(net, options, world=world)
    trainer.loss = Stored(options, world)
    return trainer


def batches(world: World):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, [BATCH, 1, 8, 8], dtype=torch.uint8, generator=generator)
    labels = torch.eye(10)[torch.randint(0, 10, [BATCH], generator=generator)]
    while True:
        yield images.chunk(world.size)[world.rank], labels.chunk(world.size)[world.rank]


def raw_gradients(trainer: Trainer) -> list[Tensor]:
    """The gradients of raw weights and gains, of those of effective weights that one process accumulates (2.6)."""
    found = {}
    for weight in trainer.optimizer.weights:
        gain = trainer.optimizer.gains.get(weight)
        inputs = [x.detach().requires_grad_() for x in (weight, gain) if x is not None]
        effective = reference.effective_weight(inputs[0], inputs[1] if len(inputs) > 1 else 1, weight.dtype)
        grads = torch.autograd.grad(effective, inputs, weight.grad)
        found |= dict(zip((weight, gain), grads, strict=False))
    return [found[param] for param in trainer.params]


def train(trainer: Trainer, steps: int, folder: Path | None = None) -> dict[str, list]:
    """Whole gradients of each step, and whole weights and averages after them; on rank 0. The state after `SAVED_AFTER`
    steps is written to ``folder`` during those that follow."""
    grads: list[list[Tensor]] = []
    step = trainer.optimizer.step

    def recording(weights: list[float]) -> None:
        if trainer.shards is None:
            grads.append(raw_gradients(trainer))
        else:
            grads.append(trainer.whole([param.grad for param in trainer.params]))
        step(weights)

    trainer.optimizer.step = recording
    stream = batches(trainer.world)
    for count in range(1, steps + 1):
        trainer.step(stream)
        if folder is not None and count == SAVED_AFTER:
            tune.load(CHOICES)
            group = torch.distributed.new_group(backend="gloo")
            complete = sharded_state.begin_save(folder, trainer, 7.5, "run", group)
    if folder is not None:
        complete()
    trainer.optimizer.step = step
    trainer.world.check_equal(trainer.net)
    return {
        "losses": trainer.loss.means,
        "grads": grads,
        "weights": [x.detach().clone() for x in trainer.whole()],
        "averages": [trainer.whole(profile) for profile in trainer.ema.profiles],
    }


def resume(world: World, folder: Path) -> dict[str, list]:
    """The steps after the saved ones, in another number of processes."""
    trainer = make_trainer(world, parallel="fsdp")
    assert sharded_state.load(folder, trainer) == 7.5
    assert trainer.nimg == SAVED_AFTER * BATCH
    assert trainer.loss_scale.good_steps == SAVED_AFTER
    assert tune.choices() == CHOICES
    for _ in range(SAVED_AFTER):
        next(trainer.loss.draws)
    return train(trainer, STEPS - SAVED_AFTER)


def take(trainer: Trainer, state: dict) -> None:
    """A state that one process has saved is shared out."""
    trainer.load_state_dict(state)
    moments = [trainer.optimizer.state[param]["exp_avg"] for param in trainer.params]
    got = [trainer.whole(parts) for parts in (trainer.params, moments, *trainer.ema.profiles)]
    expected = [[state["net"][name] for name in trainer.names]]
    expected.append([state["optimizer"]["state"][i]["exp_avg"] for i in range(len(trainer.params))])
    for a, b in zip(got, expected + state["ema"]["profiles"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=trainer.world.rank == 0))
    assert trainer.nimg == state["nimg"] == STEPS * BATCH
    assert trainer.loss_scale.good_steps == STEPS
    state["ema"]["sigma_rels"] = [0.07]
    with pytest.raises(ValueError, match=r"averages of \[0\.07\]"):
        trainer.load_state_dict(state)


def _process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
    world, state = World(rank, size), Path(folder) / "training-state-0000036.dcp"
    trainer = make_trainer(world, parallel="fsdp", recompute=size == 3)
    mine = [param.shape[0] for param in trainer.params if param.dim()]
    assert (min(mine) == 0) == (rank > 0)  # u(sigma) has one row
    found = train(trainer, STEPS, state if size == 2 else None)
    if size == 3:
        found["resumed"] = resume(world, state)
    trainer.loss_scale.update(torch.tensor(rank == size - 1))
    assert trainer.loss_scale.scale == 0.5  # where the gradients overflowed, and where they did not
    net = trainer.whole_net()
    if rank == 0:
        assert type(net.unet.out_conv.weight.detach()) is Tensor
        same = zip(net.parameters(), found["weights"], strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    if size == 2:
        take(trainer, torch.load(f"{folder}/whole.pt"))
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


def assert_same_run(got: list[dict[str, list]], expected: dict[str, list]) -> None:
    losses = torch.tensor([rank["losses"] for rank in got]).mean(dim=0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
    for a, b in zip(got[0]["grads"], expected["grads"], strict=True):
        assert relative_error(a, b) <= 1e-5
    assert relative_error(got[0]["weights"], expected["weights"]) <= 1e-4
    for a, b in zip(got[0]["averages"], expected["averages"], strict=True):
        assert relative_error(a, b) <= 1e-4


def test_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Two and three, the latter recomputing activations; and both go on where two of them stopped."""
    trainer = make_trainer(World())
    alone = train(trainer, STEPS)
    torch.save(trainer.state_dict(), tmp_path / "whole.pt")
    for size in (2, 3):
        processes(_process, size, str(tmp_path))
    ranks = {size: [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)] for size in (2, 3)}
    for size in (2, 3):
        assert_same_run(ranks[size], alone)
    rest = {key: alone[key][SAVED_AFTER:] if key in ("losses", "grads") else alone[key] for key in alone}
    assert_same_run([rank["resumed"] for rank in ranks[3]], rest)
    folder = tmp_path / "training-state-0000036.dcp"
    assert_same_run([resume(World(), folder)], rest)
    assert checkpoint.list_states(tmp_path) == [folder]
    assert not list(tmp_path.glob(".*.tmp"))

    sharded_state.check(folder)
    trainer = make_trainer(World())
    trainer.ema = PowerEMA(trainer.params, (0.07,))
    with pytest.raises(ValueError, match=r"ema-0\.07"):
        sharded_state.load(folder, trainer)
    part = next(folder.glob("__1_*"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=f"{part.name} does not match its checksum"):
        sharded_state.check(folder)
    part.unlink()
    with pytest.raises(UserError, match="is damaged"):
        sharded_state.check(folder)


LOOP = make_options(
    "digits",
    model_channels=8,
    batch=512,
    duration=2048,
    force_normalize="step",
    status=1024,
    snapshot=2048,
    checkpoint=1024,
)


def _loop(rank: int, size: int, folder: str, store: str, parallel: str, duration: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    options = dataclasses.replace(LOOP, parallel=parallel, duration=duration)
    with contextlib.redirect_stdout(None):
        loop.train(options, data.open_dataset(options.data, options.cond), folder, World(rank, size))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_run_is_shared_out_and_continued_otherwise(tmp_path: Path) -> None:
    """As if it had been trained without; each kind of training state is continued from by the other."""
    runs = tmp_path / "fsdp", tmp_path / "ddp"
    for folder, first in zip(runs, ("fsdp", "ddp"), strict=True):
        for part, parallel in enumerate((first, "ddp" if first == "fsdp" else "fsdp")):
            processes(_loop, 2, str(folder), str(tmp_path / f"{first}{part}"), parallel, 2048 + 1024 * part)
    (shared, other) = (
        [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()] for folder in runs
    )
    for a, b in zip(shared, other, strict=True):
        assert a["Progress/kimg"] == b["Progress/kimg"]
        for key in a.keys() & {key for key in b if key.startswith(("Loss/", "Magnitude/"))}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, nan_ok=True), key
    assert [path.suffix for path in checkpoint.list_states(runs[0])] == [".pt", ".dcp", ".dcp"]
    assert [path.suffix for path in checkpoint.list_states(runs[1])] == [".dcp", ".pt", ".pt"]
    names = sorted(path.name for path in runs[0].glob("*.safetensors"))
    assert len(names) == 4
    for name in names:
        a, b = (checkpoint.read_tensors(folder / name) for folder in runs)
        for key in a:
            torch.testing.assert_close(a[key].float(), b[key].float(), rtol=1e-2, atol=1e-2)


def test_forced_normalisation_in_the_forward_is_refused() -> None:
    with pytest.raises(UserError, match="lost"):
        make_options("digits", parallel="fsdp").validate()
    make_options("digits", parallel="fsdp", force_normalize="step").validate()
    result = CliRunner().invoke(run.main, ["--dry-run", "--parallel", "fsdp", "--device", "cpu"])
    assert result.exit_code == 1
    assert "parallel fsdp needs force-normalize step" in result.output


def test_a_run_may_change_how_it_is_shared_out() -> None:
    old = {"options": {"lr": 0.01}}
    assert config.differences(old, {"options": make_options("digits", lr=0.01, parallel="fsdp").to_json()}) != []
    new = make_options("digits", parallel="fsdp", recompute=True, cuda_graph=True).to_json()
    assert config.differences(make_options("digits").to_json(), new) == []
