"""One optimizer step of training (spec sections 4.1 to 4.3, 4.8 item 4): gradients, Adam, averages."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from edm2ext.optim import FusedAdam
from edm2ext.phema import PowerEMA
from python_train import data, rng
from python_train.config import TrainOptions
from python_train.loss import EDM2Loss
from python_train.network import Precond
from python_train.world import World

COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def learning_rate(nimg: int, batch: int, lr: float, decay: float, rampup: float) -> float:
    """alpha(nimg) of spec 4.3 (EDM2 paper Eq. 67); nimg counts the images before the step, rampup is in images."""
    if decay > 0:
        lr /= math.sqrt(max(nimg / (decay * batch), 1))
    if rampup > 0:
        lr *= min(nimg / rampup, 1)
    return lr


class _Raw(torch.nn.Module):
    """`Precond.raw` as the forward of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, net: Precond) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.net.raw(x, sigma, class_labels)


class Trainer:
    """A network with what one optimizer step needs: loss, encoder, Adam, power EMAs, and counters of the reports.

    The network is trained in place. ``nimg`` is the number of images seen so far. Gradients are accumulated and reduced
    as those of effective weights; the optimizer's pass makes those of the weights and gains of them, once a step (spec
    2.6). Weights are force-normalised by the weight pass before every forward, or with ``options.force_normalize``
    "step" by the optimizer's pass, which then makes the next forward's effective weights as well.
    """

    def __init__(
        self,
        net: Precond,
        options: TrainOptions,
        encoder: data.Encoder | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World(device=next(net.parameters()).device)
        self.options = options
        self.micro_batch, self.rounds = options.rounds(self.world.size)
        self.encoder = encoder or data.PixelEncoder()
        self.net = net.train().requires_grad_(True)
        self.net.compute_dtype = COMPUTE_DTYPES[options.precision]
        self.names = [name for name, _ in net.named_parameters()]
        self.params = list(net.parameters())
        self.prepared = net.prepared_weights(gradients="effective")
        for gain in self.prepared.gain_of.values():
            gain.requires_grad_(False)  # the optimizer makes its gradient of its weight's
        self.loss = EDM2Loss(options.P_mean, options.P_std, net.sigma_data)
        self.raw: torch.nn.Module = _Raw(net)
        if self.world.size > 1:
            for buffer in net.buffers():
                torch.distributed.broadcast(buffer, src=0)  # once; DDP would do it in every forward
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            ddp = torch.nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since torch 2.13
            no_sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.raw = ddp(self.raw, device_ids=devices, **no_sync)
        self.ema = PowerEMA(self.params, options.sigma_rels)
        self.normalize_in_step = options.force_normalize == "step"
        self.prepared.refresh(force=self.normalize_in_step)
        self.optimizer = FusedAdam(
            net,
            options.lr,
            betas=(0.9, 0.99),
            eps=1e-8,
            gains=self.prepared.gain_of,
            gradients="effective",
            ema=self.ema,
            force_normalize=self.normalize_in_step,
            prepared=self.prepared.effective_of if self.normalize_in_step else None,
        )
        self.nimg = 0
        self.lr = 0.0
        self.loss_sum = torch.zeros([2], dtype=torch.float64, device=self.world.device)

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step over ``options.batch`` images (spec 4.8, item 4)."""
        options = self.options
        rng.reseed(options.seed, self.world.rank, self.nimg)
        for round_index in range(self.rounds):
            last = round_index == self.rounds - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.raw.no_sync():
                self._accumulate(*next(batches))
        self.lr = learning_rate(self.nimg, options.batch, options.lr, options.decay, options.rampup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.nimg += options.batch
        self.optimizer.step(self.ema.weights(self.nimg, options.batch))
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, stored: Tensor, labels: Tensor) -> None:
        """Add the gradient of one micro-batch (spec 4.1)."""
        if not self.normalize_in_step:
            self.prepared.refresh(force=True)
        with self.prepared:
            scale = self.options.loss_scaling / (self.micro_batch * self.rounds)
            mean = self.loss.backward(self.raw, self.encoder.encode(stored), labels, scale)
        finite = mean.isfinite()
        self.loss_sum += torch.stack([torch.where(finite, mean, 0), finite])

    def nonfinite(self) -> dict[str, int]:
        """How many gradient values of which parameter were not finite so far and counted as 0 (spec 4.2)."""
        return {name: n for name, n in zip(self.names, self.optimizer.nonfinite.tolist(), strict=True) if n}

    def mean_loss(self) -> float:
        """Mean loss per element since the last call, over all processes; NaN if there was no finite one."""
        total, count = self.world.sum(self.loss_sum).tolist()
        self.loss_sum.zero_()
        return total / count if count else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on besides the options."""
        return {
            "nimg": self.nimg,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "nonfinite": self.optimizer.nonfinite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.nonfinite.copy_(state["nonfinite"])
        self.prepared.refresh()
        self.nimg = state["nimg"]
