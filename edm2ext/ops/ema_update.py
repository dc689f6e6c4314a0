"""Multi-tensor update of power-function averages (specification 5.1, Eq. 127)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from edm2ext import backend, checks, reference

_ema_update_ = backend.op("ema_update_")
_KERNELS = backend.kernels("ema_update_")


def ema_update_(emas: Sequence[Sequence[Tensor]], params: Sequence[Tensor], one_minus_betas: Sequence[float]) -> None:
    """ema += (1 - beta) * (param - ema) for every profile and parameter, in one pass (5.1, Eq. 127).

    `emas` holds one list per profile, parallel to `params`; `one_minus_betas` one weight in [0, 1] per profile. Outside
    autograd. Dtype and device may change from one parameter to the next. Raises ValueError or TypeError if counts,
    shapes or devices do not match; then nothing has changed.
    """
    checks.ema_lists(emas, params, one_minus_betas)
    with torch.no_grad():
        for averages, part in _groups(emas, params):
            if _native(part[0], averages):
                flat = [ema for profile in averages for ema in profile]
                _ema_update_(flat, part, one_minus_betas)
                increment_version(flat)
            else:
                reference.ema_update_(averages, part, one_minus_betas)


def _groups(emas: Sequence[Sequence[Tensor]], params: Sequence[Tensor]) -> list[tuple]:
    """(emas, params) in groups of which all parameters, and all averages of a profile, agree in dtype and device."""
    if not params:
        return []
    if len({param.device for param in params}) == 1 and len({t.dtype for ts in (params, *emas) for t in ts}) == 1:
        return [(emas, params)]
    groups: dict[tuple, list[int]] = {}
    for i, param in enumerate(params):
        groups.setdefault((param.device, param.dtype, *(profile[i].dtype for profile in emas)), []).append(i)
    return [
        ([[profile[i] for i in group] for profile in emas], [params[i] for i in group]) for group in groups.values()
    ]


def _native(param: Tensor, averages: list[list[Tensor]]) -> bool:
    """Whether the native op takes a group: parameter and averages of one dtype. The CUDA kernel knows float32 only."""
    if not backend.native(param, _KERNELS) or not (param.is_cpu or param.dtype == torch.float32):
        return False
    return all(profile[0].dtype == param.dtype for profile in averages)


@backend.fake("ema_update_")
def _(emas: list[Tensor], params: list[Tensor], weights: list[float]) -> None:
    torch._check(len(emas) == len(params) * len(weights))
    for i, ema in enumerate(emas):
        torch._check(ema.shape == params[i % len(params)].shape)
