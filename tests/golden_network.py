"""The golden networks: a file's numbers, the network and trainer it starts from, and how far off a result is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from python_train.config import TrainOptions
from python_train.network import Precond
from python_train.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"
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

    def trainer(self, device: torch.device | str = "cpu", force_normalize: str = "forward") -> Trainer:
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
            force_normalize=force_normalize,
        )
        return Trainer(self.network().to(device), options, encoder=Identity())


class Identity:
    """The golden images are in the network's domain already."""

    def encode(self, stored: Tensor) -> Tensor:
        return stored


class Replay:
    """Stands in for the loss's random draws: the golden numbers of each step, and a record of the loss maps."""

    def __init__(self, golden: Golden, trainer: Trainer) -> None:
        self.golden, self.net, self.loss, self.step = golden, trainer.net, trainer.loss, 0
        self.maps: list[Tensor] = []

    def __call__(self, net: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss.at(net, images, labels, *self._draw())
        self.maps.append(loss.detach())
        self.step += 1
        return loss

    def backward(self, net: torch.nn.Module, images: Tensor, labels: Tensor, scale: float) -> Tensor:
        drawn = self._draw()
        with torch.no_grad():
            loss = self(self.net, images, labels)
        mean = self.loss.backward_at(net, images, labels, *drawn, scale)
        torch.testing.assert_close(mean, loss.mean(), rtol=1e-5, atol=0)
        return mean

    def _draw(self) -> tuple[Tensor, Tensor]:
        key = f"step{self.step}"
        return self.loss.sigma(self.golden[f"{key}.rnd_normal"]), self.golden[f"{key}.noise"]


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
