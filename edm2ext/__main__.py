"""`python -m edm2ext`: what is installed and built, and why."""

import sys

from edm2ext import build_info


def describe(info: dict[str, object]) -> str:
    """The lines that `make setup` and CI print."""
    cuda = "yes" if info["cuda"] else f"no ({info['cuda_reason']})"
    native = info["library"] if info["native"] else f"no ({info['reason']}); every call uses plain torch"
    compiled = f"for CUDA {info['cuda_toolkit']}, {info['cuda_archs']}" if info["cuda_compiled"] else "none"
    return "\n".join(
        [
            f"python {sys.version.split()[0]}, torch {info['torch']}",
            f"native library: {native}",
            f"CPU kernels: {info['cpu_isa']}; CUDA kernels: {compiled}",
            f"CUDA usable: {cuda}",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(describe(build_info()) + "\n")
