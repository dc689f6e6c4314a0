"""The three golden networks: evaluation, loss, gradients and a six-step trajectory with both averages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from golden_network import FORWARD, GRADIENT, NETWORKS, TRAJECTORY, Golden, Replay, error, worst

from edm2ext import ops
from python_train.trainer import Trainer


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_evaluation(golden: Golden, backend: str, memory_format: torch.memory_format) -> None:
    net = golden.network().eval().requires_grad_(False)
    net.memory_format = memory_format
    D, logvar = net(golden["eval.x"], golden["eval.sigma"], golden.get("eval.labels"), return_logvar=True)
    assert D.dtype == logvar.dtype == torch.float32
    assert error(D, golden["eval.D"]) <= FORWARD
    assert error(logvar.flatten(), golden["eval.logvar"].flatten()) <= FORWARD
    if "eval.D_nolabel" in golden.tensors:
        assert error(net(golden["eval.x"], golden["eval.sigma"]), golden["eval.D_nolabel"]) <= FORWARD
    assert all(torch.equal(value, golden[f"state0.{key}"]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients(golden: Golden, backend: str, memory_format: torch.memory_format) -> None:
    """Layer by layer, as anyone's model would use them: forced normalisation in the forward, autograd's gradients."""
    net = golden.network()
    net.memory_format = memory_format
    loss = Replay(golden, golden.trainer())(net, golden["step0.images"], golden.get("step0.labels"))
    assert error(loss, golden["step0.loss_map"]) <= FORWARD
    (loss.sum() / golden.meta["batch"]).backward()
    assert worst({name: param.grad for name, param in net.named_parameters()}, golden.state("grad0")) <= GRADIENT


def run_trajectory(golden: Golden, trainer: Trainer) -> Iterator[int]:
    """Train on the golden images; yields the number of each step after it."""
    no_labels = torch.zeros([golden.meta["batch"], 0])
    steps = range(golden.meta["steps"])
    batches = iter([(golden[f"step{i}.images"], golden.tensors.get(f"step{i}.labels", no_labels)) for i in steps])
    for step in steps:
        trainer.step(batches)
        yield step


def check_averages(golden: Golden, trainer: Trainer) -> None:
    assert not trainer.nonfinite()
    for sigma_rel, profile in zip(golden.meta["ema_stds"], trainer.ema.profiles, strict=True):
        expected = golden.state(f"ema{sigma_rel:.3f}")
        averaged = dict(zip(trainer.names, profile, strict=True))
        assert worst(averaged, {name: expected[name] for name in trainer.names}) <= TRAJECTORY


def test_trajectory(golden: Golden, backend: str) -> None:
    """Six optimizer steps of the training loop's own step function."""
    trainer = golden.trainer()
    replay = trainer.loss = Replay(golden, trainer)
    for step in run_trajectory(golden, trainer):
        assert trainer.lr == pytest.approx(golden.meta["lrs"][step], rel=1e-12, abs=0)
        assert error(replay.maps[step], golden[f"step{step}.loss_map"]) <= TRAJECTORY
        if step == 0:
            assert worst(trainer.net.state_dict(), golden.state("state1")) <= FORWARD
    assert worst(trainer.net.state_dict(), golden.state("state6")) <= TRAJECTORY
    check_averages(golden, trainer)


def test_trajectory_normalised_in_the_step(golden: Golden, backend: str) -> None:
    """The same six steps with weights normalised by the optimizer's pass: the same losses, and the same weights but for
    that they are normalised already."""
    trainer = golden.trainer(force_normalize="step")
    replay = trainer.loss = Replay(golden, trainer)
    for step in run_trajectory(golden, trainer):
        assert error(replay.maps[step], golden[f"step{step}.loss_map"]) <= TRAJECTORY
    expected = golden.network()
    expected.load_state_dict(golden.state("state6"))
    ops.force_normalize_([layer.weight for layer in expected.prepared_weights().layers])
    assert worst(trainer.net.state_dict(), expected.state_dict()) <= TRAJECTORY
    check_averages(golden, trainer)
