"""Power-function averages of parameters, tracked during training (specification 5.1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edm2ext import ops
from edm2ext.phema.profiles import power_beta, sigma_rel_to_gamma
from edm2ext.phema.stored import clean_names, save_average


class PowerEMA:
    """Power-function averages of a module's or a list's parameters, one profile for each sigma_rel (5.1).

    Of a module, the parameters that require gradients are averaged: with LoRA, the adapters only. Averages start as
    copies, in float32 at least, and live beside the parameters; of sharded ones (FSDP2: wrap first, then average) each
    process keeps its shards. Buffers are not tracked. `update` moves nothing to the host and waits for nothing.

    Call `update(nimg)` after an optimizer step with the number of images (or samples, or tokens) seen so far, at every
    step or at any of them, with batches of any size: the decay follows from the time since the last update, so widths
    come out right however often it is called.
    """

    def __init__(self, net_or_params: nn.Module | Iterable[Tensor], sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        self.net = net_or_params if isinstance(net_or_params, nn.Module) else None
        if self.net is not None:
            clean = _clean_names(self.net)
            named = {clean[name]: p for name, p in self.net.named_parameters() if p.requires_grad}
            if not named:
                raise ValueError("PowerEMA: the module has no parameters that require gradients")
            self.names, self.params = list(named), list(named.values())
        else:
            self.params = list(net_or_params)
            self.names = [str(i) for i in range(len(self.params))]
        self.sigma_rels = [float(sigma_rel) for sigma_rel in sigma_rels]
        sigma_rel_to_gamma(self.sigma_rels)  # raises for a width out of range
        self.profiles = [[_copy(_local(param)) for param in self.params] for _ in self.sigma_rels]
        self.nimg = 0
        self.updates = 0

    def update(self, nimg_next: int, batch: int | None = None) -> None:
        """Take in the parameters after an optimizer step that ended at `nimg_next` images.

        They count for the time since the last update, or, if given, for the last `batch` images. Raises ValueError
        unless time goes on.
        """
        if batch is None:
            batch = nimg_next - self.nimg
            if batch <= 0:
                raise ValueError(
                    f"PowerEMA: nimg_next must be larger than at the last update ({self.nimg}), got {nimg_next}"
                )
        ops.ema_update_(self.profiles, [_local(param) for param in self.params], self.weights(nimg_next, batch))
        self.nimg = nimg_next
        self.updates += 1

    def weights(self, nimg_next: int, batch: int) -> list[float]:
        """1 - beta of each profile: how much of the parameters `update` takes in (Eq. 127)."""
        return (1 - power_beta(nimg_next, batch, self.sigma_rels)).tolist()

    def averages(self, sigma_rel: float) -> dict[str, Tensor]:
        """A tracked average by parameter name, without what torch.compile and DDP put into names; not copies.

        Of sharded parameters the whole tensors are gathered: all processes must call it.
        """
        if sigma_rel not in self.sigma_rels:
            raise ValueError(f"PowerEMA: sigma_rel must be one of {self.sigma_rels}, got {sigma_rel}")
        profile = self.profiles[self.sigma_rels.index(sigma_rel)]
        return {name: _whole(e, p) for name, p, e in zip(self.names, self.params, profile, strict=True)}

    def save(
        self,
        path: Callable[[float], str | os.PathLike[str]],
        nimg: int | None = None,
        *,
        storage: str = "fp16",
        header: dict[str, Any] | None = None,
    ) -> None:
        """Write each average as a file that `reconstruct` takes; `path` makes a name of its width.

        The module's buffers go into the files as they are now. nimg: the time of the averages, by default that of the
        last `update`. storage: "fp16", "fp32" or "fp16+8", see `save_average`. Of a group of processes the first one
        writes; all must call it.
        """
        nimg = self.nimg if nimg is None else nimg
        buffers = {} if self.net is None else dict(self._buffers())
        for sigma_rel in self.sigma_rels:
            tensors = {**self.averages(sigma_rel), **buffers}
            if _is_first_process():
                facts = {
                    **(header or {}),
                    "nimg": nimg,
                    "sigma_rel": sigma_rel,
                    "ema_kind": "power",
                    "updates": self.updates,
                }
                save_average(Path(path(sigma_rel)), tensors, facts, storage, copied=buffers)

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Those that belong to a state dict."""
        clean, kept = _clean_names(self.net), self.net.state_dict().keys()
        return [(clean[name], _whole(_local(b), b)) for name, b in self.net.named_buffers() if name in kept]

    def state_dict(self) -> dict[str, Any]:
        """Widths, time, and the averages themselves (not copies; of sharded parameters, this process's shards)."""
        return {
            "sigma_rels": list(self.sigma_rels),
            "profiles": [list(profile) for profile in self.profiles],
            "nimg": self.nimg,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy averages saved by `state_dict` into these. Raises ValueError if widths, counts or shapes differ."""
        if list(state["sigma_rels"]) != self.sigma_rels:
            raise ValueError(f"PowerEMA: the state has sigma_rels {state['sigma_rels']}, expected {self.sigma_rels}")
        shapes = [[list(ema.shape) for ema in profile] for profile in self.profiles]
        if [[list(ema.shape) for ema in profile] for profile in state["profiles"]] != shapes:
            raise ValueError("PowerEMA: the state's averages do not have the shapes of the parameters")
        for profile, saved in zip(self.profiles, state["profiles"], strict=True):
            for ema, value in zip(profile, saved, strict=True):
                ema.copy_(value)
        self.nimg, self.updates = state.get("nimg", 0), state.get("updates", 0)


def _clean_names(net: nn.Module) -> dict[str, str]:
    return clean_names([name for name, _ in (*net.named_parameters(), *net.named_buffers())])


def _local(param: Tensor) -> Tensor:
    """This process's part of a parameter."""
    param = param.detach()
    return param.to_local() if _is_sharded(param) else param


def _whole(average: Tensor, param: Tensor) -> Tensor:
    """All of an average of which a process has the part that it has of the parameter."""
    if not _is_sharded(param):
        return average
    layout = {"shape": param.shape, "stride": param.stride(), "run_check": False}
    return type(param).from_local(average, param.device_mesh, param.placements, **layout).full_tensor()


def _is_first_process() -> bool:
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not group or torch.distributed.get_rank() == 0


def _is_sharded(param: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes long to import."""
    return hasattr(param, "to_local")


def _copy(param: Tensor) -> Tensor:
    return param.to(torch.promote_types(param.dtype, torch.float32), copy=True)
