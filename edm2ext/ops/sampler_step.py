"""A step of the sampler (specification 6.1, 6.2): Euler and Heun, guidance, churn and the network's next input."""

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output
from edm2ext.ops.precondition import precondition_input
from edm2ext.reference import NetworkInput

_step = backend.op("sampler_step")
_step_input = backend.op("sampler_step_input")
_KERNELS = backend.kernels("sampler_step", "sampler_step_input")


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
    network: NetworkInput | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One update of the sampler from noise level t_hat to t_next, in one pass (6.1; 6.2, Eq. 152).

    Without `start`: Euler's step x + (t_next - t_hat) * (x - D) / t_hat, D being denoised at x and t_hat. With
    `start`, x must be the result of that step from `start`, and `denoised` belong to x and t_next: the result is Heun's
    correction, start + (t_next - t_hat) * (d + d') / 2. With `guide`, D = guide + guidance * (denoised - guide).
    `noise`, standard normal, is what a step from t_next * (1 + churn) begins with: it is added to the result, times
    S_noise * t_next * sqrt((1 + churn)^2 - 1).

    All images have one shape and dtype, in layouts of their own: [N, C, H, W], or any other, for which the reference
    serves. The noise levels are tensors of one element,
    which the host never waits for. Returns the result in x's memory format and, for `network`, its
    `precondition_input` at t_next * (1 + churn), else None. Where a gradient is asked for, the reference serves. Raises
    ValueError or TypeError if a shape, dtype or device does not fit or churn is negative.
    """
    checks.sampler_step(x, denoised, t_hat, t_next, guide, start, noise, churn)
    given = [tensor for tensor in (x, denoised, t_hat, t_next, guide, start, noise) if tensor is not None]
    served = x.dim() == 4 and x.dtype in _IMAGE_DTYPES and backend.native(x, _KERNELS)
    if not served or backend.needs_gradient(*given):
        blend = {"guide": guide, "guidance": guidance}
        after = {"noise": noise, "churn": churn, "S_noise": S_noise}
        out = reference.sampler_step(x, denoised, t_hat, t_next, start=start, **blend, **after)
        return out, _input(out, t_next, churn, network)
    noise_scale = S_noise * (churn * (2 + churn)) ** 0.5
    step = (x, denoised, guide, guidance, start, t_hat, t_next, noise, noise_scale)
    if network is not None and reference.image_dtype(network.dtype) == x.dtype and network.dtype in backend.dtypes(x):
        channels_last = network.memory_format == torch.channels_last
        return _step_input(*step, churn, network.sigma_data, network.dtype, channels_last)
    out = _step(*step)
    return out, _input(out, t_next, churn, network)


_IMAGE_DTYPES = (torch.float32, torch.float64)


def _input(x: Tensor, t_next: Tensor, churn: float, network: NetworkInput | None) -> Tensor | None:
    return None if network is None else precondition_input(x, t_next * (1 + churn), *network)


@backend.fake("sampler_step")
def _(
    x: Tensor,
    denoised: Tensor,
    guide: Tensor | None,
    guidance: float,
    start: Tensor | None,
    t_hat: Tensor,
    t_next: Tensor,
    noise: Tensor | None,
    noise_scale: float,
) -> Tensor:
    torch._check(x.shape == denoised.shape)
    return empty_output(x)


@backend.fake("sampler_step_input")
def _(
    x: Tensor,
    denoised: Tensor,
    guide: Tensor | None,
    guidance: float,
    start: Tensor | None,
    t_hat: Tensor,
    t_next: Tensor,
    noise: Tensor | None,
    noise_scale: float,
    churn: float,
    sigma_data: float,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, channels + 1, height, width)
    return empty_output(x), torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
