"""Weighted sums of snapshots (specification 5.4)."""

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.autograd.graph import increment_version

from edm2ext import backend, checks, reference

_accumulate_snapshots_ = backend.op("accumulate_snapshots_")
_sum_snapshots_ = backend.op("sum_snapshots_")
_KERNELS = backend.kernels("accumulate_snapshots_")
_KERNELS_THAT_STORE = backend.kernels("sum_snapshots_")
_BUFFER_BYTES = 64 << 20  # of pinned memory in each of the two buffers that inputs pass through


def accumulate_snapshots(
    inputs: Sequence[Tensor],
    coefs: "Tensor | ArrayLike",
    out: Tensor | None = None,
    *,
    compensated: bool = False,
) -> Tensor:
    """out[m] += sum over n of coefs[n, m] * inputs[n], in float32: M outputs from one pass over N inputs (5.4).

    inputs: N tensors [*] of one shape in float16, bfloat16 or float32; coefs [N, M]; out, if given, an [M, *] float32
    tensor that is added to, else zeros. With `compensated`, coefficients, products and sums have twice the precision of
    float32 (as many inputs with large coefficients of both signs need), and the sum over a call's inputs is rounded
    once. If `out` is on a GPU and the inputs are on the CPU, they are streamed there piece by piece, copies overlapping
    with sums. Outside autograd. Raises ValueError or TypeError if shapes, dtypes or devices do not match.
    """
    coefs = checks.coefficients(coefs)
    checks.snapshots(inputs, coefs, out)
    first = inputs[0]
    if out is None:
        out = torch.zeros(coefs.shape[1], *first.shape, dtype=torch.float32, device=first.device)
    with torch.no_grad():
        if out.device == first.device:
            _accumulate(inputs, coefs, out, compensated)
        else:
            _stream(inputs, coefs, out, compensated, _BUFFER_BYTES)
    return out


def _accumulate(inputs: Sequence[Tensor], coefs: Tensor, out: Tensor, compensated: bool) -> None:
    """Inputs and out on one device."""
    if backend.native(out, _KERNELS):
        _accumulate_snapshots_(out, inputs, coefs, compensated)
        increment_version(out)
    else:
        reference.accumulate_snapshots(inputs, coefs, out, compensated=compensated)


def sum_snapshots(
    inputs: Sequence[Tensor],
    coefs: Tensor,
    out: Tensor,
    *,
    compensated: bool = False,
    device: "torch.device | str" = "cpu",
) -> None:
    """out[m] = sum over n of coefs[n, m] * inputs[n]: what `accumulate_snapshots` adds up, stored in `out`'s dtype,
    float16 or float32.

    inputs: N tensors [*]; coefs [N, M] in float64; out [M, *]; all on the CPU. device: where the sums are made.
    """
    if torch.device(device).type == "cpu" and backend.native(coefs, _KERNELS_THAT_STORE):  # float16 is but stored
        _sum_snapshots_(out, inputs, coefs, compensated)
        increment_version(out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=device)
    out.copy_(accumulate_snapshots(inputs, coefs, total, compensated=compensated))


class _Buffer:
    """Room for one piece of every input: in pinned memory of the host, and on the GPU.

    On the CPU, where the tests run it, both are plain memory and every copy is done when it returns.
    """

    def __init__(self, inputs: Sequence[Tensor], elements: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._host = [torch.empty(elements, dtype=x.dtype, pin_memory=on_gpu) for x in inputs]
        self._device = [torch.empty(elements, dtype=x.dtype, device=device) for x in inputs]
        self._copied = torch.cuda.Event() if on_gpu else None
        self._summed = torch.cuda.Event() if on_gpu else None

    def fill(self, pieces: Sequence[Tensor], copier: "torch.cuda.Stream | None") -> list[Tensor]:
        """Send the pieces to the GPU on stream `copier`; the current stream waits for them."""
        if self._copied is not None:
            self._copied.synchronize()  # what was in the pinned memory has left it
        host = [buffer[: len(piece)].copy_(piece) for buffer, piece in zip(self._host, pieces, strict=True)]
        filled = [buffer[: len(piece)] for buffer, piece in zip(self._device, pieces, strict=True)]
        if copier is not None:
            copier.wait_event(self._summed)
        with torch.cuda.stream(copier):  # None: does nothing
            for target, source in zip(filled, host, strict=True):
                target.copy_(source, non_blocking=True)
        if copier is not None:
            self._copied.record(copier)
            torch.cuda.current_stream(copier.device).wait_event(self._copied)
        return filled

    def release(self) -> None:
        """Call once the work on the filled tensors is queued on the current stream."""
        if self._summed is not None:
            self._summed.record()


def _stream(inputs: Sequence[Tensor], coefs: Tensor, out: Tensor, compensated: bool, buffer_bytes: int) -> None:
    """Inputs on the CPU, out on a GPU: while one piece of all inputs is summed up, the next is on its way."""
    total = out.contiguous()
    flat = [x.reshape(-1) for x in inputs]
    rows = total.view(total.shape[0], flat[0].numel())
    elements = max(8, buffer_bytes // sum(x.element_size() for x in flat) // 8 * 8)  # pieces start aligned
    elements = min(elements, rows.shape[1])
    starts = range(0, rows.shape[1], max(elements, 1))
    with torch.cuda.device(out.device if out.is_cuda else -1):  # -1: does nothing
        copier = torch.cuda.Stream() if out.is_cuda else None
        if copier is not None:
            copier.wait_stream(torch.cuda.current_stream())  # which may still use the memory of the buffers
        buffers = [_Buffer(inputs, elements, out.device) for _ in starts[:2]]
        for i, start in enumerate(starts):
            buffer = buffers[i % 2]
            pieces = buffer.fill([x[start : start + elements] for x in flat], copier)
            _accumulate(pieces, coefs, rows[:, start : start + elements], compensated)
            buffer.release()
    if total is not out:
        out.copy_(total)


@backend.fake("sum_snapshots_")
@backend.fake("accumulate_snapshots_")
def _(out: Tensor, inputs: list[Tensor], coefs: Tensor, compensated: bool) -> None:
    torch._check(coefs.dim() == 2 and coefs.shape[0] == len(inputs) and coefs.shape[1] == out.shape[0])
    for x in inputs:
        torch._check(x.shape == out.shape[1:])
