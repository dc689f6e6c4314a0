"""Argument checks shared by every backend: each error names function, argument, what was expected and what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def activation(function: str, name: str, x: Tensor) -> None:
    """`x` is a floating-point tensor [N, C, *]."""
    floating(function, name, x)
    if x.dim() < 2:
        raise ValueError(f"{function}: {name} must be [batch, channels, ...], got shape {list(x.shape)}")


def floating(function: str, name: str, x: Tensor) -> None:
    """`x` is a real floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{function}: {name} must be a floating-point tensor, got {x.dtype}")


def image(function: str, name: str, x: Tensor) -> None:
    """`x` is a floating-point tensor [N, C, H, W]."""
    floating(function, name, x)
    if x.dim() != 4:
        raise ValueError(f"{function}: {name} must be [batch, channels, height, width], got shape {list(x.shape)}")


def weight(function: str, name: str, w: Tensor) -> None:
    """`w` is a floating-point tensor [out, in, ...] with at least one element in each row."""
    floating(function, name, w)
    if w.dim() < 2:
        raise ValueError(f"{function}: {name} must be [out, in, ...], got shape {list(w.shape)}")
    if w.shape[0] > 0 and w.numel() == 0:
        raise ValueError(f"{function}: {name} must have a fan-in of at least 1, got shape {list(w.shape)}")


def gain(function: str, value: "Tensor | float") -> None:
    """`value` is a number or a 0-dim floating-point tensor."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{function}: gain must be a number or a 0-dim floating-point tensor, "
                f"got a tensor of shape {list(value.shape)}, {value.dtype}"
            )
    elif not isinstance(value, (int, float)):
        raise TypeError(f"{function}: gain must be a number or a 0-dim tensor, got {type(value).__name__}")


def prepared_weight(w: Tensor, effective: Tensor, gain_: "Tensor | float", gradients: str) -> None:
    """`effective` has the shape of the raw weight `w`, and `gradients` is a known word."""
    weight("prepared_weight", "w", w)
    gain("prepared_weight", gain_)
    if effective.shape != w.shape:
        raise ValueError(f"prepared_weight: effective must have w's shape {list(w.shape)}, got {list(effective.shape)}")
    if gradients not in ("raw", "effective"):
        raise ValueError(f"prepared_weight: gradients must be 'raw' or 'effective', got {gradients!r}")


def epsilon(function: str, eps: float) -> None:
    """`eps` is positive."""
    if not eps > 0:
        raise ValueError(f"{function}: eps must be positive, got {eps}")


def modulation(x: Tensor, c: Tensor) -> None:
    """`x` is [N, C, *], `c` [N, C]."""
    function = "mp_silu_modulated"
    activation(function, "x", x)
    floating(function, "c", c)
    if c.dim() != 2 or c.shape[0] != x.shape[0] or c.shape[1] != x.shape[1]:
        raise ValueError(f"{function}: c must have shape {list(x.shape[:2])}, got {list(c.shape)}")
    _same_device(function, "x", x, "c", c)


def dropout(p: float, philox: Tensor | None, subsequence: int, x: Tensor) -> int:
    """Dropout's rate in units of 2^-16, the closest to `p`; `philox` is int64 [2] on x's device unless that is 0."""
    function = "mp_silu_modulated"
    if not 0 <= p < 1:
        raise ValueError(f"{function}: dropout must be in [0, 1), got {p}")
    threshold = min(round(p * 2**16), 2**16 - 1)
    if threshold == 0:
        return 0
    if philox is None:
        raise ValueError(f"{function}: dropout={p} needs philox, an int64 tensor [seed, offset]")
    if philox.dtype != torch.int64 or philox.shape != (2,):
        raise ValueError(f"{function}: philox must be int64 of shape [2], got {philox.dtype} {list(philox.shape)}")
    if not 0 <= subsequence < 2**16:
        raise ValueError(f"{function}: subsequence must be in [0, 65535], got {subsequence}")
    _same_device(function, "x", x, "philox", philox)
    return threshold


def blend(function: str, t: float) -> None:
    """`t` is a blending factor in [0, 1]."""
    if not 0 <= t <= 1:
        raise ValueError(f"{function}: t must be in [0, 1], got {t}")


def promoted(function: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `b` in one floating-point dtype: under autocast the wider of the two, otherwise they must agree."""
    floating(function, "a", a)
    floating(function, "b", b)
    if a.dtype != b.dtype:
        device = a.device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            raise TypeError(f"{function}: a and b must have one dtype, got {a.dtype} and {b.dtype}")
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    _same_device(function, "a", a, "b", b)
    return a, b


def _same_device(function: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{function}: {name_a} and {name_b} must be on one device, got {a.device} and {b.device}")


def sum_arguments(a: Tensor, b: Tensor, t: float, clip: float | None) -> None:
    """`a` and `b` have one shape, `clip` is positive or None."""
    function = "mp_sum"
    blend(function, t)
    if a.shape != b.shape:
        raise ValueError(f"{function}: a and b must have one shape, got {list(a.shape)} and {list(b.shape)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"{function}: clip must be positive or None, got {clip}")


def cat_arguments(a: Tensor, b: Tensor, t: float) -> None:
    """`a` and `b` are [N, C, *] of equal shape but for C, which is at least 1."""
    function = "mp_cat"
    blend(function, t)
    activation(function, "a", a)
    activation(function, "b", b)
    if a.dim() != b.dim() or a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:]:
        raise ValueError(
            f"{function}: a and b must agree in all dimensions but 1, got {list(a.shape)} and {list(b.shape)}"
        )
    if a.shape[1] == 0 or b.shape[1] == 0:
        raise ValueError(f"{function}: a and b must have at least one channel, got {list(a.shape)} and {list(b.shape)}")


def noisy_image(function: str, x: Tensor, sigma: Tensor, sigma_data: float) -> None:
    """`x` is [N, C, H, W] at noise levels `sigma`: 1 or N, in any shape."""
    image(function, "x", x)
    noise_levels(function, "sigma", sigma, x)
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"{function}: sigma_data must be positive, got {sigma_data}")


def noise_levels(function: str, name: str, sigma: Tensor, x: Tensor) -> None:
    """`sigma` has 1 or N elements, on x's device."""
    floating(function, name, sigma)
    if sigma.numel() not in (1, x.shape[0]):
        raise ValueError(f"{function}: {name} must have 1 or {x.shape[0]} elements, got shape {list(sigma.shape)}")
    _same_device(function, "x", x, name, sigma)


def input_format(function: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """What a network's input can be made as."""
    if not dtype.is_floating_point:
        raise TypeError(f"{function}: dtype must be a floating-point type, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"{function}: memory_format must be contiguous_format or channels_last, got {memory_format}")


def like(function: str, name: str, value: Tensor, x: Tensor) -> None:
    """`value` is a floating-point tensor of x's shape, on its device."""
    floating(function, name, value)
    if value.shape != x.shape:
        raise ValueError(f"{function}: {name} must have x's shape {list(x.shape)}, got {list(value.shape)}")
    _same_device(function, "x", x, name, value)


def loss_arguments(f: Tensor, x: Tensor, y: Tensor, sigma: Tensor, u: Tensor, sigma_data: float) -> None:
    """Images `f`, `x` and `y` of one shape [N, C, H, W]; `sigma` and `u` have N elements each."""
    function = "denoising_loss"
    noisy_image(function, x, sigma, sigma_data)
    like(function, "f", f, x)
    like(function, "y", y, x)
    noise_levels(function, "u", u, x)
    for name, levels in (("sigma", sigma), ("u", u)):
        if levels.numel() != x.shape[0]:
            raise ValueError(f"{function}: {name} must have {x.shape[0]} elements, got shape {list(levels.shape)}")


def sampler_step(
    x: Tensor,
    denoised: Tensor,
    t_hat: Tensor,
    t_next: Tensor,
    guide: Tensor | None,
    start: Tensor | None,
    noise: Tensor | None,
    churn: float,
) -> None:
    """Images of one shape, device and dtype; noise levels of one element each, of that dtype."""
    function = "sampler_step"
    floating(function, "x", x)
    for name, value in (("denoised", denoised), ("guide", guide), ("start", start), ("noise", noise)):
        if value is not None:
            like(function, name, value, x)
            _same_dtype(function, name, value, x)
    for name, value in (("t_hat", t_hat), ("t_next", t_next)):
        floating(function, name, value)
        if value.numel() != 1:
            raise ValueError(f"{function}: {name} must have one element, got shape {list(value.shape)}")
        _same_device(function, "x", x, name, value)
        _same_dtype(function, name, value, x)
    if churn < 0:
        raise ValueError(f"{function}: churn must not be negative, got {churn}")


def _same_dtype(function: str, name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{function}: {name} must have x's dtype {x.dtype}, got {value.dtype}")


def fourier_arguments(x: Tensor, freqs: Tensor, phases: Tensor) -> None:
    """`x` is [N], `freqs` and `phases` are [C]."""
    function = "mp_fourier"
    for name, value in (("x", x), ("freqs", freqs), ("phases", phases)):
        floating(function, name, value)
        if value.dim() != 1:
            raise ValueError(f"{function}: {name} must have one dimension, got shape {list(value.shape)}")
    if freqs.shape != phases.shape:
        raise ValueError(
            f"{function}: freqs and phases must have one length, got {freqs.shape[0]} and {phases.shape[0]}"
        )


def resample_filter(function: str, taps: Sequence[float]) -> list[float]:
    """The filter as floats that sum to 1; its length must be even."""
    values = [float(f) for f in taps]
    if len(values) == 0 or len(values) % 2 != 0:
        raise ValueError(f"{function}: filter must have an even number of taps, got {len(values)}")
    total = sum(values)
    if total == 0:
        raise ValueError(f"{function}: filter must not sum to 0, got {values}")
    return [f / total for f in values]


def down_size(function: str, x: Tensor, taps: int) -> None:
    """Height and width of `x` are at least 2, and cover the filter."""
    pad = (taps - 1) // 2
    if min(x.shape[2:]) + 2 * pad < taps:
        raise ValueError(f"{function}: x must be at least {taps - 2 * pad} pixels high and wide, got {list(x.shape)}")


def weights_and_gains(w: Sequence[Tensor], gain: "Sequence[Tensor | float] | Tensor | float") -> list[tuple]:
    """Pairs of weight and gain; one gain stands for all."""
    weights = list(w)
    gains = [gain] * len(weights) if isinstance(gain, (int, float, Tensor)) else list(gain)
    if len(gains) != len(weights):
        raise ValueError(f"effective_weight: gain must have one entry per weight ({len(weights)}), got {len(gains)}")
    return list(zip(weights, gains, strict=True))


def preparation(
    weights: Sequence[Tensor],
    gains: "Sequence[Tensor | None] | None",
    memory_format: torch.memory_format,
    out: Sequence[Tensor] | None,
) -> None:
    """Weights, and for each a 0-dim gain or None, and a tensor that takes its effective weight."""
    function = "prepare_weights"
    for w in weights:
        weight(function, "weights", w)
    if gains is not None and len(gains) != len(weights):
        raise ValueError(f"{function}: gains must have one entry per weight ({len(weights)}), got {len(gains)}")
    for value in gains or ():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{function}: gains must be 0-dim tensors or None, got {type(value).__name__}")
        if value is not None:
            gain(function, value)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"{function}: memory_format must be contiguous_format or channels_last, got {memory_format}")
    if out is None:
        return
    if len(out) != len(weights):
        raise ValueError(f"{function}: out must have one entry per weight ({len(weights)}), got {len(out)}")
    for i, (w, target) in enumerate(zip(weights, out, strict=True)):
        floating(function, f"out[{i}]", target)
        if target.shape != w.shape or target.device != w.device:
            raise ValueError(
                f"{function}: out[{i}] must be {list(w.shape)} on {w.device}, "
                f"got {list(target.shape)} on {target.device}"
            )


def conv_arguments(
    x: Tensor,
    w: Tensor,
    gain_: "Tensor | float",
    prepared: bool,
    padding: "str | int | tuple[int, int]",
    dilation: "int | tuple[int, int]",
    groups: int,
) -> "int | tuple[int, int]":
    """Check a convolution's arguments and return its padding; "same" is dilation * (kernel size - 1) / 2."""
    function = "mp_conv2d"
    image(function, "x", x)
    weight(function, "w", w)
    gain_of_layer(function, gain_, prepared)
    if w.dim() != 4:
        raise ValueError(f"{function}: w must be [out, in / groups, height, width], got shape {list(w.shape)}")
    if groups < 1 or w.shape[0] % groups != 0:
        raise ValueError(f"{function}: groups must divide the {w.shape[0]} output channels, got {groups}")
    if x.shape[1] != w.shape[1] * groups:
        raise ValueError(
            f"{function}: x must have {w.shape[1] * groups} channels "
            f"for w of shape {list(w.shape)} and groups={groups}, got {x.shape[1]}"
        )
    _same_device(function, "x", x, "w", w)
    if not isinstance(padding, str):
        return padding
    if padding != "same":
        raise ValueError(f'{function}: padding must be "same" or a number of pixels, got "{padding}"')
    height, width = w.shape[2:]
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(f'{function}: padding "same" needs an odd kernel size, got {height} x {width}')
    dilation_y, dilation_x = (dilation, dilation) if isinstance(dilation, int) else dilation
    return dilation_y * (height // 2), dilation_x * (width // 2)


def linear_arguments(x: Tensor, w: Tensor, gain_: "Tensor | float", prepared: bool) -> None:
    """`x` is [..., in], `w` [out, in]."""
    function = "mp_linear"
    floating(function, "x", x)
    weight(function, "w", w)
    gain_of_layer(function, gain_, prepared)
    if w.dim() != 2:
        raise ValueError(f"{function}: w must be [out, in], got shape {list(w.shape)}")
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"{function}: x must be [..., {w.shape[1]}] for w of shape {list(w.shape)}, got {list(x.shape)}"
        )
    _same_device(function, "x", x, "w", w)


def gain_of_layer(function: str, gain_: "Tensor | float", prepared: bool) -> None:
    """A number or a 0-dim tensor; with a prepared weight 1."""
    gain(function, gain_)
    if prepared and (isinstance(gain_, Tensor) or gain_ != 1):
        raise ValueError(
            f"{function}: gain must be 1 with a prepared weight, whose gain is applied already, got {gain_}"
        )


def heads(function: str, qkv: Tensor, num_heads: int) -> None:
    """`qkv` is [N, 3*C, *] with C a multiple of the number of heads."""
    activation(function, "qkv", qkv)
    if num_heads < 1:
        raise ValueError(f"{function}: num_heads must be at least 1, got {num_heads}")
    if qkv.shape[1] == 0 or qkv.shape[1] % (3 * num_heads) != 0:
        raise ValueError(
            f"{function}: qkv must have 3 * num_heads * d channels, "
            f"got {qkv.shape[1]} channels and num_heads={num_heads}"
        )


def ema_lists(emas: Sequence[Sequence[Tensor]], params: Sequence[Tensor], one_minus_betas: Sequence[float]) -> None:
    """One list of averages per profile, each parallel to `params`."""
    function = "ema_update_"
    if len(emas) != len(one_minus_betas):
        raise ValueError(
            f"{function}: emas and one_minus_betas must have one entry per profile, "
            f"got {len(emas)} and {len(one_minus_betas)}"
        )
    for weight_ in one_minus_betas:
        if not 0 <= weight_ <= 1:
            raise ValueError(f"{function}: one_minus_betas must be in [0, 1], got {weight_}")
    shapes, devices = [param.shape for param in params], [param.device for param in params]
    for profile, averages in enumerate(emas):
        if len(averages) != len(params):
            raise ValueError(
                f"{function}: emas[{profile}] must have one tensor per parameter ({len(params)}), got {len(averages)}"
            )
        if [ema.shape for ema in averages] != shapes:
            i = next(i for i, ema in enumerate(averages) if ema.shape != shapes[i])
            raise ValueError(
                f"{function}: emas[{profile}][{i}] must have its parameter's shape {list(shapes[i])}, "
                f"got {list(averages[i].shape)}"
            )
        if [ema.device for ema in averages] != devices:
            i = next(i for i, ema in enumerate(averages) if ema.device != devices[i])
            raise ValueError(
                f"{function}: emas[{profile}][{i}] must be on its parameter's device {devices[i]}, "
                f"got {averages[i].device}"
            )
    for dtype in {tensor.dtype for tensors in (params, *emas) for tensor in tensors}:
        if not dtype.is_floating_point:
            raise TypeError(f"{function}: emas and params must be floating-point tensors, got {dtype}")


def coefficients(coefs: object) -> Tensor:
    """Snapshot coefficients as a float64 tensor on the CPU."""
    return torch.as_tensor(coefs, dtype=torch.float64, device="cpu")


def snapshots(inputs: Sequence[Tensor], coefs: Tensor, out: Tensor | None) -> None:
    """N equal-shaped inputs, coefs [N, M], out [M, *] float32; inputs on the CPU may go with an out on a GPU."""
    function = "accumulate_snapshots"
    if len(inputs) == 0:
        raise ValueError(f"{function}: inputs must not be empty")
    first = inputs[0]
    for i, x in enumerate(inputs):
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{function}: inputs[{i}] must be float16, bfloat16 or float32, got {x.dtype}")
        if x.shape != first.shape or x.device != first.device:
            raise ValueError(
                f"{function}: inputs[{i}] must be like inputs[0] ({list(first.shape)} on {first.device}), "
                f"got {list(x.shape)} on {x.device}"
            )
    if coefs.dim() != 2 or coefs.shape[0] != len(inputs):
        raise ValueError(f"{function}: coefs must be [{len(inputs)} inputs, outputs], got shape {list(coefs.shape)}")
    if out is not None:
        shape = (coefs.shape[1], *first.shape)
        if out.dtype != torch.float32:
            raise TypeError(f"{function}: out must be float32, got {out.dtype}")
        if out.shape != shape or (out.device != first.device and not (first.is_cpu and out.is_cuda)):
            raise ValueError(
                f"{function}: out must be {list(shape)} on {first.device}, got {list(out.shape)} on {out.device}"
            )
