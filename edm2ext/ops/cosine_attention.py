"""Cosine attention (specification 2.12 steps 2 to 6, Eqs. 30 to 34): native normalisation, torch's attention."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.reference import layer_eps, memory_format, product_dtype

_qkv_norm = backend.op("qkv_norm")
_qkv_norm_backward = backend.op("qkv_norm_backward")
_KERNELS = backend.kernels("qkv_norm", "qkv_norm_backward")

_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def cosine_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention over all pixels with q, k and v normalised per head: qkv [N, 3C, *] -> [N, C, *] (2.12, Eqs. 30 to 34).

    Channel (h * d + i) * 3 + j of qkv is channel i of head h of q, k or v (j = 0, 1, 2), d = C / num_heads. Under
    autocast the products run in its dtype. Raises ValueError or TypeError unless 3 * num_heads divides the channels.
    """
    checks.heads("cosine_attention", qkv, num_heads)
    dtype = product_dtype(qkv)
    if not (backend.native(qkv, _KERNELS) and dtype in backend.dtypes(qkv)):
        return reference.cosine_attention(qkv, num_heads)
    if qkv.requires_grad and torch.is_grad_enabled():
        return _CosineAttention.apply(qkv, num_heads, dtype)
    return _attend(*_normalized(qkv, num_heads, dtype), qkv)[0]


class _CosineAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        q, k, v = _normalized(qkv, num_heads, dtype)
        out, saved = _attend(q, k, v, qkv)
        ctx.save_for_backward(qkv, q, k, v, *saved)
        return out.detach()  # the merged heads may be a view, which autograd would not let anyone modify in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q, k, v, *saved = ctx.saved_tensors
        heads = q.shape[1]
        if backend.differentiating_backward():
            function = lambda qkv: reference.cosine_attention(qkv, heads).to(grad.dtype)  # noqa: E731
            return *backend.reference_vjp(function, (qkv,), (True,), (grad,)), None, None
        grads = _attend_backward(grad, q, k, v, saved)
        return _qkv_norm_backward(*(g.to(qkv.dtype) for g in grads), qkv, heads, layer_eps()), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, like: Tensor) -> Tensor:
    """The rest of `cosine_attention`, on q, k and v [N, heads, pixels, d] that are normalised already.

    Returns [N, heads * d, *] with `like`'s spatial sizes and memory format.
    """
    if any(part.requires_grad for part in (q, k, v)) and torch.is_grad_enabled():
        return _Attention.apply(q, k, v, like.detach())
    return _attend(q, k, v, like)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, like: Tensor) -> Tensor:
        out, saved = _attend(q, k, v, like)
        ctx.save_for_backward(q, k, v, *saved)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        if backend.differentiating_backward():
            function = lambda q, k, v: reference.attention(q, k, v).reshape(grad.shape)  # noqa: E731
            return *backend.reference_vjp(function, (q, k, v), ctx.needs_input_grad[:3], (grad,)), None
        return *_attend_backward(grad, q, k, v, saved), None


def _normalized(qkv: Tensor, num_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [N, heads, pixels, d], in the dtype of the products."""
    q, k, v = _qkv_norm(qkv, num_heads, layer_eps())
    return q.to(dtype), k.to(dtype), v.to(dtype)


Products = Literal["explicit", "flash on the CPU", "flash", "efficient"]


def _products(q: Tensor) -> Products:
    """Which of torch's implementations multiplies q [N, heads, pixels, d].

    On a GPU those of `scaled_dot_product_attention`: flash attention has no float32; either wants rows of 16 bytes.

    On the CPU: measured forward + backward with d = 64, CPU time of one thread, in float32 plain products and a softmax
    need 0.8 of the time of fused attention at 16 pixels, 0.9 at 64 to 144, 0.85 to 1.15 at 256 and twice its time at
    1024, where it keeps its tiles in cache. In bfloat16 its backward pass is slow: they need 0.15 of its time at 16
    pixels, 0.6 at 256, and as much at 1024.
    """
    pixels, depth = q.shape[2:]
    if q.is_cpu:
        return "explicit" if pixels <= (512 if q.dtype == torch.bfloat16 else 256) else "flash on the CPU"
    if q.numel() == 0:
        return "explicit"
    if q.dtype == torch.float32:
        return "efficient" if depth % 4 == 0 else "explicit"
    return "flash" if depth % 8 == 0 and depth <= 256 else "explicit"


def _attend(q: Tensor, k: Tensor, v: Tensor, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output in qkv's layout and what the backward pass needs: the probabilities, or what fused attention wants."""
    products = _products(q)
    if products == "explicit":
        probabilities = _probabilities(q.flatten(0, 1), k.flatten(0, 1))
        out = torch.bmm(probabilities, v.flatten(0, 1)).view_as(v)
        return _merge_heads(out, qkv), (probabilities,)
    if products == "flash on the CPU":
        out, logsumexp = _flash_on_cpu(q, k, v)
        return _merge_heads(out, qkv), (out, logsumexp)
    if products == "flash":
        out, logsumexp, _, _, _, _, seed, offset, _ = _flash(q, k, v)
    else:
        out, logsumexp, seed, offset = _efficient(q, k, v, None, True)
    return _merge_heads(out, qkv), (out, logsumexp, seed, offset)


def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients for q, k and v (2.12)."""
    products = _products(q)
    batch, heads, pixels, depth = q.shape
    grad = grad.reshape(batch, heads, depth, pixels).transpose(2, 3)
    if products == "flash on the CPU":
        return _flash_on_cpu_backward(grad.contiguous(), q, k, v, *saved, 0.0, False)
    if products == "flash":
        out, logsumexp, *random = saved
        return _flash_backward(grad, q, k, v, out, logsumexp, None, None, pixels, pixels, 0.0, False, *random)
    if products == "efficient":
        return _efficient_backward(grad, q, k, v, None, *saved, 0.0, [True, True, True, False])[:3]
    (probabilities,) = saved
    grad = grad.reshape(batch * heads, pixels, depth)
    grad_v = torch.bmm(probabilities.transpose(1, 2), grad)
    grad_probabilities = torch.bmm(grad, v.flatten(0, 1).transpose(1, 2))
    grad_logits = torch._softmax_backward_data(grad_probabilities, probabilities, -1, q.dtype)
    grad_q = _scaled_bmm(grad_logits, k.flatten(0, 1), depth)
    grad_k = _scaled_bmm(grad_logits.transpose(1, 2), q.flatten(0, 1), depth)
    return grad_q.view_as(q), grad_k.view_as(k), grad_v.view_as(v)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    # torch.softmax would answer in float32 under autocast
    return torch._softmax(_scaled_bmm(q, k.transpose(1, 2), q.shape[2]), -1, False)


def _scaled_bmm(a: Tensor, b: Tensor, depth: int) -> Tensor:
    """a @ b / sqrt(depth)."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=1 / math.sqrt(depth))


def _merge_heads(out: Tensor, qkv: Tensor) -> Tensor:
    """[N, heads, pixels, d] -> [N, heads * d, *] in the memory format of qkv.

    No copy from a GPU's fused attention, whose output is [N, pixels, heads, d] in memory, to channels_last.
    """
    batch, heads, _, depth = out.shape
    spatial = qkv.shape[2:]
    layout = memory_format(qkv)
    if layout == torch.contiguous_format:
        return out.transpose(2, 3).reshape(batch, heads * depth, *spatial).contiguous()
    return out.transpose(1, 2).reshape(batch, *spatial, heads * depth).movedim(-1, 1)


@backend.fake("qkv_norm")
def _(qkv: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(qkv.dim() >= 2 and qkv.shape[1] % (3 * heads) == 0)
    batch, pixels, depth = qkv.shape[0], qkv.shape[2:].numel(), qkv.shape[1] // (3 * heads)
    if qkv.is_cpu:
        shape = (batch, heads, pixels, depth)
        return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)
    shape = (batch, pixels, heads, depth)
    by_head = [qkv.new_empty(shape).transpose(1, 2) for _ in range(3)]
    return by_head[0], by_head[1], by_head[2]


@backend.fake("qkv_norm_backward")
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, heads: int, eps: float) -> Tensor:
    torch._check(grad_q.numel() * 3 == qkv.numel())
    torch._check(grad_q.shape == grad_k.shape and grad_q.shape == grad_v.shape)
    return backend.empty_output(qkv)
