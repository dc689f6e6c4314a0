"""The functions of EDM2, each by the best backend for its input."""

from edm2ext.reference import (
    accumulate_snapshots,
    cosine_attention,
    effective_weight,
    ema_update_,
    force_normalize_,
    mp_cat,
    mp_conv2d,
    mp_fourier,
    mp_linear,
    mp_silu,
    mp_silu_modulated,
    mp_sum,
    normalize_weight,
    pixel_norm,
    resample_down,
    resample_up,
)

__all__ = [
    "accumulate_snapshots",
    "cosine_attention",
    "effective_weight",
    "ema_update_",
    "force_normalize_",
    "mp_cat",
    "mp_conv2d",
    "mp_fourier",
    "mp_linear",
    "mp_silu",
    "mp_silu_modulated",
    "mp_sum",
    "normalize_weight",
    "pixel_norm",
    "resample_down",
    "resample_up",
]
