"""Magnitude-preserving convolution and linear layer (specification 2.6, Eq. 47)."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.ops import conv_choice, conv_weight_grad
from edm2ext.ops.conv_choice import LIBRARYS_OWN, Problem
from edm2ext.ops.cosine_attention import attend, cosine_attention
from edm2ext.ops.mp_silu import mp_silu_modulated
from edm2ext.ops.mp_sum import MASKED_TOGETHER, gradients_of_sum, mp_sum
from edm2ext.ops.normalize_weight import unchecked_effective_weight
from edm2ext.ops.prepared_weight import Gradients, prepared_weight, raw_gradients
from edm2ext.reference import memory_format, product_dtype

_mp_conv2d = backend.op("mp_conv2d")
_mp_conv2d_backward_input = backend.op("mp_conv2d_backward_input")
_mp_conv2d_backward_weight = backend.op("mp_conv2d_backward_weight")
_mp_conv2d_silu_modulated = backend.op("mp_conv2d_silu_modulated")
_mp_conv2d_sum = backend.op("mp_conv2d_sum")
_mp_conv2d_qkv_norm = backend.op("mp_conv2d_qkv_norm")
_mp_silu_modulated = backend.op("mp_silu_modulated")
_mp_silu_modulated_backward = backend.op("mp_silu_modulated_backward")
_mp_sum = backend.op("mp_sum")
_mp_sum_clipped = backend.op("mp_sum_clipped")
_qkv_norm = backend.op("qkv_norm")
_qkv_norm_backward = backend.op("qkv_norm_backward")
_TENSOR_CORES = backend.kernels(
    "mp_conv2d",
    "mp_conv2d_backward_input",
    "mp_conv2d_backward_weight",
    "mp_conv2d_silu_modulated",
    "mp_conv2d_sum",
    "mp_conv2d_qkv_norm",
    "mp_cat_conv2d",
    "mp_cat_conv2d_backward_weight",
    "mp_cat_silu_only",
    "mp_cat_silu_only_backward",
    "mp_silu_modulated",
    "mp_silu_modulated_backward",
    "mp_sum",
    "mp_sum_clipped",
    "mp_sum_backward",
    "qkv_norm",
    "qkv_norm_backward",
    "effective_weight_backward",
)
_CHANNELS = 8  # of which the kernels want a multiple: 16 bytes
_MOST_TAPS = 25
_HEAD = 64  # channels of q, k or v of a head that one kernel can normalise too,
_HEAD_PLANS = (LIBRARYS_OWN, [1, 1])  # with either of these plans: kConvQKVPlan


class ModulatedSiLU(NamedTuple):
    """What may follow a convolution y: mp_silu(y * c) with c [N, out] (2.8)."""

    c: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        return mp_silu_modulated(y, self.c)

    def fits(self, shape: tuple[int, ...], x: Tensor) -> bool:
        """Whether one kernel can do both, for y of that shape."""
        return self.c.shape == shape[:2] and self.c.device == x.device and self.c.is_floating_point()


class SumWith(NamedTuple):
    """What may follow a convolution y: mp_sum(skip, y, t, clip, twice=twice) (2.3, 2.13)."""

    skip: Tensor
    t: float = 0.5
    clip: float | None = None
    twice: bool = False

    def __call__(self, y: Tensor) -> "Tensor | tuple[Tensor, Tensor]":
        return mp_sum(self.skip, y, self.t, self.clip, twice=self.twice)

    def fits(self, shape: tuple[int, ...], x: Tensor) -> bool:
        """Whether one kernel can do both, for y of that shape."""
        alike = self.skip.shape == shape and self.skip.device == x.device and self.skip.dtype == x.dtype
        return alike and 0 <= self.t <= 1 and (self.clip is None or self.clip > 0)


class CosineAttention(NamedTuple):
    """What may follow a convolution y: cosine_attention(y, num_heads) (2.12); our kernels normalise q, k and v."""

    num_heads: int

    def __call__(self, y: Tensor) -> Tensor:
        return cosine_attention(y, self.num_heads)

    def fits(self, shape: tuple[int, ...], x: Tensor) -> bool:
        """Whether one kernel can make q, k and v, for y of that shape."""
        return self.num_heads > 0 and shape[1] == 3 * _HEAD * self.num_heads


Then = ModulatedSiLU | SumWith | CosineAttention


def mp_conv2d(
    x: Tensor,
    w: Tensor,
    gain: "Tensor | float" = 1,
    *,
    prepared: bool = False,
    stride: "int | tuple[int, int]" = 1,
    padding: "str | int | tuple[int, int]" = "same",
    dilation: "int | tuple[int, int]" = 1,
    groups: int = 1,
    then: Then | None = None,
) -> "Tensor | tuple[Tensor, Tensor]":
    """Convolution of x [N, C, H, W] with the effective weight of w [out, C / groups, kh, kw] (2.6, Eq. 47).

    gain is a number or a 0-dim tensor. The weight follows x's dtype, or autocast's. Padding "same" puts
    dilation * (k - 1) / 2 zeros on each side, so that stride 1 keeps the size, and needs odd kernel sizes. With
    `prepared`, w is an effective weight already, and gain must be 1. `then` is what to do with the result, which our
    kernels do while storing it. Raises ValueError or TypeError for shapes that do not match, or other values of gain,
    padding and groups.

    On a GPU, in float16 or bfloat16 and channels_last, convolutions that keep the size, with up to 25 taps, run on
    kernels of our own if the library was built with them (CMake option EDM2EXT_CONV); the gradient of the weight then
    stays in float32 on its way to w. `edm2ext.tune` can choose which kernels compute one, and that torch's do after
    all, as they do without it where channels are not multiples of 8 and would have to be padded. All others are
    torch's.
    """
    pad = checks.conv_arguments(x, w, gain, prepared, padding, dilation, groups)
    dtype = product_dtype(x)
    if on_tensor_cores(x, w, dtype, stride, pad, dilation, groups):
        if prepared:
            return convolve(x.to(dtype), w, w.to(dtype), 1.0, "effective", then)
        with torch.no_grad():
            kernel = unchecked_effective_weight(w, gain, dtype)
        return convolve(x.to(dtype), w, kernel, gain, "raw", then)
    if conv_weight_grad.serves(x, w, dtype, stride, pad, dilation, groups):
        with torch.no_grad():
            kernel = w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype)
        y = conv_weight_grad.convolve(x.to(dtype), w, kernel, gain, "effective" if prepared else "raw")
    else:
        kernel = w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype)
        y = F.conv2d(x, kernel, stride=stride, padding=pad, dilation=dilation, groups=groups)
    return y if then is None else then(y)


def mp_linear(x: Tensor, w: Tensor, gain: "Tensor | float" = 1, *, prepared: bool = False) -> Tensor:
    """x [..., in] times the effective weight of the raw weight w [out, in], without bias (2.6, Eq. 47).

    gain is a number or a 0-dim tensor. The weight follows x's dtype, or autocast's. With `prepared`, w is an effective
    weight already, and gain must be 1. Raises ValueError or TypeError for shapes that do not match or another gain.
    """
    checks.linear_arguments(x, w, gain, prepared)
    dtype = product_dtype(x)
    return F.linear(x, w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype))


def _pair(value: "int | tuple[int, int]") -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def on_tensor_cores(
    x: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    stride: "int | tuple[int, int]",
    padding: "int | tuple[int, int]",
    dilation: "int | tuple[int, int]",
    groups: int,
) -> bool:
    """Whether the convolution is one that our kernels compute."""
    height, width = w.shape[2:]
    return (
        dtype in (torch.float16, torch.bfloat16)
        and (backend.native(x, _TENSOR_CORES) or (x.is_meta and conv_choice.is_recording()))
        and memory_format(x) == torch.channels_last
        and height % 2 == 1
        and width % 2 == 1
        and height * width <= _MOST_TAPS
        and groups == 1
        and _pair(stride) == (1, 1)
        and _pair(dilation) == (1, 1)
        and _pair(padding) == (height // 2, width // 2)
    )


def conv2d_of_prepared(
    x: Tensor,
    w: Tensor,
    effective: Tensor,
    gain: "Tensor | float",
    gradients: Gradients,
    *,
    stride: "int | tuple[int, int]" = 1,
    dilation: "int | tuple[int, int]" = 1,
    groups: int = 1,
    then: Then | None = None,
) -> "Tensor | tuple[Tensor, Tensor]":
    """mp_conv2d with the effective weight made in advance from w and gain, differentiable in them as prepared_weight
    is."""
    pad = checks.conv_arguments(x, w, 1, True, "same", dilation, groups)
    dtype = product_dtype(x)
    if on_tensor_cores(x, effective, dtype, stride, pad, dilation, groups):
        return convolve(x.to(dtype), w, effective.to(dtype), gain, gradients, then)
    if conv_weight_grad.serves(x, w, dtype, stride, pad, dilation, groups):
        y = conv_weight_grad.convolve(x.to(dtype), w, effective.to(dtype), gain, gradients)
    else:
        weight = prepared_weight(w, effective, gain, gradients=gradients).to(dtype)
        y = F.conv2d(x, weight, stride=stride, padding=pad, dilation=dilation, groups=groups)
    return y if then is None else then(y)


def convolve(
    x: Tensor,
    w: Tensor,
    kernel: Tensor,
    gain: "Tensor | float",
    gradients: Gradients,
    then: Then | None = None,
) -> "Tensor | tuple[Tensor, Tensor]":
    """x convolved with the effective weight `kernel`, of x's dtype, by our kernels; w gets the gradient, which is kept
    in float32 until then: w's own through 2.6 with "raw", that of the effective weight with "effective"."""
    shape = (x.shape[0], kernel.shape[0], *x.shape[2:])
    if then is not None and not then.fits(shape, x):
        return then(convolve(x, w, kernel, gain, gradients))
    kernel = kernel.detach().contiguous(memory_format=torch.channels_last)
    other, t, clip, twice = None, 0.0, math.inf, False
    if isinstance(then, ModulatedSiLU):
        other = then.c.to(x.dtype)
    elif isinstance(then, SumWith):
        other = then.skip.contiguous(memory_format=torch.channels_last)  # as our kernels read it, and write a mask
        t, clip, twice = then.t, math.inf if then.clip is None else then.clip, then.twice
    fused = _FUSIONS[type(then)]
    differentiable = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in (x, w, gain, other))
    if differentiable and torch.is_grad_enabled():
        result = _Convolution.apply(x, w, gain, other, kernel, gradients, fused, t, clip, twice)
        return attend(*result, x) if fused == "qkv" else result
    result = convolve_forward(x, kernel, other, fused, t, clip, keep=False)[0]
    if fused == "qkv":
        return attend(*result, x)
    return (result, result) if twice else result


_FUSIONS = {type(None): "", ModulatedSiLU: "silu", SumWith: "sum", CosineAttention: "qkv"}


def _problem(direction: int, image: Tensor, w: Tensor, follows: str = "", keep: bool = False) -> Problem:
    """What is asked about; image: x or the gradient of y."""
    batch, _, height, width = image.shape
    out, channels, *kernel = w.shape
    return Problem(direction, batch, height, width, channels, out, *kernel, image.dtype, follows, keep)


def convolve_forward(
    x: Tensor, kernel: Tensor, other: Tensor | None, fused: str, t: float, clip: float, keep: bool
) -> tuple[Tensor | tuple[Tensor, Tensor, Tensor], Tensor]:
    """The result (of "qkv": q, k and v), and if asked to keep it what the backward pass reads besides the inputs: the
    convolution, or the mask of a clipped sum.

    What follows is fused into our kernels, and done by its own kernel after torch's, after padded ones, and after those
    whose tiles cut through heads.
    """
    plan = conv_choice.choice(_problem(0, x, kernel, fused, keep))
    if plan is not None and _is_whole(kernel):
        if fused == "silu":
            return _mp_conv2d_silu_modulated(x, kernel, other, keep, plan)
        if fused == "sum":
            return _mp_conv2d_sum(x, kernel, other, t, clip, keep, plan)
        if fused == "qkv" and plan in _HEAD_PLANS:
            q, k, v, y = _mp_conv2d_qkv_norm(x, kernel, reference.layer_eps(), keep)
            return (q, k, v), y
    y = _convolution(x, kernel, plan)
    if fused == "silu":
        return _mp_silu_modulated(y, other), y
    if fused == "sum":
        return _mp_sum_clipped(other, y, t, clip) if keep else (_mp_sum(other, y, t, clip), y)
    if fused == "qkv":
        return _qkv_norm(y, y.shape[1] // (3 * _HEAD), reference.layer_eps()), y
    return y, y


def _convolution(x: Tensor, kernel: Tensor, plan: conv_choice.Choice) -> Tensor:
    if plan is None:
        return F.conv2d(x, kernel, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2))
    if _is_whole(kernel):
        return _mp_conv2d(x, kernel, None, plan)
    y = _mp_conv2d(_padded(x, 1), _padded(kernel, 0, 1), None, plan)[:, : kernel.shape[0]]
    return y.contiguous(memory_format=torch.channels_last)


def _is_whole(kernel: Tensor) -> bool:
    """Whether our kernels take its channels without padding."""
    return kernel.shape[0] % _CHANNELS == 0 and kernel.shape[1] % _CHANNELS == 0


def _padded(t: Tensor, *dims: int) -> Tensor:
    """With zeros up to the channels that our kernels want, in these dimensions of four."""
    missing = [-t.shape[dim] % _CHANNELS if dim in dims else 0 for dim in range(4)]
    return F.pad(t, [0, missing[3], 0, missing[2], 0, missing[1], 0, missing[0]]) if any(missing) else t


def gradient_of_input(grad: Tensor, kernel: Tensor, x: Tensor | None = None) -> Tensor:
    """From the gradient of y; x, where somebody has it, spares torch's convolution a stand-in of its shape."""
    plan = conv_choice.choice(_problem(1, grad, kernel))
    if plan is None:
        return _torchs_gradient(grad, image_like(grad, kernel.shape[1]) if x is None else x, kernel, 0)
    if _is_whole(kernel):
        return _mp_conv2d_backward_input(grad, kernel, plan)
    grad_x = _mp_conv2d_backward_input(_padded(grad, 1), _padded(kernel, 0, 1), plan)[:, : kernel.shape[1]]
    return grad_x.contiguous(memory_format=torch.channels_last)


def gradient_of_weight(grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """From the gradient of y, in float32; of the kernel only the shape matters."""
    plan = conv_choice.choice(_problem(2, x, kernel))
    if plan is None:
        return _torchs_gradient(grad, x, kernel, 1).float()
    out, channels, *size = kernel.shape
    if _is_whole(kernel):
        return _mp_conv2d_backward_weight(grad, x, *size, plan)
    grad_w = _mp_conv2d_backward_weight(_padded(grad, 1), _padded(x, 1), *size, plan)[:out, :channels]
    return grad_w.contiguous(memory_format=torch.channels_last)


def _torchs_gradient(grad: Tensor, x: Tensor, kernel: Tensor, which: int) -> Tensor:
    """Of x (0) or the kernel (1), by torch's convolution in x's dtype."""
    padding, ones = [kernel.shape[2] // 2, kernel.shape[3] // 2], [1, 1]
    mask = [which == 0, which == 1, False]
    grad = grad.contiguous(memory_format=torch.channels_last)
    options = (None, ones, padding, ones, False, [0, 0], 1, mask)
    return torch.ops.aten.convolution_backward(grad, x, kernel, *options)[which]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        gain: "Tensor | float",
        other: Tensor | None,
        kernel: Tensor,
        gradients: Gradients,
        fused: str,
        t: float,
        clip: float,
        twice: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        keep = fused in ("silu", "qkv") or clip < math.inf
        out, kept = convolve_forward(x, kernel, other, fused, t, clip, keep)
        gain_tensor = gain if isinstance(gain, Tensor) else None
        c = other if fused == "silu" else None
        ctx.save_for_backward(x, w, kernel, gain_tensor, c, kept if keep else None)
        ctx.gain = None if isinstance(gain, Tensor) else float(gain)
        ctx.gradients, ctx.fused, ctx.t, ctx.twice = gradients, fused, t, twice
        return (out, out.view_as(out)) if twice else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, kernel, gain, c, kept = ctx.saved_tensors
        needs_x, needs_w, needs_gain = ctx.needs_input_grad[:3]
        nothing = (None,) * 6
        grad = grads[0]
        grad_other = None
        if ctx.fused == "sum":
            more_grad = grads[1] if ctx.twice else None
            grad_other, grad = gradients_of_sum(grad, more_grad, kept, ctx.t, torch.channels_last)
            grads = (grad,)
        if backend.differentiating_backward():
            *found, grad_c = _differentiable_backward(ctx, grads)
            return *found, grad_other if grad_c is None else grad_c, *nothing
        if ctx.fused == "silu":
            grad, grad_other = _mp_silu_modulated_backward(grad, kept, c)
        elif ctx.fused == "qkv":
            grad = _qkv_norm_backward(*grads, kept, grad.shape[1], reference.layer_eps())
        grad_x = gradient_of_input(grad, kernel, x) if needs_x else None
        if not needs_w and not needs_gain:
            return grad_x, None, None, grad_other, *nothing
        grad_w = gradient_of_weight(grad, x, kernel)
        if ctx.gradients == "effective":
            grad_w = grad_w.to(w.dtype, memory_format=memory_format(w))
            return grad_x, grad_w, None, grad_other, *nothing
        grad_w, grad_gain = raw_gradients(grad_w, w, ctx.gain if gain is None else gain)
        return grad_x, grad_w, grad_gain, grad_other, *nothing


def _differentiable_backward(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of x, w, the gain and c as functions of these and of grads, in plain torch; grads: of what follows,
    of a sum's y."""
    x, w, kernel, gain, c, _ = ctx.saved_tensors
    padding = kernel.shape[2] // 2, kernel.shape[3] // 2
    of_gain = ctx.gradients == "raw" and gain is not None

    def function(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        if ctx.gradients == "raw":
            weight = reference.effective_weight(w, rest[0] if of_gain else ctx.gain, kernel.dtype)
        else:
            weight = kernel + (w - w.detach()).to(kernel.dtype)
        y = F.conv2d(x, weight, padding=padding)
        if ctx.fused == "silu":
            return reference.mp_silu_modulated(y, rest[-1])
        return reference.qkv_norm(y, grads[0].shape[1]) if ctx.fused == "qkv" else y

    inputs = [x, w, *([gain] if of_gain else []), *([] if c is None else [c])]
    needs_x, needs_w, needs_gain, needs_c = ctx.needs_input_grad[:4]
    needed = (needs_x, needs_w, *([needs_gain] if of_gain else []), *([] if c is None else [needs_c]))
    found = backend.reference_vjp(function, tuple(inputs), needed, grads)
    return found[0], found[1], found[2] if of_gain else None, None if c is None else found[-1]


def image_like(like: Tensor, channels: int) -> Tensor:
    """What a native op allocates for an activation."""
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _nothing_or(keep: bool, like: Tensor, channels: int) -> Tensor:
    return image_like(like, channels) if keep else like.new_empty(0)


@backend.fake("mp_conv2d")
def fake_forward(x: Tensor, w: Tensor, gain: Tensor | None, plan: list[int]) -> Tensor:
    torch._check(x.dim() == 4 and w.dim() == 4 and x.shape[1] == w.shape[1])
    return image_like(x, w.shape[0])


@backend.fake("mp_conv2d_backward_input")
def fake_backward_input(grad: Tensor, w: Tensor, plan: list[int]) -> Tensor:
    torch._check(grad.dim() == 4 and w.dim() == 4 and grad.shape[1] == w.shape[0])
    return image_like(grad, w.shape[1])


@backend.fake("mp_conv2d_backward_weight")
def fake_backward_weight(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int, plan: list[int]) -> Tensor:
    torch._check(grad.dim() == 4 and x.dim() == 4 and grad.shape[2:] == x.shape[2:])
    shape = (grad.shape[1], x.shape[1], kernel_height, kernel_width)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


@backend.fake("mp_conv2d_silu_modulated")
def fake_silu_modulated(x: Tensor, w: Tensor, c: Tensor, keep: bool, plan: list[int]) -> tuple[Tensor, Tensor]:
    torch._check(c.dim() == 2 and c.shape[0] == x.shape[0] and c.shape[1] == w.shape[0])
    return image_like(x, w.shape[0]), _nothing_or(keep, x, w.shape[0])


@backend.fake("mp_conv2d_sum")
def fake_sum(
    x: Tensor, w: Tensor, skip: Tensor, t: float, clip: float, mask: bool, plan: list[int]
) -> tuple[Tensor, Tensor]:
    torch._check(skip.dim() == 4 and skip.shape[1] == w.shape[0])
    bytes_of_mask = skip.numel() // MASKED_TOGETHER if mask else 0
    return image_like(x, w.shape[0]), x.new_empty([bytes_of_mask], dtype=torch.uint8)


@backend.fake("mp_conv2d_qkv_norm")
def fake_qkv_norm(x: Tensor, w: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(w.shape[0] % (3 * _HEAD) == 0)
    shape = (x.shape[0], x.shape[2:].numel(), w.shape[0] // (3 * _HEAD), _HEAD)
    q, k, v = (x.new_empty(shape).transpose(1, 2) for _ in range(3))
    return q, k, v, _nothing_or(keep, x, w.shape[0])
