"""Magnitude-preserving layers, power-function EMA and post-hoc EMA of EDM2, with native CPU and CUDA kernels.

`edm2ext.ops` holds the functions, `edm2ext.reference` the same in plain torch, `edm2ext.nn` the layers and
`edm2ext.phema` the averaging of weights. Importing needs neither a GPU nor a built library; `build_info()` says what is
there and why.
"""

from edm2ext import nn, ops, phema, reference
from edm2ext._library import build_info
from edm2ext.backend import get_backend, set_backend

__all__ = [
    "build_info",
    "get_backend",
    "nn",
    "ops",
    "phema",
    "reference",
    "set_backend",
]
