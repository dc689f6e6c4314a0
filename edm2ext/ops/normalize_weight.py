"""Weight normalisation: in the graph, as effective weight, and forced in place (2.1, 2.6; Eqs. 47, 66)."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

EPS = reference.EPS

_normalize_weight = backend.op("normalize_weight")
_normalize_weight_backward = backend.op("normalize_weight_backward")
_effective_weight = backend.op("effective_weight")
_effective_weight_backward = backend.op("effective_weight_backward")
_effective_weights = backend.op("effective_weights")
_effective_weights_backward = backend.op("effective_weights_backward")
_force_normalize_ = backend.op("force_normalize_")
_prepare_weights = backend.op("prepare_weights")
_NORMALIZE_KERNELS = backend.kernels("normalize_weight", "normalize_weight_backward")
_EFFECTIVE_KERNELS = backend.kernels("effective_weight", "effective_weight_backward")
_LIST_KERNELS = backend.kernels("effective_weights", "effective_weights_backward")
_FORCE_KERNELS = backend.kernels("force_normalize_")
_PREPARE_KERNELS = backend.kernels("prepare_weights")


def normalize_weight(w: Tensor, eps: float = EPS) -> Tensor:
    """Bring every row of w [out, in, ...] to unit magnitude per element: w / (eps + rms(row)) (2.1, Eq. 47).

    Raises ValueError or TypeError if w has fewer than two dimensions or is not floating-point.
    """
    checks.weight("normalize_weight", "w", w)
    checks.epsilon("normalize_weight", eps)
    if not backend.native(w, _NORMALIZE_KERNELS):
        return reference.normalize_weight(w, eps)
    if w.requires_grad and torch.is_grad_enabled():
        return _NormalizeWeight.apply(w, eps)
    return _normalize_weight(w, eps)


@overload
def effective_weight(w: Tensor, gain: "Tensor | float" = 1, dtype: torch.dtype | None = None) -> Tensor: ...


@overload
def effective_weight(
    w: Sequence[Tensor], gain: "Sequence[Tensor | float] | Tensor | float" = 1, dtype: torch.dtype | None = None
) -> list[Tensor]: ...


def effective_weight(w, gain=1, dtype=None):
    """The weight a layer multiplies with: normalize_weight(w) * gain / sqrt(fan-in), cast to dtype (2.6 steps 3 to 5).

    w is [out, in, ...], gain a number or a 0-dim tensor, dtype w's own by default; arithmetic is in float32, or float64
    if w is that. `w` and `gain` may also be lists of equal length (a single gain stands for all): the result is a list,
    made in one pass. Raises ValueError or TypeError for other shapes, types or lengths.
    """
    if not isinstance(w, Tensor):
        return _effective_weight_list(checks.weights_and_gains(w, gain), dtype)
    checks.weight("effective_weight", "w", w)
    checks.gain("effective_weight", gain)
    return unchecked_effective_weight(w, gain, w.dtype if dtype is None else dtype)


def unchecked_effective_weight(w: Tensor, gain: "Tensor | float", dtype: torch.dtype) -> Tensor:
    """`effective_weight` of one tensor, for callers that have checked the arguments."""
    if not _native_to(w, dtype, _EFFECTIVE_KERNELS):
        return reference.effective_weight(w, gain, dtype)
    gain, scale = (_readable(gain, w), 1.0) if isinstance(gain, Tensor) else (None, float(gain))
    if torch.is_grad_enabled() and (w.requires_grad or (gain is not None and gain.requires_grad)):
        return _EffectiveWeight.apply(w, gain, scale, dtype)
    return _effective_weight(w, gain, scale, EPS, dtype)


def _readable(gain: Tensor, w: Tensor) -> Tensor:
    """The gain as the native ops on w read it: from the CPU in float32 or float64, from a GPU in float32 there."""
    if w.is_cpu:
        return gain.to(torch.promote_types(gain.dtype, torch.float32))
    return gain.to(w.device, torch.float32)


def _native_to(w: Tensor, dtype: torch.dtype | None, where: backend.Kernels) -> bool:
    """Whether the native ops serve w, and a result of the given dtype."""
    return backend.native(w, where) and (dtype is None or dtype in backend.dtypes(w))


def force_normalize_(w: "Tensor | Sequence[Tensor]", eps: float = EPS) -> None:
    """Overwrite a weight [out, in, ...], or each of a list, by its normalize_weight (2.6 step 2, Eq. 66).

    Outside autograd. Raises ValueError or TypeError if a weight has fewer than two dimensions or is not floating-point;
    then none of them has changed.
    """
    weights = [w] if isinstance(w, Tensor) else list(w)
    for weight in weights:
        checks.weight("force_normalize_", "w", weight)
    checks.epsilon("force_normalize_", eps)
    if torch.compiler.is_compiling():
        # Inductor (2.13) hands a mutating op a copy of a convolution's weight and drops what it writes there.
        with torch.no_grad():
            for weight in weights:
                weight.copy_(normalize_weight(weight, eps))
        return
    for group in backend.by_dtype_and_device(weights):
        if backend.native(group[0], _FORCE_KERNELS) and all(map(backend.is_dense, group)):
            _force_normalize_(group, eps)
            increment_version(group)
        else:
            reference.force_normalize_(group, eps)


def prepare_weights(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What the layers of a whole network multiply with, in one pass (2.6 steps 2 to 5, Eqs. 47 and 66).

    The effective weight of each of `weights` [out, in, ...]: with `force`, the weight itself is first overwritten by
    its normalize_weight. gains, if given, holds a 0-dim tensor or None (1) for each. The results go to the tensors of
    `out`, in their dtypes and layouts; without, to new ones of `dtype` (the weight's own by default), those of four
    dimensions in `memory_format`. Outside autograd: who multiplies with them gets the gradient of the effective weight,
    which `edm2ext.optim.FusedAdam` takes. Raises ValueError or TypeError for shapes, counts or types that do not match;
    then nothing has changed.
    """
    weights = list(weights)
    checks.preparation(weights, gains, memory_format, out)
    out = reference.prepared_like(weights, dtype, memory_format) if out is None else list(out)
    gains = [None] * len(weights) if gains is None else list(gains)
    groups: dict[tuple, list[int]] = {}
    for i, (w, target) in enumerate(zip(weights, out, strict=True)):
        native = _native_to(w, target.dtype, _PREPARE_KERNELS)
        groups.setdefault((w.dtype, w.device, native), []).append(i)
    for group in groups.values():
        _prepare_group([weights[i] for i in group], [gains[i] for i in group], force, [out[i] for i in group])
    return out


def _prepare_group(weights: list[Tensor], gains: list[Tensor | None], force: bool, out: list[Tensor]) -> None:
    """One call for weights of one dtype and device, whose results are native dtypes all or none."""
    w = weights[0]
    # On a GPU the effective weight follows from the sum of squares before forced normalisation, which float32 allows.
    exact = w.is_cpu or w.dtype == torch.float32 or not force
    dense = all(map(backend.is_dense, out)) and (not force or all(map(backend.is_dense, weights)))
    if not (exact and dense and _native_to(w, out[0].dtype, _PREPARE_KERNELS)) or torch.compiler.is_compiling():
        reference.prepare_weights(weights, gains, force=force, out=out)
        return
    with torch.no_grad():
        _prepare_weights(weights, [None if g is None else _readable(g, w) for g in gains], EPS, force, out)
    increment_version([*weights, *out] if force else out)


def _effective_weight_list(pairs: list[tuple[Tensor, Tensor | float]], dtype: torch.dtype | None) -> list[Tensor]:
    for w, gain in pairs:
        checks.weight("effective_weight", "w", w)
        checks.gain("effective_weight", gain)
    weights = [w for w, _ in pairs]
    one_call = len(backend.by_dtype_and_device(weights)) == 1 and _native_to(weights[0], dtype, _LIST_KERNELS)
    if not one_call or torch.compiler.is_compiling():  # Dynamo refuses a gain that occurs twice in the list
        return [unchecked_effective_weight(w, gain, w.dtype if dtype is None else dtype) for w, gain in pairs]
    like = weights[0]
    numbers = {gain: torch.tensor(float(gain), device=like.device) for _, gain in pairs if not isinstance(gain, Tensor)}
    gains = [_readable(gain, like) if isinstance(gain, Tensor) else numbers[gain] for _, gain in pairs]
    dtype = like.dtype if dtype is None else dtype
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *gains)):
        return list(_EffectiveWeights.apply(dtype, *weights, *gains))
    return _effective_weights(weights, gains, EPS, dtype)


class _NormalizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(w)
        ctx.eps = eps
        return _normalize_weight(w, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        if backend.differentiating_backward():
            return *backend.reference_vjp(
                lambda w: reference.normalize_weight(w, ctx.eps), (w,), (True,), (grad,)
            ), None
        return _normalize_weight_backward(grad, w, ctx.eps), None


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, gain: "Tensor | None", scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(w, gain)
        ctx.scale = scale
        ctx.dtype = dtype
        return _effective_weight(w, gain, scale, reference.layer_eps(), dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, gain = ctx.saved_tensors
        if backend.differentiating_backward():
            if gain is None:
                function = lambda w: reference.effective_weight(w, ctx.scale, ctx.dtype)  # noqa: E731
                return *backend.reference_vjp(function, (w,), (True,), (grad,)), None, None, None
            function = lambda w, gain: reference.effective_weight(w, gain, ctx.dtype)  # noqa: E731
            return *backend.reference_vjp(function, (w, gain), ctx.needs_input_grad[:2], (grad,)), None, None
        grad_w, grad_gain = _effective_weight_backward(grad, w, gain, ctx.scale, reference.layer_eps())
        return grad_w, None if gain is None else grad_gain.to(gain.dtype), None, None


class _EffectiveWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights_and_gains: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights_and_gains)
        ctx.dtype = dtype
        count = len(weights_and_gains) // 2
        return tuple(_effective_weights(weights_and_gains[:count], weights_and_gains[count:], EPS, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        count = len(inputs) // 2
        if backend.differentiating_backward():
            function = lambda *x: reference.effective_weight(x[:count], x[count:], ctx.dtype)  # noqa: E731
            return None, *backend.reference_vjp(function, inputs, ctx.needs_input_grad[1:], grads)
        gains = inputs[count:]
        grad_weights, grad_gains = _effective_weights_backward(grads, inputs[:count], gains, EPS)
        return None, *grad_weights, *(grad.to(gain.dtype) for grad, gain in zip(grad_gains, gains, strict=True))


@backend.fake("normalize_weight")
def _(w: Tensor, eps: float) -> Tensor:
    torch._check(w.dim() >= 2)
    return empty_output(w)


@backend.fake("normalize_weight_backward")
def _(grad: Tensor, w: Tensor, eps: float) -> Tensor:
    torch._check(grad.shape == w.shape)
    return empty_output(w)


@backend.fake("effective_weight")
def _(w: Tensor, gain: "Tensor | None", scale: float, eps: float, dtype: torch.dtype) -> Tensor:
    torch._check(w.dim() >= 2)
    return empty_output(w, dtype=dtype)


@backend.fake("effective_weight_backward")
def _(grad: Tensor, w: Tensor, gain: "Tensor | None", scale: float, eps: float) -> tuple[Tensor, Tensor]:
    torch._check(grad.shape == w.shape)
    return empty_output(w), w.new_empty((), dtype=torch.promote_types(w.dtype, torch.float32))


@backend.fake("effective_weights")
def _(weights: list[Tensor], gains: list[Tensor], eps: float, dtype: torch.dtype) -> list[Tensor]:
    torch._check(len(weights) == len(gains))
    return [empty_output(w, dtype=dtype) for w in weights]


@backend.fake("effective_weights_backward")
def _(grads: list[Tensor], weights: list[Tensor], gains: list[Tensor], eps: float) -> tuple[list[Tensor], list[Tensor]]:
    torch._check(len(grads) == len(weights) == len(gains))
    grad_gains = [w.new_empty((), dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    return [empty_output(w) for w in weights], grad_gains


@backend.fake("force_normalize_")
def _(weights: list[Tensor], eps: float) -> None:
    for w in weights:
        torch._check(w.dim() >= 2)


@backend.fake("prepare_weights")
def _(weights: list[Tensor], gains: list[Tensor | None], eps: float, force: bool, out: list[Tensor]) -> None:
    torch._check(len(weights) == len(gains) == len(out))
    for w, target in zip(weights, out, strict=True):
        torch._check(target.shape == w.shape)
