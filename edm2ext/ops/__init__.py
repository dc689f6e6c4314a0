"""The functions of EDM2, each call served by a native kernel where there is one, else by the plain-torch reference.

Section numbers in the docstrings are those of the project's EDM2 specification, equation numbers those of Karras et
al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696). Every differentiable
function supports double backward, forward-mode AD and torch.compile(fullgraph=True). Outputs keep the memory format of
the input.
"""

from edm2ext.ops.accumulate_snapshots import accumulate_snapshots
from edm2ext.ops.cosine_attention import cosine_attention
from edm2ext.ops.denoising_loss import denoising_loss
from edm2ext.ops.ema_update import ema_update_
from edm2ext.ops.mp_cat import mp_cat
from edm2ext.ops.mp_cat_conv2d import CatWith, mp_cat_conv2d
from edm2ext.ops.mp_conv2d import CosineAttention, ModulatedSiLU, SumWith, mp_conv2d, mp_linear
from edm2ext.ops.mp_fourier import mp_fourier
from edm2ext.ops.mp_silu import mp_silu, mp_silu_modulated
from edm2ext.ops.mp_sum import mp_sum
from edm2ext.ops.normalize_weight import effective_weight, force_normalize_, normalize_weight, prepare_weights
from edm2ext.ops.pixel_norm import pixel_norm
from edm2ext.ops.precondition import precondition_input, precondition_output
from edm2ext.ops.prepared_weight import prepared_weight
from edm2ext.ops.resample import resample_down, resample_up
from edm2ext.ops.resample_down_pixel_norm import resample_down_pixel_norm
from edm2ext.ops.sampler_step import NetworkInput, sampler_step

__all__ = [
    "CatWith",
    "CosineAttention",
    "ModulatedSiLU",
    "NetworkInput",
    "SumWith",
    "accumulate_snapshots",
    "cosine_attention",
    "denoising_loss",
    "effective_weight",
    "ema_update_",
    "force_normalize_",
    "mp_cat",
    "mp_cat_conv2d",
    "mp_conv2d",
    "mp_fourier",
    "mp_linear",
    "mp_silu",
    "mp_silu_modulated",
    "mp_sum",
    "normalize_weight",
    "pixel_norm",
    "precondition_input",
    "precondition_output",
    "prepare_weights",
    "prepared_weight",
    "resample_down",
    "resample_down_pixel_norm",
    "resample_up",
    "sampler_step",
]
