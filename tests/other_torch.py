"""Run a built libedm2_ops.so under whatever torch and Python run this file: `python tests/other_torch.py LIBRARY`.

The library is built once, against the stable ABI of torch; this shows that the same file serves another torch. It needs
torch and nothing else."""

import platform
import sys

import torch


def check(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = ((got.double() - want).norm() / want.norm()).item()
    print(f"  {name:24s} relative error {error:.1e}")
    if not error < 1e-6:
        raise SystemExit(f"{name}: relative error {error:.1e} under torch {torch.__version__}")


def main(library: str) -> None:
    torch.ops.load_library(library)
    ops = torch.ops.edm2
    print(f"torch {torch.__version__}, Python {platform.python_version()}: {library}")
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, 9)
    xd = x.double()
    silu = torch.nn.functional.silu(xd) / 0.596
    normed = xd / (1e-4 + xd.square().mean(dim=1, keepdim=True).sqrt())
    for layout in (torch.contiguous_format, torch.channels_last):
        xl = x.to(memory_format=layout)
        check("mp_silu", ops.mp_silu(xl), silu)
        check("pixel_norm", ops.pixel_norm(xl, 1e-4), normed)
        check("pixel_norm_silu", ops.pixel_norm_silu(xl, 1e-4)[1], torch.nn.functional.silu(normed) / 0.596)
    check("mp_sum", ops.mp_sum(x, x.flip(0), 0.5, float("inf")), (xd + xd.flip(0)) * 0.5**0.5)
    weights = [torch.randn(4, 6, 3, 3), torch.randn(7, 2)]
    rows = [w.double().flatten(1) for w in weights]
    wanted = [
        (r / (1e-4 + r.square().mean(1, keepdim=True).sqrt())).reshape(w.shape)
        for r, w in zip(rows, weights, strict=True)
    ]
    ops.force_normalize_(weights, 1e-4)
    for w, want in zip(weights, wanted, strict=True):
        check("force_normalize_", w, want)
    ema, param = torch.randn(11), torch.randn(11)
    want = ema.double() + 0.25 * (param.double() - ema.double())
    ops.ema_update_([ema], [param], [0.25])
    check("ema_update_", ema, want)
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
