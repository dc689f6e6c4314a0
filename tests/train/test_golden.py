"""The three golden networks: evaluation, loss, gradients and a six-step trajectory with both averages."""

from __future__ import annotations

import pytest
import torch
from golden_network import FORWARD, GRADIENT, NETWORKS, TRAJECTORY, Golden, Replay, error, worst
from torch import Tensor

from edm2ext import ops
from edm2ext.optim import FusedAdam
from edm2ext.phema import power_beta


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
    trainer = golden.trainer()
    net = trainer.net
    net.memory_format = memory_format
    loss = Replay(golden, trainer)(net, golden["step0.images"], golden.get("step0.labels"))
    assert error(loss, golden["step0.loss_map"]) <= FORWARD
    (loss.sum() / golden.meta["batch"]).backward()
    assert worst({name: param.grad for name, param in net.named_parameters()}, golden.state("grad0")) <= GRADIENT


def test_trajectory(golden: Golden, backend: str) -> None:
    """Six optimizer steps of the training loop's own step function."""
    trainer = golden.trainer()
    replay = trainer.loss = Replay(golden, trainer)
    no_labels = torch.zeros([golden.meta["batch"], 0])
    steps = range(golden.meta["steps"])
    batches = iter([(golden[f"step{i}.images"], golden.tensors.get(f"step{i}.labels", no_labels)) for i in steps])
    for step in steps:
        trainer.step(batches)
        assert trainer.lr == pytest.approx(golden.meta["lrs"][step], rel=1e-12, abs=0)
        assert error(replay.maps[step], golden[f"step{step}.loss_map"]) <= TRAJECTORY
        if step == 0:
            assert worst(trainer.net.state_dict(), golden.state("state1")) <= FORWARD
    assert worst(trainer.net.state_dict(), golden.state("state6")) <= TRAJECTORY
    for sigma_rel, profile in zip(golden.meta["ema_stds"], trainer.ema.profiles, strict=True):
        expected = golden.state(f"ema{sigma_rel:.3f}")
        averaged = dict(zip(trainer.names, profile, strict=True))
        assert worst(averaged, {name: expected[name] for name in trainer.names}) <= TRAJECTORY


def test_trajectory_with_fused_adam(golden: Golden, backend: str) -> None:
    """The same six steps in one pass each, weights normalised after the step, gradients those of effective weights."""
    trainer = golden.trainer()
    net, replay, batch = trainer.net, Replay(golden, trainer), golden.meta["batch"]
    prepared = net.prepared_weights(gradients="effective")
    prepared.refresh(force=True)
    gains = {layer.weight: g for layer, g in zip(prepared.layers, prepared.gains, strict=True) if isinstance(g, Tensor)}
    effective = {layer.weight: e for layer, e in zip(prepared.layers, prepared.effective, strict=True)}
    optimizer = FusedAdam(
        net, 0.0, gains=gains, gradients="effective", ema=trainer.ema, force_normalize=True, prepared=effective
    )
    optimizer.prepare()
    for step in range(golden.meta["steps"]):
        with prepared:
            loss = replay(net, golden[f"step{step}.images"], golden.get(f"step{step}.labels"))
            (loss.sum() / batch).backward()
        assert error(loss, golden[f"step{step}.loss_map"]) <= TRAJECTORY
        optimizer.param_groups[0]["lr"] = golden.meta["lrs"][step]
        optimizer.step((1 - power_beta((step + 1) * batch, batch, trainer.ema.sigma_rels)).tolist())
        optimizer.zero_grad()
    assert optimizer.nonfinite.sum() == 0
    expected = golden.network()
    expected.load_state_dict(golden.state("state6"))
    for other in (net, expected):
        ops.force_normalize_([layer.weight for layer in other.prepared_weights().layers])
    assert worst(net.state_dict(), expected.state_dict()) <= TRAJECTORY
    for sigma_rel, profile in zip(golden.meta["ema_stds"], trainer.ema.profiles, strict=True):
        averages = golden.state(f"ema{sigma_rel:.3f}")
        averaged = dict(zip(trainer.names, profile, strict=True))
        assert worst(averaged, {name: averages[name] for name in trainer.names}) <= TRAJECTORY
