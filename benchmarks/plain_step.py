"""The training step as plain torch makes it: what `benchmarks.run` and `benchmarks.traffic` compare the loop's with."""

from collections.abc import Iterator

import torch
from torch import Tensor

import edm2ext
from edm2ext.phema import power_beta
from python_train import rng
from python_train.config import TrainOptions
from python_train.data import Encoder
from python_train.loss import EDM2Loss
from python_train.network import Precond
from python_train.trainer import COMPUTE_DTYPES, learning_rate

SIGMA_RELS = (0.05, 0.10)


class PlainTrainer:
    """The same mathematics as `python_train.trainer.Trainer` without its kernels: layers of plain torch that normalise
    their own weights, autograd's gradients, torch's fused Adam, `_foreach` averages. One process, one round a step."""

    def __init__(self, net: Precond, options: TrainOptions, encoder: Encoder) -> None:
        self.options = options
        self.net = net.train().requires_grad_(True)
        self.net.compute_dtype = COMPUTE_DTYPES[options.precision]
        self.encoder = encoder
        self.params = list(net.parameters())
        self.loss = EDM2Loss(options.P_mean, options.P_std, net.sigma_data)
        self.optimizer = torch.optim.Adam(self.params, lr=options.lr, betas=(0.9, 0.99), eps=1e-8, fused=True)
        self.averages = [[param.detach().clone() for param in self.params] for _ in SIGMA_RELS]
        self.nimg = 0

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step (spec 4.8, item 4)."""
        options = self.options
        rng.reseed(options.seed, 0, self.nimg)
        stored, labels = next(batches)
        with edm2ext.set_backend("reference"):
            loss = self.loss(self.net, self.encoder.encode(stored), labels)
            (loss.sum() / options.batch).backward()
        self.optimizer.param_groups[0]["lr"] = learning_rate(
            self.nimg, options.batch, options.lr, options.decay, options.rampup
        )
        for grad in (param.grad for param in self.params):
            torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.nimg += options.batch
        betas = power_beta(self.nimg, options.batch, SIGMA_RELS)
        for average, beta in zip(self.averages, betas, strict=True):
            torch._foreach_lerp_(average, [param.detach() for param in self.params], 1 - float(beta))
