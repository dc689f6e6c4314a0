"""The three golden networks: evaluation, loss, gradients and a six-step trajectory with both averages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from python_train.config import TrainOptions
from python_train.loop import Trainer
from python_train.network import Precond

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = ("cond", "uncond", "latent")
FORWARD, GRADIENT, TRAJECTORY = 1e-5, 1e-4, 1e-3


class Golden:
    """One golden file: its metadata, its tensors, and the network it starts from."""

    def __init__(self, name: str) -> None:
        path = GOLDEN / f"train_{name}.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            self.meta: dict[str, Any] = json.loads(file.metadata()["meta"])
        self.tensors = safetensors.torch.load_file(path)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def get(self, key: str) -> Tensor | None:
        return self.tensors.get(key)

    def state(self, prefix: str) -> dict[str, Tensor]:
        prefix += "."
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def network(self) -> Precond:
        net = Precond(**self.meta["config"], use_fp16=self.meta["use_fp16"])
        net.load_state_dict(self.state("state0"))
        return net

    def trainer(self) -> Trainer:
        lr = self.meta["lr"]
        options = TrainOptions(
            P_mean=self.meta["P_mean"],
            P_std=self.meta["P_std"],
            batch=self.meta["batch"],
            lr=lr["ref_lr"],
            decay=lr["ref_batches"],
            rampup=round(lr["rampup_Mimg"] * 1e6),
            sigma_rels=tuple(self.meta["ema_stds"]),
            precision="fp32",
        )
        return Trainer(self.network(), options, encoder=Identity())


class Identity:
    """The golden images are in the network's domain already."""

    def encode(self, stored: Tensor) -> Tensor:
        return stored


class Replay:
    """Stands in for the loss's random draws: the golden numbers of each step, and a record of the loss maps."""

    def __init__(self, golden: Golden, trainer: Trainer) -> None:
        self.golden, self.loss, self.step = golden, trainer.loss, 0
        self.maps: list[Tensor] = []

    def __call__(self, net: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        key = f"step{self.step}"
        sigma = self.loss.sigma(self.golden[f"{key}.rnd_normal"])
        loss = self.loss.at(net, images, labels, sigma, self.golden[f"{key}.noise"])
        self.maps.append(loss.detach())
        self.step += 1
        return loss


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    actual, expected = actual.detach().double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of any tensor, the scalar gains counting as one vector.

    (A gain's gradient is a sum that may cancel: one golden value is itself 4e-4 away from the result in fp64.)
    """
    assert actual.keys() == expected.keys()
    gains = [key for key in expected if expected[key].ndim == 0]
    together = error(*(torch.stack([values[key].detach() for key in gains]) for values in (actual, expected)))
    return max(together, *(error(actual[key], expected[key]) for key in expected if key not in gains))


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
