"""Weighted sums of snapshots (specification 5.4)."""

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.autograd.graph import increment_version

from edm2ext import backend, checks, reference

_accumulate_snapshots_ = backend.op("accumulate_snapshots_")
_KERNELS = backend.kernels("accumulate_snapshots_")


def accumulate_snapshots(inputs: Sequence[Tensor], coefs: "Tensor | ArrayLike", out: Tensor | None = None) -> Tensor:
    """out[m] += sum over n of coefs[n, m] * inputs[n], in float32: M outputs from one pass over N inputs (5.4).

    inputs: N tensors [*] of one shape in float16, bfloat16 or float32; coefs [N, M]; out, if given, a contiguous
    [M, *] float32 tensor that is added to, else zeros. Outside autograd. Raises ValueError or TypeError if shapes,
    dtypes or devices do not match.
    """
    coefs = checks.coefficients(coefs)
    checks.snapshots(inputs, coefs, out)
    first = inputs[0]
    if out is None:
        out = torch.zeros(coefs.shape[1], *first.shape, dtype=torch.float32, device=first.device)
    if not (backend.native(out, _KERNELS) and out.is_contiguous()):
        return reference.accumulate_snapshots(inputs, coefs, out)
    with torch.no_grad():
        _accumulate_snapshots_(out, inputs, coefs)
    increment_version(out)
    return out


@backend.fake("accumulate_snapshots_")
def _(out: Tensor, inputs: list[Tensor], coefs: Tensor) -> None:
    torch._check(coefs.dim() == 2 and coefs.shape[0] == len(inputs) and coefs.shape[1] == out.shape[0])
    for x in inputs:
        torch._check(x.shape == out.shape[1:])
