"""Magnitude-preserving layers for anyone's model. Parameter and buffer names are those of released EDM2 networks."""

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from edm2ext import backend, ops
from edm2ext.ops.mp_cat_conv2d import CatWith, cat_conv2d_of_prepared, mp_cat_conv2d
from edm2ext.ops.mp_conv2d import Then, conv2d_of_prepared
from edm2ext.ops.prepared_weight import Gradients
from edm2ext.reference import product_dtype

_PREPARE_KERNELS = backend.kernels("prepare_weights")
Mode = Literal["forward", "step", "off"]
_MODES = ("forward", "step", "off")
_mode: Mode = "forward"


class force_normalization:
    """Say who applies forced weight normalisation (2.6 step 2, Eq. 66), for the whole process.

    "forward" (the default): every layer overwrites its weight by its normalised value when called in training mode with
    gradients enabled. "step": the optimizer does it after its step. "off": nobody does. Takes effect at once; used in a
    `with` statement, the previous mode returns at the end of the block.

    Raises ValueError for any other mode.
    """

    def __init__(self, mode: Mode) -> None:
        global _mode
        if mode not in _MODES:
            raise ValueError(f"force_normalization: mode must be one of {', '.join(_MODES)}, got {mode!r}")
        self._previous = _mode
        _mode = mode

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _mode
        _mode = self._previous


def forces_in_forward(training: bool) -> bool:
    """Whether a layer in the given mode overwrites its weight when called now."""
    return training and _mode == "forward" and torch.is_grad_enabled()


class Prepared(NamedTuple):
    """A layer's effective weight, made in advance by PreparedWeights; None: the layer makes it, forces nothing."""

    effective: Tensor | None
    gain: "Tensor | float"
    gradients: Gradients


class Layer(nn.Module):
    """What MPConv and MPLinear share: a raw weight, of which they use the effective one (2.6)."""

    weight: nn.Parameter
    prepared: Prepared | None = None

    def effective_weight(self, gain: "Tensor | float" = 1, dtype: torch.dtype | None = None) -> Tensor:
        """The weight to multiply with, [out, in, ...] in `dtype` (default: the weight's): prepared, or made now, after
        forced normalisation where it is due (2.6). Raises ValueError if it is prepared with another gain."""
        if self.prepared is None:
            if forces_in_forward(self.training):
                ops.force_normalize_(self.weight)
            return ops.effective_weight(self.weight, gain, dtype)
        self.check_gain(gain)
        effective, _, gradients = self.prepared
        if effective is None:
            return ops.effective_weight(self.weight, gain, dtype)
        weight = ops.prepared_weight(self.weight, effective, gain, gradients=gradients)
        return weight if dtype is None else weight.to(dtype)

    def check_gain(self, gain: "Tensor | float") -> None:
        """Raises ValueError if the weight is prepared with another gain."""
        made_with = gain if self.prepared is None else self.prepared.gain
        if gain is not made_with and (isinstance(gain, Tensor) or gain != made_with):
            raise ValueError(f"{type(self).__name__}: the weight is prepared with another gain than this call's")


class PreparedWeights:
    """The effective weights of all layers of a module, made in one pass instead of layer by layer.

    In a `with` block the module's MPConv and MPLinear layers use what the last `refresh` made, in forward and backward
    passes; their weights are not force-normalised when they are called. ``gains`` says which layer's weight is
    multiplied by which gain (others: 1). MPConv weights are made in ``dtype`` and ``memory_format``, MPLinear weights
    in ``linear_dtype``. ``gradients``: see `ops.prepared_weight`.
    """

    def __init__(
        self,
        module: nn.Module,
        gains: "Mapping[Layer, Tensor] | None" = None,
        dtype: torch.dtype = torch.float32,
        *,
        linear_dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        gradients: Gradients = "raw",
    ) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, Layer)]
        self.gains = [(gains or {}).get(layer, 1) for layer in self.layers]
        self.gradients: Gradients = gradients
        self.memory_format = memory_format
        self.effective: list[Tensor] | None = None
        self.dtypes = [dtype if isinstance(layer, MPConv) else linear_dtype for layer in self.layers]

    @property
    def gain_of(self) -> dict[nn.Parameter, Tensor]:
        """The gains that are tensors, by the weights they multiply: the argument `gains` of `optim.FusedAdam`."""
        pairs = zip(self.layers, self.gains, strict=True)
        return {layer.weight: gain for layer, gain in pairs if isinstance(gain, Tensor)}

    @property
    def effective_of(self) -> dict[nn.Parameter, Tensor]:
        """What the last `refresh` made, by the weights it was made of: the argument `prepared` of `optim.FusedAdam`."""
        pairs = zip(self.layers, self.effective or (), strict=bool(self.effective))
        return {layer.weight: effective for layer, effective in pairs}

    def refresh(self, force: bool = False) -> None:
        """Make the effective weights of the present weights and gains; with `force`, of the weights force-normalised
        first, in place (2.6 step 2)."""
        weights = [layer.weight for layer in self.layers]
        if self.gradients == "raw" and not backend.native(weights[0], _PREPARE_KERNELS):
            # Plain torch would make them twice, once more for the gradients.
            if force:
                ops.force_normalize_(weights)
            self.effective = None
            return
        if self.effective is None:
            self.effective = [
                torch.empty_like(w, dtype=dtype, requires_grad=False, memory_format=self._format_of(w))
                for w, dtype in zip(weights, self.dtypes, strict=True)
            ]
        gains = [gain if isinstance(gain, Tensor) else None for gain in self.gains]
        ops.prepare_weights(weights, gains, force=force, out=self.effective)

    def _format_of(self, weight: Tensor) -> torch.memory_format:
        return self.memory_format if weight.dim() == 4 else torch.contiguous_format

    def __enter__(self) -> "PreparedWeights":
        if self.effective is None:
            self.refresh()
        made = self.effective or [None] * len(self.layers)
        for layer, effective, gain in zip(self.layers, made, self.gains, strict=True):
            layer.prepared = Prepared(effective, gain, self.gradients)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer in self.layers:
            layer.prepared = None


def _randn(*shape: int) -> Tensor:
    """torch.randn; without values on the device "meta", where arithmetic imports compilers for seconds."""
    values = torch.empty(*shape)
    return values if values.is_meta else values.normal_()


class MPConv(Layer):
    """Magnitude-preserving 2-D convolution without bias, zero-padded to keep the size (2.6, Eqs. 47 and 66).

    The weight [out_channels, in_channels / groups, kernel_size, kernel_size] starts as N(0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if in_channels % groups != 0 or out_channels % groups != 0:
            raise ValueError(
                f"MPConv: groups must divide in_channels={in_channels} and out_channels={out_channels}, got {groups}"
            )
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.weight = nn.Parameter(_randn(out_channels, in_channels // groups, kernel_size, kernel_size))

    def forward(
        self, x: Tensor, gain: "Tensor | float" = 1, then: Then | None = None, first: CatWith | None = None
    ) -> "Tensor | tuple[Tensor, Tensor]":
        """x [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]; gain multiplies the weight, `then` is
        applied to the result (`ops.mp_conv2d`).

        With `first`, x and first.b are two parts of the input, and the result is a pair: that for their concatenation,
        and mp_silu of the concatenation (`ops.mp_cat_conv2d`); `then` must be None."""
        if first is not None and then is not None:
            raise ValueError("MPConv: either `then` or `first` must be None")
        options = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        if self.prepared is None:
            if forces_in_forward(self.training):
                ops.force_normalize_(self.weight)
        else:
            self.check_gain(gain)
            effective, _, gradients = self.prepared
            if effective is not None:
                made = (self.weight, effective, gain, gradients)
                if first is not None:
                    return cat_conv2d_of_prepared(x, first.b, *made, first.t, **options)
                return conv2d_of_prepared(x, *made, **options, then=then)
        if first is not None:
            return mp_cat_conv2d(x, first.b, self.weight, gain, first.t, **options)
        return ops.mp_conv2d(x, self.weight, gain, **options, then=then)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"


class MPLinear(Layer):
    """Magnitude-preserving linear layer without bias (2.6, Eqs. 47 and 66).

    The weight [out_features, in_features] starts as N(0, 1).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_randn(out_features, in_features))

    def forward(self, x: Tensor, gain: "Tensor | float" = 1) -> Tensor:
        """x [..., in_features] -> [..., out_features]; gain multiplies the weight."""
        return ops.mp_linear(x, self.effective_weight(gain, product_dtype(x)), prepared=True)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}"


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude (2.5, Eq. 75).

    The buffers are fixed: frequencies 2 pi * bandwidth * N(0, 1), phases uniform in [0, 2 pi).
    """

    def __init__(self, num_channels: int, bandwidth: float = 1) -> None:
        super().__init__()
        freqs, phases = torch.empty(num_channels), torch.empty(num_channels)
        if not freqs.is_meta:
            freqs, phases = 2 * math.pi * freqs.normal_() * bandwidth, 2 * math.pi * phases.uniform_()
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", phases)

    def forward(self, x: Tensor) -> Tensor:
        """x [N] -> [N, num_channels]."""
        return ops.mp_fourier(x, self.freqs, self.phases)

    def extra_repr(self) -> str:
        return f"num_channels={len(self.freqs)}"
