"""The EDM2 denoiser: block, U-Net and preconditioning (spec sections 2.8-3.4; EDM2 paper, configuration G).

Parameter names, shapes and order are the official state-dict layout (spec 9.5), and construction draws random
numbers in definition order (spec 4.6), so weights load by name and a seed gives the same network everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from edm2ext import ops
from edm2ext.nn import Layer, MPConv, MPFourier, MPLinear, PreparedWeights, force_normalization
from edm2ext.ops.prepared_weight import Gradients


class Block(torch.nn.Module):
    """One residual block with optional resampling and cosine self-attention (spec 3.2).

    ``flavor="enc"`` projects with a 1x1 convolution and pixel-normalises before the residual branch; ``flavor="dec"``
    feeds the residual branch with the wide input and projects the main branch after it. Attention is asked for by
    ``attention`` and exists only where ``out_channels // channels_per_head`` is positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: Literal["enc", "dec"] = "enc",
        resample_mode: Literal["keep", "up", "down"] = "keep",
        resample_filter: Sequence[float] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        if flavor not in ("enc", "dec"):
            raise ValueError(f"Block: flavor must be 'enc' or 'dec', got {flavor!r}")
        if resample_mode not in ("keep", "up", "down"):
            raise ValueError(f"Block: resample_mode must be 'keep', 'up' or 'down', got {resample_mode!r}")
        self.flavor = flavor
        self.resample_mode = resample_mode
        self.resample_filter = tuple(resample_filter)
        self.num_heads = out_channels // channels_per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(f"Block: {out_channels} channels cannot be split into {self.num_heads} attention heads")
        self.dropout = dropout
        self.dropout_index = 0  # the block's number in its network: no two draw the same dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel_size=3)
        self.emb_linear = MPLinear(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, kernel_size=3)
        self.conv_skip = MPConv(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel_size=1) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel_size=1) if self.num_heads else None

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        cat: ops.CatWith | None = None,
        philox: Tensor | None = None,
        twice: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map x [N, in_channels, H, W] and the modulation c [N, out_channels] to [N, out_channels, H', W'], all of x's
        dtype.

        ``cat`` is what x is concatenated with first, to in_channels (decoder blocks that keep the resolution).
        ``philox`` is what `ops.mp_silu_modulated` draws dropout from, needed in training if there is any. With
        ``twice`` the result is returned twice, for two users, as `ops.mp_sum` does.
        """
        x_silu = None
        projected = cat is not None and self.conv_skip is not None
        if cat is not None:
            if self.flavor == "enc" or self.resample_mode != "keep":
                raise ValueError("Block: cat is for decoder blocks that keep the resolution")
            x, x_silu = cat(x) if self.conv_skip is None else self.conv_skip(x, first=cat)
        normalised_with_resampling = self.flavor == "enc" and self.resample_mode == "down" and self.conv_skip is None
        if normalised_with_resampling:
            x, x_silu = ops.resample_down_pixel_norm(x, self.resample_filter)
        elif self.resample_mode == "down":
            x = ops.resample_down(x, self.resample_filter)
        elif self.resample_mode == "up":
            x = ops.resample_up(x, self.resample_filter)
        if self.flavor == "enc" and not normalised_with_resampling:
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x, x_silu = ops.pixel_norm(x, silu=True)
        elif x_silu is None:
            x_silu = ops.mp_silu(x)

        if self.training and self.dropout > 0:
            y = ops.mp_silu_modulated(self.conv_res0(x_silu), c, self.dropout, philox, self.dropout_index)
        else:
            y = self.conv_res0(x_silu, then=ops.ModulatedSiLU(c))
        if self.flavor == "dec" and self.conv_skip is not None and not projected:
            x = self.conv_skip(x)
        if self.attn_qkv is None or self.attn_proj is None:
            return self.conv_res1(y, then=ops.SumWith(x, self.res_balance, self.clip_act, twice))
        x, skip = self.conv_res1(y, then=ops.SumWith(x, self.res_balance, twice=True))
        y = self.attn_qkv(x, then=ops.CosineAttention(self.num_heads))
        return self.attn_proj(y, then=ops.SumWith(skip, self.attn_balance, self.clip_act, twice))


class UNet(torch.nn.Module):
    """The raw network F (spec 3.1, 3.3): embedding, encoder with skips, decoder, output convolution.

    Further keyword arguments go to every :class:`Block`. Non-square inputs are legal as long as both sides are
    divisible by ``2 ** (len(channel_mult) - 1)``. With ``recompute``, a training forward keeps of each block only its
    input, and the backward pass computes the block again: less memory for a third more arithmetic, and the same
    gradients bit for bit, dropout included.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        channel_mult_noise: float | None = None,
        channel_mult_emb: float | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(channel_mult) - 1)
        if img_resolution % self.stride:
            raise ValueError(
                f"UNet: img_resolution {img_resolution} is not divisible by {self.stride}, which the "
                f"{len(channel_mult)} levels of channel_mult {list(channel_mult)} need"
            )
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.recompute = False
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.dropout = float(block_kwargs.get("dropout", 0))
        widths = [int(model_channels * mult) for mult in channel_mult]
        cnoise = int(model_channels * channel_mult_noise) if channel_mult_noise is not None else widths[0]
        cemb = int(model_channels * channel_mult_emb) if channel_mult_emb is not None else max(widths)

        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPLinear(cnoise, cemb)
        self.emb_label = MPLinear(label_dim, cemb) if label_dim else None

        self.enc = torch.nn.ModuleDict()
        skip_widths: list[int] = []
        width = img_channels + 1
        for level, level_width in enumerate(widths):
            res = img_resolution >> level
            attention = res in attn_resolutions
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(width, level_width, kernel_size=3)
                width = level_width
            else:
                self.enc[f"{res}x{res}_down"] = Block(width, width, cemb, "enc", "down", **block_kwargs)
            skip_widths.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = Block(
                    width, level_width, cemb, "enc", attention=attention, **block_kwargs
                )
                width = level_width
                skip_widths.append(width)

        self.dec = torch.nn.ModuleDict()
        for level, level_width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            attention = res in attn_resolutions
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(width, width, cemb, "dec", attention=True, **block_kwargs)
                self.dec[f"{res}x{res}_in1"] = Block(width, width, cemb, "dec", **block_kwargs)
            else:
                self.dec[f"{res}x{res}_up"] = Block(width, width, cemb, "dec", "up", **block_kwargs)
            for index in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{index}"] = Block(
                    width + skip_widths.pop(), level_width, cemb, "dec", attention=attention, **block_kwargs
                )
                width = level_width
        self.out_conv = MPConv(width, img_channels, kernel_size=3)
        for index, block in enumerate(block for block in self.modules() if isinstance(block, Block)):
            block.dropout_index = index

    def embedding(self, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        """Noise level [N] or [1] and one-hot labels [N or 1, label_dim] to emb [N or 1, cemb], fp32 (spec 3.1)."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            if class_labels is None:
                class_labels = torch.zeros([1, self.label_dim], device=emb.device)
            labels = self.emb_label(class_labels * self.label_dim**0.5)
            emb, labels = torch.broadcast_tensors(emb, labels)
            emb = ops.mp_sum(emb, labels, t=self.label_balance)
        return ops.mp_silu(emb)

    def modulations(self, emb: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What each block scales its residual branch by: c = emb_linear(emb) + 1 (spec 2.8), [N, out_channels] each.

        One product with the rows of all blocks' weights, in emb's dtype; the results are cast to ``dtype``.
        """
        blocks = [block for block in (*self.enc.values(), *self.dec.values()) if isinstance(block, Block)]
        weight = torch.cat([block.emb_linear.effective_weight(block.emb_gain, emb.dtype) for block in blocks])
        c = torch.nn.functional.linear(emb, weight, bias=emb.new_ones(weight.shape[0]))
        return torch.split_with_sizes_copy(c.to(dtype), [block.emb_linear.weight.shape[0] for block in blocks], dim=1)

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F: x [N, img_channels, H, W] in the compute dtype; noise_labels [N] or [1] and class_labels
        [N or 1, label_dim] in fp32. Returns [N, img_channels, H, W] in x's dtype.

        x may come with its constant channel of ones (spec 2.14) as `ops.precondition_input` makes it; else it gets it
        here. Training with dropout draws two integers from the global generator of x's device."""
        if x.shape[1] == self.img_channels:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        emb = self.embedding(noise_labels, class_labels).expand(x.shape[0], -1)
        modulations = iter(self.modulations(emb, x.dtype))
        philox = None
        if self.training and self.dropout > 0:
            philox = torch.randint(2**63 - 1, [2], device=x.device)
        run = _recomputed if self.recompute and self.training and torch.is_grad_enabled() else _kept
        skips: list[Tensor] = []
        for block in self.enc.values():
            if not isinstance(block, Block):
                x = skip = block(x)
            elif torch.is_grad_enabled():
                x, skip = run(block, x, next(modulations), None, philox, True)
            else:  # hooks see a tensor
                x = skip = block(x, next(modulations), None, philox)
            skips.append(skip)
        for name, block in self.dec.items():
            if "block" in name:
                x = run(self._with_skip, block, x, skips.pop(), next(modulations), philox)
            else:
                x = run(block, x, next(modulations), None, philox)
        return self.out_conv(x, gain=self.out_gain)

    def _with_skip(self, block: Block, x: Tensor, skip: Tensor, c: Tensor, philox: Tensor | None) -> Tensor:
        """A block of the decoder, fed with the skip connection too."""
        return block(x, c, ops.CatWith(skip, self.concat_balance), philox)


def _kept(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def _recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """The function's value; for the backward pass it is computed again, from inputs that hold all randomness."""
    # All of it, or hooks at the function's end (FSDP's) would not run.
    with set_checkpoint_early_stop(False):
        return checkpoint(
            function,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), _normalised_already()),
        )


@contextlib.contextmanager
def _normalised_already() -> Iterator[None]:
    with force_normalization("off"):
        yield


class Precond(torch.nn.Module):
    """Preconditioned denoiser D(x; sigma, c) with learned uncertainty u(sigma) (spec 3.4; EDM2 paper Eqs. 4-8, 14).

    ``unet_kwargs`` go to :class:`UNet`. ``config`` records the constructor's arguments; ``Precond(**net.config)``
    builds the same network. ``compute_dtype`` is the dtype of the U-Net's main path: float16 with ``use_fp16``, else
    float32; training in bfloat16 sets it. float16 falls back to float32 on a CPU.
    ``memory_format`` is that of the U-Net's activations: every layer keeps its input's. (Measured on a CPU:
    channels_last saves a tenth of a training step with native kernels, and nothing without; weights stay contiguous.)
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: Any,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "use_fp16": use_fp16,
            "sigma_data": sigma_data,
            "logvar_channels": logvar_channels,
            **unet_kwargs,
        }
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.sigma_data = sigma_data
        self.compute_dtype = torch.float16 if use_fp16 else torch.float32
        self.memory_format = torch.channels_last
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPLinear(logvar_channels, 1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Denoise x [N, img_channels, H, W] at noise level sigma (scalar, [1] or [N], any shape).

        ``class_labels`` [N or 1, label_dim] one-hot: a conditional network called without them sees zeros, an
        unconditional one ignores them. Returns D [N, img_channels, H, W] in fp32, and with ``return_logvar``
        also u [N or 1, 1, 1, 1]. Raises ValueError where shapes do not fit.
        """
        sigma, class_labels = self._check(x, sigma, class_labels)
        x_in = ops.precondition_input(x, sigma, *self.network_input(x.device, force_fp32))
        D_x = self.denoise(x, sigma, class_labels, x_in)
        return (D_x, self._logvar(sigma)) if return_logvar else D_x

    def denoise(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, x_in: Tensor) -> Tensor:
        """D(x), given the U-Net's input ``x_in``, which the sampler makes in a pass of its own. Arguments as in
        :meth:`forward`."""
        sigma, class_labels = self._check(x, sigma, class_labels)
        F_x = self.unet(x_in, _c_noise(sigma), class_labels)
        return ops.precondition_output(x.to(torch.float32), F_x, sigma, self.sigma_data)

    def raw(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the training loss is made of (`ops.denoising_loss`): F [N, img_channels, H, W] in the compute dtype, and
        u(sigma) [N or 1, 1, 1, 1]. Arguments as in :meth:`forward`."""
        sigma, class_labels = self._check(x, sigma, class_labels)
        x_in = ops.precondition_input(x, sigma, *self.network_input(x.device))
        return self.unet(x_in, _c_noise(sigma), class_labels), self._logvar(sigma)

    def network_input(self, device: torch.device, force_fp32: bool = False) -> ops.NetworkInput:
        """How the U-Net takes its input on this device."""
        dtype = torch.float32 if force_fp32 else self._dtype_on(device)
        return ops.NetworkInput(self.sigma_data, dtype, self.memory_format)

    def _logvar(self, sigma: Tensor) -> Tensor:
        return self.logvar_linear(self.logvar_fourier(_c_noise(sigma))).reshape(-1, 1, 1, 1)

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype of the U-Net's main path: float16 is for GPUs."""
        on_gpu = device.type in ("cuda", "meta")
        return self.compute_dtype if on_gpu or self.compute_dtype != torch.float16 else torch.float32

    def prepared_weights(self, gradients: Gradients = "raw") -> PreparedWeights:
        """The effective weights of all layers, to be made in one pass: convolutions' in the compute dtype."""
        blocks = [block for block in self.unet.modules() if isinstance(block, Block)]
        gains: dict[Layer, Tensor] = {block.emb_linear: block.emb_gain for block in blocks}
        gains[self.unet.out_conv] = self.unet.out_gain
        dtype = self._dtype_on(self.unet.out_gain.device)
        return PreparedWeights(self, gains, dtype, memory_format=self.memory_format, gradients=gradients)

    def baked(self) -> PreparedWeights:
        """For inference: in a `with` block, normalisation, gain and cast of every weight are folded in, once, instead
        of at every call. The network must not be changed or differentiated in it."""
        return self.prepared_weights(gradients="effective")

    def _check(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Validate the call's shapes; sigma [N or 1, 1, 1, 1] in fp32, and the labels the U-Net shall see."""
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        stride = self.unet.stride
        if x.ndim != 4 or x.shape[1] != self.img_channels:
            raise ValueError(f"Precond: x must be [N, {self.img_channels}, H, W], got {list(x.shape)}")
        if x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(f"Precond: height and width of x must be divisible by {stride}, got {list(x.shape[2:])}")
        if sigma.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"Precond: sigma must have 1 or {x.shape[0]} elements, got {sigma.shape[0]}")
        if self.label_dim == 0 or class_labels is None:
            return sigma, None
        labels = class_labels.to(torch.float32).reshape(-1, class_labels.shape[-1])
        if labels.shape[1] != self.label_dim or labels.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"Precond: class_labels must be [{x.shape[0]} or 1, {self.label_dim}], got {list(class_labels.shape)}"
            )
        return sigma, labels


def _c_noise(sigma: Tensor) -> Tensor:
    """The U-Net's noise label ln(sigma) / 4 (EDM2 paper Eq. 8), flat."""
    return sigma.flatten().log() / 4
