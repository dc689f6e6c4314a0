"""One optimizer step of training (spec sections 4.1 to 4.3, 4.8 item 4): gradients, Adam, averages."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edm2ext import tune
from edm2ext.nn import PreparedWeights, force_normalization
from edm2ext.optim import FusedAdam, LossScale
from edm2ext.phema import PowerEMA
from python_train import data, rng, sharded_state
from python_train.config import TrainOptions
from python_train.loss import EDM2Loss
from python_train.network import Precond
from python_train.world import World

if TYPE_CHECKING:
    from python_train.sharded import Shards

COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def fastest_precision(device: torch.device) -> str:
    """The key of COMPUTE_DTYPES to train with on a device: fp16 on a GPU; on a CPU bf16 if it has instructions that
    multiply it (AVX-512 BF16, AMX), for without them it takes several times as long as fp32."""
    if device.type != "cpu":
        return "fp16"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch does not tell
    return "bf16" if found.get("amx_bf16") or found.get("avx512_bf16") else "fp32"


def learning_rate(nimg: int, batch: int, lr: float, decay: float, rampup: float) -> float:
    """alpha(nimg) of spec 4.3 (EDM2 paper Eq. 67); nimg counts the images before the step, rampup is in images."""
    if decay > 0:
        lr /= math.sqrt(max(nimg / (decay * batch), 1))
    if rampup > 0:
        lr *= min(nimg / rampup, 1)
    return lr


def _loss_scale(options: TrainOptions, device: torch.device, sharded: bool) -> LossScale | None:
    """The factor on the loss, which the optimizer divides out; None for 1.

    A dynamic one begins at 1, as published: the loss is a sum over pixels (4.1), so that gradients are large already.
    """
    if options.loss_scaling == 1:
        return None
    if options.loss_scaling != "dynamic":
        return LossScale(options.loss_scaling, growth=1, backoff=1, device=device)
    if not sharded:
        return LossScale(1, device=device)
    from python_train.sharded import SharedLossScale

    return SharedLossScale(1, device=device)


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

    With ``options.parallel`` "fsdp" and several processes ``shards`` holds this process's part of the parameters; then
    every layer makes its own effective weight of what is gathered for it, and gradients are those of raw weights.
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
        self.net.unet.recompute = options.recompute
        self.names = [name for name, _ in net.named_parameters()]
        self.loss = EDM2Loss(options.P_mean, options.P_std, net.sigma_data)
        self.raw: torch.nn.Module = _Raw(net)
        self.normalize_in_step = options.force_normalize == "step"
        self.shards: Shards | None = None
        self.prepared: PreparedWeights | None = None
        if self.world.size > 1:
            for buffer in net.buffers():
                torch.distributed.broadcast(buffer, src=0)  # once; DDP would do it in every forward
        if options.parallel == "fsdp" and self.world.size > 1:
            from python_train.sharded import Shards  # whose imports take seconds

            self.shards = Shards(self.raw, net, self.world)
            self.params = self.shards.params
        else:
            self.prepared = net.prepared_weights(gradients="effective")
            for gain in self.prepared.gain_of.values():
                gain.requires_grad_(False)  # the optimizer makes its gradient of its weight's
            self.params = list(net.parameters())
            if self.world.size > 1:
                self.raw = self._replicated()
        self.ema = PowerEMA(self.params, options.sigma_rels)
        self.loss_scale = _loss_scale(options, self.world.device, self.shards is not None)
        self.optimizer = self._optimizer()
        self.nimg = 0
        self.lr = 0.0
        self.losses: list[Tensor] = []  # means of the rounds since the last report
        self.loss_sum = torch.zeros([2], dtype=torch.float64, device=self.world.device)

    def _replicated(self) -> torch.nn.Module:
        """The network's forward, with gradients that are means over all processes."""
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        ddp = torch.nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since torch 2.13
        no_sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        graphed = self.options.cuda_graph and devices is not None
        # What DDP makes here must not belong to the stream that a capture leaves out.
        with torch.cuda.stream(torch.cuda.Stream()) if graphed else contextlib.nullcontext():
            return ddp(self.raw, device_ids=devices, **no_sync)

    def _optimizer(self) -> FusedAdam:
        """Adam with averages; it makes the effective weights of the next forward if it is to normalise weights."""
        adam = {"lr": self.options.lr, "betas": (0.9, 0.99), "eps": 1e-8, "ema": self.ema}
        adam |= {"force_normalize": self.normalize_in_step, "loss_scale": self.loss_scale}
        if self.shards is not None:
            optimizer = FusedAdam(self.params, weights=self.shards.weights, **adam)
            optimizer.prepare()
            return optimizer
        self.prepared.refresh(force=self.normalize_in_step)
        made = self.prepared.effective_of if self.normalize_in_step else None
        return FusedAdam(self.net, gains=self.prepared.gain_of, gradients="effective", prepared=made, **adam)

    def refresh(self) -> None:
        """After weights were loaded."""
        if self.prepared is not None:
            self.prepared.refresh()

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step over ``options.batch`` images (spec 4.8, item 4)."""
        self.reseed()
        self.losses += [self.accumulate(index, *next(batches)) for index in range(self.rounds)]
        self.optimizer.step(self.next_averages())
        self.drop_gradients()

    def reseed(self) -> None:
        """All that a step draws depends on the seed, the process and the images before it (spec 4.6)."""
        rng.reseed(self.options.seed, self.world.rank, self.nimg)

    def next_averages(self) -> list[float]:
        """Count a step's images and set its learning rate; returns 1 - beta of each average."""
        options = self.options
        self.lr = learning_rate(self.nimg, options.batch, options.lr, options.decay, options.rampup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.nimg += options.batch
        return self.ema.weights(self.nimg, options.batch)

    def drop_gradients(self) -> None:
        """Start the next step's gradients from nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.shards is not None:
            self.shards.drop_gradients()

    def accumulate(self, index: int, stored: Tensor, labels: Tensor) -> Tensor:
        """Add the gradient of a step's micro-batch (spec 4.1), after the last that of all processes; returns the mean
        loss, 0-dim."""
        last = index == self.rounds - 1
        scale = (1 if self.loss_scale is None else self.loss_scale.scale) / (self.micro_batch * self.rounds)
        alone = last or self.world.size == 1 or self.shards is not None
        with self._effective_weights(), contextlib.nullcontext() if alone else self.raw.no_sync():
            mean = self.loss.backward(self.raw, self.encoder.encode(stored), labels, scale)
        if last and self.shards is not None:
            self.shards.collect_gradients()
        return mean

    def _effective_weights(self) -> contextlib.AbstractContextManager:
        """Within, the layers multiply with the present effective weights."""
        if self.prepared is None:
            return force_normalization("off")
        if not self.normalize_in_step:
            self.prepared.refresh(force=True)
        return self.prepared

    def nonfinite(self) -> dict[str, int]:
        """How many gradient values of which parameter were not finite so far and counted as 0 (spec 4.2). All processes
        call this together."""
        counts = self.optimizer.nonfinite
        counts = counts if self.shards is None else self.shards.total(counts)
        return {name: n for name, n in zip(self.names, counts.tolist(), strict=True) if n}

    def mean_loss(self) -> float:
        """Mean loss per element since the last call, over all processes; NaN if there was no finite one."""
        self._sum_losses()
        total, count = self.world.sum(self.loss_sum).tolist()
        self.loss_sum.zero_()
        return total / count if count else math.nan

    def share_losses(self) -> None:
        """Before the state is saved: give every process an equal share of what `mean_loss` would sum up. All processes
        call this together."""
        self._sum_losses()
        if self.world.size > 1:
            torch.distributed.all_reduce(self.loss_sum)
            self.loss_sum /= self.world.size

    def _sum_losses(self) -> None:
        if self.losses:
            means = torch.cat([mean.reshape(-1) for mean in self.losses]).double()
            finite = means.isfinite()
            self.loss_sum += torch.stack([means.where(finite, 0).sum(), finite.sum()])
            self.losses = []

    def whole(self, parts: list[Tensor] | None = None) -> list[Tensor]:
        """Tensors like the parameters (by default these themselves), whole, on rank 0; with shards, every process must
        call this, and the others get none."""
        parts = self.params if parts is None else parts
        return parts if self.shards is None else self.shards.gather(parts)

    def whole_net(self) -> Precond:
        """The network, whole, on rank 0; with shards, every process must call this, and only rank 0's is whole."""
        if self.shards is None:
            return self.net
        parameters = self.whole()
        if self.world.rank > 0:
            return self.net
        net = Precond(**self.net.config).train(self.net.training).requires_grad_(False)
        net.compute_dtype = self.net.compute_dtype
        net.load_state_dict({**self.net.state_dict(), **dict(zip(self.names, parameters, strict=True))})
        return net.to(self.world.device)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step and report depend on besides the options, after `share_losses`; with shards see
        `python_train.sharded_state`."""
        return {
            "nimg": self.nimg,
            "loss_sum": self.loss_sum * self.world.size,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "nonfinite": self.optimizer.nonfinite,
            "convolutions": tune.choices(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved, with or without shards."""
        tune.load(state.get("convolutions", {}))
        if "loss_sum" in state:  # format 1 has none
            self.loss_sum.copy_(state["loss_sum"] / self.world.size)
        if self.shards is not None:
            sharded_state.take(state, self)
            return
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.nonfinite.copy_(state["nonfinite"])
        self.take_loss_scale(state)
        self.refresh()
        self.nimg = state["nimg"]

    def take_loss_scale(self, state: dict[str, Any]) -> None:
        """That of a whole training state, where it is dynamic."""
        if self.options.loss_scaling == "dynamic" and state.get("loss_scale"):  # format 1 has none
            self.loss_scale.load_state_dict(state["loss_scale"])
