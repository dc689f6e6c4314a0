"""EDM2's network as a sequence of plain torch ops, one for each step of its formulae, in the order of the published
description: what the authors' configuration launches (NCHW, explicit attention products, layers that normalise their
own weights at every call). Parameters are those of a `Precond`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext.nn import MPConv, MPFourier, MPLinear
from python_train.network import Block, Precond

EPS = 1e-4


class PlainNetwork:
    """`Precond.forward` in ``net.compute_dtype`` on a GPU, or where ``dtype`` says so.

    ``tuned``: with what anybody would try first, activations in channels_last and torch's fused attention.
    """

    def __init__(self, net: Precond, dtype: torch.dtype | None = None, tuned: bool = False) -> None:
        self.net = net
        self.dtype = dtype
        self.tuned = tuned

    def __call__(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, return_logvar: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """D(x; sigma) [N, C, H, W] in fp32, with ``return_logvar`` also u(sigma) [N, 1, 1, 1] (3.4)."""
        net, sigma_data = self.net, self.net.sigma_data
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        c_in = 1 / (sigma_data**2 + sigma**2).sqrt()
        c_noise = sigma.flatten().log() / 4
        x_in = (c_in * x).to(self.dtype or net.network_input(x.device).dtype)
        if self.tuned:
            x_in = x_in.contiguous(memory_format=torch.channels_last)
        denoised = c_skip * x + c_out * unet(net, x_in, c_noise, class_labels, self.tuned).to(torch.float32)
        if not return_logvar:
            return denoised
        logvar = linear(net.logvar_linear, fourier(net.logvar_fourier, c_noise)).reshape(-1, 1, 1, 1)
        return denoised, logvar


class TunedNetwork:
    """The same with what anybody would try first: channels_last, fused attention, torch.compile.

    Weights are normalised before the compiled part: with the mutation inside, inductor (torch 2.13, CPU) computes other
    gradients and leaves other weights than eager torch.
    """

    def __init__(self, net: Precond) -> None:
        self.net = net.to(memory_format=torch.channels_last)
        self.layers = [layer for layer in net.modules() if isinstance(layer, MPConv | MPLinear)]
        self.compiled = torch.compile(PlainNetwork(net, tuned=True), dynamic=False)

    def __call__(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, return_logvar: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `PlainNetwork`."""
        if self.net.training:
            with torch.no_grad():
                for layer in self.layers:
                    layer.weight.copy_(normalize(layer.weight))
        for layer in self.layers:
            layer.eval()
        return self.compiled(x, sigma, class_labels, return_logvar=return_logvar)


def unet(
    net: Precond, x: Tensor, c_noise: Tensor, class_labels: Tensor | None, fused_attention: bool = False
) -> Tensor:
    """F (3.1, 3.3)."""
    u = net.unet
    emb = linear(u.emb_noise, fourier(u.emb_fourier, c_noise))
    if u.emb_label is not None:
        emb = mp_sum(emb, linear(u.emb_label, class_labels * math.sqrt(class_labels.shape[1])), u.label_balance)
    emb = mp_silu(emb)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    skips = []
    for block in u.enc.values():
        x = run_block(block, x, emb, fused_attention) if isinstance(block, Block) else conv(block, x)
        skips.append(x)
    for name, block in u.dec.items():
        if "block" in name:
            x = mp_cat(x, skips.pop(), u.concat_balance)
        x = run_block(block, x, emb, fused_attention)
    return conv(u.out_conv, x, gain=u.out_gain)


def run_block(block: Block, x: Tensor, emb: Tensor, fused_attention: bool = False) -> Tensor:
    """A block (3.2)."""
    x = resample(x, block.resample_mode)
    if block.flavor == "enc":
        if block.conv_skip is not None:
            x = conv(block.conv_skip, x)
        x = normalize(x, dims=(1,))
    y = conv(block.conv_res0, mp_silu(x))
    c = linear(block.emb_linear, emb, gain=block.emb_gain) + 1
    y = mp_silu(y * c.unsqueeze(2).unsqueeze(3).to(y.dtype))
    if block.dropout > 0 and block.training:
        y = F.dropout(y, p=block.dropout)
    y = conv(block.conv_res1, y)
    if block.flavor == "dec" and block.conv_skip is not None:
        x = conv(block.conv_skip, x)
    x = mp_sum(x, y, block.res_balance)
    if block.attn_qkv is not None and block.attn_proj is not None:
        y = attention(conv(block.attn_qkv, x), block.num_heads, fused_attention)
        x = mp_sum(x, conv(block.attn_proj, y), block.attn_balance)
    return x if block.clip_act is None else x.clip_(-block.clip_act, block.clip_act)


def attention(qkv: Tensor, heads: int, fused: bool = False) -> Tensor:
    """Cosine attention by explicit products (2.12), or by torch's fused attention."""
    n, channels, height, width = qkv.shape
    q, k, v = normalize(qkv.reshape(n, heads, -1, 3, height * width), dims=(2,)).unbind(3)
    if fused:
        y = F.scaled_dot_product_attention(*(t.transpose(2, 3) for t in (q, k, v)))
        return y.transpose(2, 3).reshape(n, channels // 3, height, width)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, channels // 3, height, width)


def normalize(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """2.1."""
    dims = tuple(range(1, x.dim())) if dims is None else dims
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    norm = torch.add(EPS, norm, alpha=math.sqrt(norm.numel() / x.numel()))
    return x / norm.to(x.dtype)


def weight(layer: MPConv | MPLinear, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
    """2.6, steps 1 to 5."""
    w = layer.weight.to(torch.float32)
    if layer.training:
        with torch.no_grad():
            layer.weight.copy_(normalize(w))
    w = normalize(w)
    return (w * (gain / math.sqrt(w[0].numel()))).to(dtype)


def conv(layer: MPConv, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    w = weight(layer, gain, x.dtype)
    return F.conv2d(x, w, padding=w.shape[2] // 2)


def linear(layer: MPLinear, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return x @ weight(layer, gain, x.dtype).t()


def fourier(layer: MPFourier, x: Tensor) -> Tensor:
    """2.5."""
    y = x.to(torch.float32).outer(layer.freqs.to(torch.float32)) + layer.phases.to(torch.float32)
    return (y.cos() * math.sqrt(2)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    total = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([total / math.sqrt(a.shape[1]) * (1 - t) * a, total / math.sqrt(b.shape[1]) * t * b], dim=1)


def resample(x: Tensor, mode: str) -> Tensor:
    """With the filter [1, 1] (2.11)."""
    if mode == "keep":
        return x
    channels = x.shape[1]
    f = torch.full([channels, 1, 2, 2], 0.25 if mode == "down" else 1.0, dtype=x.dtype, device=x.device)
    if mode == "down":
        return F.conv2d(x, f, groups=channels, stride=2)
    return F.conv_transpose2d(x, f, groups=channels, stride=2)
