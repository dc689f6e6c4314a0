"""Every function of `edm2ext.ops` in plain torch: a selectable backend, and the yardstick of every test.

All of them are differentiable to any order and in forward mode, and work on any device. Section numbers are those of
the project's EDM2 specification, equation numbers those of Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models" (arXiv 2312.02696).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext import checks

EPS = 1e-4
SILU_SCALE = 0.596


def layer_eps() -> float:
    """EPS, for use inside an autograd.Function: Dynamo stumbles over a global number there when shapes are dynamic."""
    return 1e-4


def pixel_norm(x: Tensor, eps: float = EPS, *, silu: bool = False) -> "Tensor | tuple[Tensor, Tensor]":
    """Normalise each pixel over its channels to unit magnitude (2.10, Eq. 30): x [N, C, *] -> y, or (y, mp_silu(y))."""
    checks.activation("pixel_norm", "x", x)
    checks.epsilon("pixel_norm", eps)
    y = _normalize(x, dims=(1,), eps=eps)
    return (y, mp_silu(y)) if silu else y


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by its expected magnitude, x * sigmoid(x) / 0.596 (2.2, Eq. 81)."""
    checks.floating("mp_silu", "x", x)
    return F.silu(x) / SILU_SCALE


def mp_silu_modulated(
    x: Tensor, c: Tensor, dropout: float = 0.0, philox: Tensor | None = None, subsequence: int = 0
) -> Tensor:
    """mp_silu(x * c) with c [N, C] broadcast over the pixels of x [N, C, *]; c is cast to x's dtype (2.8).

    With `dropout`, elements outside of `dropout_mask` are zero and the others scaled up by its rate (2.9).
    """
    checks.modulation(x, c)
    y = mp_silu(x * c.to(x.dtype).reshape(*c.shape, *[1] * (x.dim() - 2)))
    threshold = checks.dropout(dropout, philox, subsequence, x)
    if philox is None or threshold == 0:
        return y
    kept = dropout_mask(x.shape, threshold, philox, subsequence)
    return y * kept * (2**16 / (2**16 - threshold))


def dropout_mask(shape: Sequence[int], threshold: int, philox: Tensor, subsequence: int = 0) -> Tensor:
    """Which elements of an activation [N, C, *] dropout keeps: those whose 16 random bits are at least `threshold`.

    `philox` is int64 [2]: seed and offset. Eight elements, in the order of channels-last memory whatever the memory
    format, share one call of Philox 4x32-10 (Salmon et al., SC 2011): its key is the seed, its counter the number of
    the eight (48 bits), `subsequence` (16) and the offset (64).
    """
    batch, channels, *spatial = shape
    numel = math.prod(shape)
    block = torch.arange((numel + 7) // 8, device=philox.device)
    seed, offset = philox.unbind()
    words = philox_4x32(
        (block & _WORD, (block >> 32) + (subsequence << 16), offset & _WORD, (offset >> 32) & _WORD),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    bits = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1).flatten()[:numel]
    return (bits >= threshold).reshape(batch, *spatial, channels).movedim(-1, 1)


_WORD = 0xFFFFFFFF


def philox_4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four random words for a counter of four and a key of two words, each a word in an int64.

    int64 keeps the low 64 bits of a product, which are those of the unsigned one.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def mp_sum(
    a: Tensor, b: Tensor, t: float = 0.5, clip: float | None = None, *, twice: bool = False
) -> "Tensor | tuple[Tensor, Tensor]":
    """Magnitude-preserving blend of equal-shaped a and b (2.3, Eq. 88), optionally clamped to [-clip, clip] (2.13);
    with `twice` returned for two users."""
    a, b = checks.promoted("mp_sum", a, b)
    checks.sum_arguments(a, b, t, clip)
    out = torch.lerp(a, b, t) / math.hypot(1 - t, t)
    out = out if clip is None else out.clamp(-clip, clip)
    return (out, out) if twice else out


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5, *, silu: bool = False) -> "Tensor | tuple[Tensor, Tensor]":
    """Magnitude-preserving concatenation along dim 1 (2.4, Eq. 103): out, or (out, mp_silu(out))."""
    a, b = checks.promoted("mp_cat", a, b)
    checks.cat_arguments(a, b, t)
    scale_a, scale_b = cat_scales(a.shape[1], b.shape[1], t)
    out = torch.cat([a * scale_a, b * scale_b], dim=1)
    return (out, mp_silu(out)) if silu else out


def cat_scales(channels_a: int, channels_b: int, t: float) -> tuple[float, float]:
    """The factors of mp_cat's two inputs (2.4)."""
    total = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    return total * (1 - t) / math.sqrt(channels_a), total * t / math.sqrt(channels_b)


def mp_fourier(x: Tensor, freqs: Tensor, phases: Tensor) -> Tensor:
    """sqrt(2) * cos(x * freqs + phases): x [N], freqs and phases [C] -> [N, C] in x's dtype (2.5, Eq. 75).

    Computed in float32, or in float64 when x is float64.
    """
    checks.fourier_arguments(x, freqs, phases)
    dtype = _compute_dtype(x)
    angle = x.to(dtype)[:, None] * freqs.to(dtype) + phases.to(dtype)
    return (math.sqrt(2) * angle.cos()).to(x.dtype)


def resample_down(x: Tensor, filter: Sequence[float] = (1, 1)) -> Tensor:
    """Halve height and width of x [N, C, H, W] with a separable filter of even length (2.11)."""
    taps = checks.resample_filter("resample_down", filter)
    checks.image("resample_down", "x", x)
    checks.down_size("resample_down", x, len(taps))
    with _autocast_off(x):
        kernel = _resample_kernel(x, taps, scale=1)
        return F.conv2d(x, kernel, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])


def resample_up(x: Tensor, filter: Sequence[float] = (1, 1)) -> Tensor:
    """Double height and width of x [N, C, H, W] with a separable filter of even length (2.11)."""
    taps = checks.resample_filter("resample_up", filter)
    checks.image("resample_up", "x", x)
    with _autocast_off(x):
        kernel = _resample_kernel(x, taps, scale=4)
        return F.conv_transpose2d(x, kernel, stride=2, padding=(len(taps) - 1) // 2, groups=x.shape[1])


def resample_down_pixel_norm(x: Tensor, filter: Sequence[float] = (1, 1), eps: float = EPS) -> tuple[Tensor, Tensor]:
    """y = pixel_norm(resample_down(x, filter), eps) and mp_silu(y), for x [N, C, H, W] (2.11, 2.10, 3.2)."""
    return pixel_norm(resample_down(x, filter), eps, silu=True)


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Resampling is no matrix product: it keeps its input's dtype, although a convolution computes it here."""
    return nullcontext() if product_dtype(x) == x.dtype else torch.autocast(x.device.type, enabled=False)


def _resample_kernel(x: Tensor, taps: list[float], scale: float) -> Tensor:
    outer = [[scale * row * column for column in taps] for row in taps]
    return torch.tensor(outer, dtype=x.dtype, device=x.device).expand(x.shape[1], 1, -1, -1)


class NetworkInput(NamedTuple):
    """How a network takes its input: the last arguments of `precondition_input`."""

    sigma_data: float
    dtype: torch.dtype
    memory_format: torch.memory_format


def precondition_input(
    x: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """c_in(sigma) * x cast to `dtype`, and a last channel of ones: [N, C, H, W] -> [N, C + 1, H, W] (3.4, 2.14)."""
    function = "precondition_input"
    checks.noisy_image(function, x, sigma, sigma_data)
    dtype = x.dtype if dtype is None else dtype
    checks.input_format(function, dtype, memory_format)
    x, sigma = x.to(image_dtype(dtype)), _per_sample(sigma, image_dtype(dtype))
    scaled = (x / (sigma**2 + sigma_data**2).sqrt()).to(dtype)
    return torch.cat([scaled, torch.ones_like(scaled[:, :1])], dim=1).contiguous(memory_format=memory_format)


def precondition_output(x: Tensor, f: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """D = c_skip(sigma) * x + c_out(sigma) * F in float32, or float64 for such F (3.4, Eqs. 4 to 7)."""
    function = "precondition_output"
    checks.noisy_image(function, x, sigma, sigma_data)
    checks.like(function, "f", f, x)
    dtype = image_dtype(f.dtype)
    sigma, layout = _per_sample(sigma, dtype), memory_format(x)
    variance = sigma**2 + sigma_data**2
    c_skip, c_out = sigma_data**2 / variance, sigma * sigma_data / variance.sqrt()
    return c_skip * x.to(dtype, memory_format=layout) + c_out * f.to(dtype, memory_format=layout)


@torch.no_grad()
def denoising_loss(
    f: Tensor, x: Tensor, y: Tensor, sigma: Tensor, u: Tensor, sigma_data: float = 0.5, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each image [N], and the gradients of F and u of scale * their sum (4.1, Eqs. 14 to 16 and 21)."""
    checks.loss_arguments(f, x, y, sigma, u, sigma_data)
    error = precondition_output(x, f, sigma, sigma_data) - y.to(image_dtype(f.dtype))
    weight, levels, logvar = _loss_weight(sigma, u, sigma_data, error.dtype)
    c_out = levels * sigma_data / (levels**2 + sigma_data**2).sqrt()
    loss = (weight * error**2 + logvar).sum(dim=(1, 2, 3))
    grad_f = (2 * scale * weight * c_out * error).to(f.dtype, memory_format=memory_format(f))
    grad_u = scale * (1 - weight * error**2).sum(dim=(1, 2, 3))
    return loss, grad_f, grad_u.reshape(u.shape).to(u.dtype)


def denoising_loss_map(f: Tensor, x: Tensor, y: Tensor, sigma: Tensor, u: Tensor, sigma_data: float = 0.5) -> Tensor:
    """l = (lambda / exp(u)) * (D - y)^2 + u with lambda = 1 / c_out^2, [N, C, H, W] (4.1, Eqs. 14 to 16 and 21)."""
    denoised = precondition_output(x, f, sigma, sigma_data)
    weight, _, logvar = _loss_weight(sigma, u, sigma_data, denoised.dtype)
    return weight * (denoised - y.to(denoised.dtype)) ** 2 + logvar


def _loss_weight(sigma: Tensor, u: Tensor, sigma_data: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """lambda(sigma) / exp(u), sigma and u, [N, 1, 1, 1] each."""
    sigma, u = _per_sample(sigma, dtype), _per_sample(u, dtype)
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 / u.exp(), sigma, u


def sampler_step(
    x: Tensor,
    denoised: Tensor,
    t_hat: Tensor,
    t_next: Tensor,
    *,
    guide: Tensor | None = None,
    guidance: float = 1.0,
    start: Tensor | None = None,
    noise: Tensor | None = None,
    churn: float = 0.0,
    S_noise: float = 1.0,
) -> Tensor:
    """An Euler step from x, or with `start` Heun's correction of one, with guidance and churn (6.1, 6.2, Eq. 152)."""
    checks.sampler_step(x, denoised, t_hat, t_next, guide, start, noise, churn)
    guided = denoised if guide is None else guide.lerp(denoised, guidance)
    if start is None:
        out = x + (t_next - t_hat) * ((x - guided) / t_hat)
    else:
        slopes = (x - start) / (t_next - t_hat) + (x - guided) / t_next
        out = start + (t_next - t_hat) * slopes / 2
    if noise is None:
        return out
    return out + ((t_next * (1 + churn)) ** 2 - t_next**2).sqrt() * S_noise * noise


def image_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of images outside a U-Net that computes in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _per_sample(levels: Tensor, dtype: torch.dtype) -> Tensor:
    return levels.to(dtype).reshape(-1, 1, 1, 1)


def normalize_weight(w: Tensor, eps: float = EPS) -> Tensor:
    """Bring every row of w [out, in, ...] to unit magnitude per element, i.e. norm sqrt(fan-in) (2.1, Eq. 47)."""
    checks.weight("normalize_weight", "w", w)
    checks.epsilon("normalize_weight", eps)
    return _normalize(w, dims=tuple(range(1, w.dim())), eps=eps)


@overload
def effective_weight(w: Tensor, gain: "Tensor | float" = 1, dtype: torch.dtype | None = None) -> Tensor: ...


@overload
def effective_weight(
    w: Sequence[Tensor],
    gain: "Sequence[Tensor | float] | float" = 1,
    dtype: torch.dtype | None = None,
) -> list[Tensor]: ...


def effective_weight(w, gain=1, dtype=None):
    """The weight a layer multiplies with: normalize_weight(w) * gain / sqrt(fan-in), cast to dtype (2.6 steps 3 to 5).

    `w` and `gain` may also be lists of equal length (a single number stands for all); the result then is a list.
    """
    if not isinstance(w, Tensor):
        return [effective_weight(*pair, dtype) for pair in checks.weights_and_gains(w, gain)]
    checks.weight("effective_weight", "w", w)
    checks.gain("effective_weight", gain)
    fan_in = w[0].numel() if w.shape[0] > 0 else 1
    normalized = normalize_weight(w.to(_compute_dtype(w)))
    if isinstance(gain, Tensor):
        gain = gain.to(normalized.dtype)
    return (normalized * (gain / math.sqrt(fan_in))).to(w.dtype if dtype is None else dtype)


def prepared_weight(
    w: Tensor, effective: Tensor, gain: "Tensor | float" = 1, *, gradients: Literal["raw", "effective"] = "raw"
) -> Tensor:
    """`effective`, differentiable in the raw weight w and the gain it was made from, or in w straight through (2.6)."""
    checks.prepared_weight(w, effective, gain, gradients)
    made = effective_weight(w, gain, effective.dtype) if gradients == "raw" else w.to(effective.dtype)
    return effective + (made - made.detach())


@torch.no_grad()
def force_normalize_(w: "Tensor | Sequence[Tensor]", eps: float = EPS) -> None:
    """Overwrite a weight, or each of a list, by its normalize_weight, outside autograd (2.6 step 2, Eq. 66)."""
    for weight in [w] if isinstance(w, Tensor) else w:
        checks.weight("force_normalize_", "w", weight)
        checks.epsilon("force_normalize_", eps)
        weight.copy_(normalize_weight(weight, eps))


@torch.no_grad()
def prepare_weights(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Effective weights outside autograd, after forced normalisation with `force` (2.6 steps 2 to 5, Eqs. 47, 66)."""
    checks.preparation(weights, gains, memory_format, out)
    out = prepared_like(weights, dtype, memory_format) if out is None else list(out)
    if force:
        force_normalize_(weights)
    for w, gain, target in zip(weights, gains or [None] * len(weights), out, strict=True):
        target.copy_(effective_weight(w, 1 if gain is None else gain, target.dtype))
    return out


def prepared_like(
    weights: Sequence[Tensor], dtype: torch.dtype | None, memory_format: torch.memory_format
) -> list[Tensor]:
    """Uninitialised tensors for the weights' effective weights; the memory format is that of 4-dimensional ones."""
    return [
        torch.empty(
            w.shape,
            dtype=w.dtype if dtype is None else dtype,
            device=w.device,
            memory_format=memory_format if w.dim() == 4 else torch.contiguous_format,
        )
        for w in weights
    ]


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
) -> Tensor:
    """Magnitude-preserving convolution: x [N, C, H, W] with the raw weight w [out, C / groups, kh, kw] (2.6, Eq. 47).

    With `prepared`, w is an effective weight already, and gain must be 1.
    """
    pad = checks.conv_arguments(x, w, gain, prepared, padding, dilation, groups)
    dtype = product_dtype(x)
    kernel = w.to(dtype) if prepared else effective_weight(w, gain, dtype)
    return F.conv2d(x, kernel, stride=stride, padding=pad, dilation=dilation, groups=groups)


def mp_cat_conv2d(
    a: Tensor, b: Tensor, w: Tensor, gain: "Tensor | float" = 1, t: float = 0.5, **options: Any
) -> tuple[Tensor, Tensor]:
    """mp_conv2d(x, w, gain, **options) and mp_silu(x) of x = mp_cat(a, b, t) (2.6, 2.2, 2.4; Eqs. 47, 81, 103)."""
    x, x_silu = mp_cat(a, b, t, silu=True)
    return mp_conv2d(x, w, gain, **options), x_silu


def mp_linear(x: Tensor, w: Tensor, gain: "Tensor | float" = 1, *, prepared: bool = False) -> Tensor:
    """Magnitude-preserving linear layer without bias: x [..., in] with the raw weight w [out, in] (2.6, Eq. 47)."""
    checks.linear_arguments(x, w, gain, prepared)
    dtype = product_dtype(x)
    return F.linear(x, w.to(dtype) if prepared else effective_weight(w, gain, dtype))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions and matrix products of x run: autocast's where that applies, else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def cosine_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention over all pixels with normalised q, k and v (2.12 steps 2 to 6, Eqs. 30 to 34): [N, 3C, *] -> [N, C, *].

    Channel (h * d + i) * 3 + j of qkv is channel i of head h of q, k or v (j = 0, 1, 2).
    """
    checks.heads("cosine_attention", qkv, num_heads)
    out = attention(*qkv_norm(qkv, num_heads)).reshape(qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:])
    return out.contiguous(memory_format=memory_format(qkv))


def qkv_norm(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, 3C, *] taken apart and normalised over the channels of a head: three times [N, heads, pixels, d]."""
    apart = qkv.reshape(qkv.shape[0], num_heads, qkv.shape[1] // (3 * num_heads), 3, qkv.shape[2:].numel())
    q, k, v = _normalize(apart, dims=(2,), eps=EPS).transpose(2, 4).unbind(3)
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of q, k and v [N, heads, pixels, d]: [N, heads, d, pixels]."""
    weights = torch.einsum("nhqd,nhkd->nhqk", q, k / math.sqrt(q.shape[3])).softmax(dim=-1)
    return torch.einsum("nhqk,nhkd->nhdq", weights, v)


@torch.no_grad()
def ema_update_(
    emas: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    one_minus_betas: Sequence[float],
) -> None:
    """ema += (1 - beta) * (param - ema) for every profile and parameter (5.1, Eq. 127).

    `emas` holds one list per profile, parallel to `params`; `one_minus_betas` one weight per profile.
    """
    checks.ema_lists(emas, params, one_minus_betas)
    for averages, weight in zip(emas, one_minus_betas, strict=True):
        for ema, param in zip(averages, params, strict=True):
            ema.lerp_(param.to(ema.dtype), weight)


@torch.no_grad()
def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    emas: Sequence[Sequence[Tensor]],
    weights: Sequence[bool],
    gains: Sequence[int],
    prepared: Sequence[Tensor | None],
    counters: Sequence[int],
    scalars: Tensor,
    loss_scale: Tensor | None,
    nonfinite: Tensor,
    betas: tuple[float, float],
    eps: float,
    effective: bool,
    force: bool,
) -> None:
    """One optimizer step; see `edm2ext.ops.adam_step.adam_step_` (4.2, 5.1, 2.6, Eqs. 66 and 127)."""
    found: list[Tensor | None] = []
    for i, grad in enumerate(grads):
        if grad is None:
            found.append(None)
            continue
        unscaled = grad if loss_scale is None else grad / loss_scale
        finite = unscaled.isfinite()
        nonfinite[counters[i]] += finite.logical_not().sum()
        found.append(torch.where(finite, unscaled, 0.0))
    if effective:
        for i in (i for i, grad in enumerate(found) if grad is not None and weights[i]):
            gain = params[gains[i]] if gains[i] >= 0 else params[i].new_ones(())
            leaves = [params[i].detach().requires_grad_(), gain.detach().requires_grad_()]
            with torch.enable_grad():
                out = effective_weight(*leaves)
            found[i], gain_grad = torch.autograd.grad(out, leaves, found[i])
            if gains[i] >= 0:
                found[gains[i]] = gain_grad
    for i, (param, grad) in enumerate(zip(params, found, strict=True)):
        if grad is None:
            continue
        exp_avgs[i].lerp_(grad, 1 - betas[0])
        exp_avg_sqs[i].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        step_size, bias_correction2 = scalars[:2].to(param.dtype)
        param.sub_(step_size * exp_avgs[i] / (exp_avg_sqs[i].sqrt() / bias_correction2 + eps))
        for profile, one_minus_beta in zip(emas, scalars[2:], strict=True):
            profile[i].lerp_(param.to(profile[i].dtype), one_minus_beta.to(profile[i].dtype))
    for i in (i for i, grad in enumerate(grads) if grad is not None and weights[i]):
        if force:
            force_normalize_(params[i])
        target = prepared[i]
        if target is not None:
            target.copy_(effective_weight(params[i], params[gains[i]] if gains[i] >= 0 else 1, target.dtype))


@torch.no_grad()
def accumulate_snapshots(
    inputs: Sequence[Tensor], coefs: Tensor, out: Tensor | None = None, *, compensated: bool = False
) -> Tensor:
    """out[m] += sum over n of coefs[n, m] * inputs[n], in float32 (5.4).

    inputs: N tensors [*] in float16, bfloat16 or float32; coefs [N, M]; out, if given, [M, *] float32, is added to.
    With `compensated` the sum is taken in float64 and rounded once.
    """
    coefs = checks.coefficients(coefs)
    checks.snapshots(inputs, coefs, out)
    if out is None:
        out = torch.zeros(
            coefs.shape[1],
            *inputs[0].shape,
            dtype=torch.float32,
            device=inputs[0].device,
        )
    total = out.double() if compensated else out
    coefs = coefs.to(total)
    for n, x in enumerate(inputs):
        x = x.to(total)
        for m, row in enumerate(total.unbind()):
            row.addcmul_(x, coefs[n, m])
    return out.copy_(total) if compensated else out


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of an op's output for input x: channels_last if x is that only, else contiguous."""
    if x.is_contiguous() or x.numel() == 0:
        return torch.contiguous_format
    for dim, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normalize(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """x / (eps + rms over dims): the norm in float32 or wider, the division in x's dtype (2.1)."""
    count = math.prod([x.shape[dim] for dim in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=_compute_dtype(x))
    return x / (eps + norm * math.sqrt(1 / max(count, 1))).to(x.dtype)
