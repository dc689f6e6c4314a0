"""What a run was computed by: recorded beside its options, and free to change when it continues."""

from __future__ import annotations

import importlib.metadata
import platform

import numpy as np
import torch

import edm2ext


def versions(device: torch.device) -> dict[str, str]:
    """Of this program, its kernels and what they run on, by name."""
    info = edm2ext.build_info()
    build = info.get("build") or {}
    kernels = f"{info['cpu_isa']}, {build.get('compiler', '?')}" if info["native"] else f"none: {info['reason']}"
    return {
        "edm2ext": importlib.metadata.version("edm2ext"),
        "kernels": kernels + (f", CUDA {info['cuda_toolkit']} for {info['cuda_archs']}" if info["cuda"] else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
