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
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    rest = []
    for i, param in enumerate(params):
        if _native(param, [averages[i] for averages in emas]):
            groups.setdefault((param.dtype, param.device), []).append(i)
        else:
            rest.append(i)
    with torch.no_grad():
        for group in groups.values():
            flat = [averages[i] for averages in emas for i in group]
            _ema_update_(flat, [params[i] for i in group], one_minus_betas)
            increment_version(flat)
        if rest:
            parts = [[averages[i] for i in rest] for averages in emas]
            reference.ema_update_(parts, [params[i] for i in rest], one_minus_betas)


def _native(param: Tensor, averages: list[Tensor]) -> bool:
    """Whether the native op takes a parameter with its averages: of one dtype, and of one layout without gaps.

    The CUDA kernel knows float32 only.
    """
    if not (backend.native(param, _KERNELS) and backend.is_dense(param)):
        return False
    if not (param.is_cpu or param.dtype == torch.float32):
        return False
    dtype, stride = param.dtype, param.stride()
    return all(ema.dtype == dtype and ema.stride() == stride for ema in averages)


@backend.fake("ema_update_")
def _(emas: list[Tensor], params: list[Tensor], weights: list[float]) -> None:
    torch._check(len(emas) == len(params) * len(weights))
    for i, ema in enumerate(emas):
        torch._check(ema.shape == params[i % len(params)].shape)
