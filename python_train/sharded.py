"""A network shared out over the processes of a run by FSDP2 (`fully_shard`): each holds some rows of every weight.

Shards are whole rows (output features), so that what works on rows needs no other process: Adam, the backward of weight
normalisation, forced normalisation, averages. Weights are gathered for the layers' forward and backward passes only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from edm2ext.nn import MPConv
from edm2ext.optim import LossScale
from python_train.network import Block, Precond
from python_train.world import World


class SharedLossScale(LossScale):
    """One for all processes, each of which sees the gradients of its own rows only."""

    def update(self, bad: Tensor) -> None:
        anywhere = bad.to(torch.int32)
        torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
        super().update(anywhere > 0)


class Shards:
    """This process's part of a network's parameters, each with the rows that `torch.chunk` gives its rank: none of a
    weight with fewer rows than processes.

    The network is changed in place: its weights become DTensors, gathered around the forward pass of ``module``,
    through which it must be called. The convolutions of a block are gathered together; all else, the embedding linears
    of all blocks included, which multiply as one matrix before the blocks run, belongs to the module. The gains have no
    dimension to share out: every process has them, and `collect_gradients` makes their gradients equal.
    """

    def __init__(self, module: torch.nn.Module, net: Precond, world: World) -> None:
        for param in net.parameters():
            torch.distributed.broadcast(param.detach(), src=0)
        self.world = world
        self.module = module
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.gains = [param for param in net.parameters() if param.dim() == 0]
        for block in (part for part in net.unet.modules() if isinstance(part, Block)):
            fully_shard([layer for layer in block.children() if isinstance(layer, MPConv)], mesh=self.mesh)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # u(sigma) is a view: nothing is done to it in place
        fully_shard(module, mesh=self.mesh, ignored_params=set(self.gains))
        self.whole = list(net.parameters())
        self.params = [Parameter(p.detach().to_local()) if isinstance(p, DTensor) else p for p in self.whole]

    @property
    def weights(self) -> list[Parameter]:
        """Those of `params` whose rows are normalised: all but the gains."""
        return [param for param in self.params if param.dim() > 0]

    def collect_gradients(self) -> None:
        """After the backward passes of a step: the gradients of `params`, means over the processes."""
        gradients = torch.stack([gain.grad for gain in self.gains])
        torch.distributed.all_reduce(gradients)
        for gain, gradient in zip(self.gains, gradients / self.world.size, strict=True):
            gain.grad = gradient
        for param, whole in zip(self.params, self.whole, strict=True):
            if isinstance(whole, DTensor) and whole.grad is not None:
                param.grad = whole.grad.to_local()

    def drop_gradients(self) -> None:
        """Forget the gradients that `collect_gradients` collected."""
        for param in (*self.params, *self.whole):
            param.grad = None

    def spread(self, part: Tensor, like: Tensor) -> Tensor:
        """This process's part of a tensor shaped like a parameter, as a DTensor; a gain's is whole."""
        if not isinstance(like, DTensor):
            return part
        size = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(part.detach(), self.mesh, [Shard(0)], run_check=False, **size)

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The whole tensors of which these are the parts, in the order of `params`, on rank 0's CPU; elsewhere none.

        Every process must call this."""
        found = []
        for part, like in zip(parts, self.whole, strict=True):
            spread = self.spread(part.detach(), like)
            tensor = spread.full_tensor() if isinstance(spread, DTensor) else spread
            if self.world.rank == 0:
                found.append(tensor.cpu())
        return found

    def total(self, counts: Tensor) -> Tensor:
        """Counts of each parameter [params], summed over the shards, on the CPU."""
        replicated = torch.tensor([not isinstance(whole, DTensor) for whole in self.whole], device=counts.device)
        return self.world.sum(counts.where(~replicated | (self.world.rank == 0), 0))
