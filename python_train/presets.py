"""Published settings by name (spec 6.5): which networks, at which EMA length, with how much guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from python_train import UserError

PUBLISHED_AT = "https://github.com/NVlabs/edm2"


@dataclass(frozen=True)
class Preset:
    """File names without suffix of the network and of its guide, and the guidance weight (EDM2 paper Eq. 152)."""

    net: str
    gnet: str | None = None
    guidance: float = 1


def _file(model: str, sigma_rel: float, kimg: int | None = None) -> str:
    return f"edm2-{model}-{_KIMG[model] if kimg is None else kimg:07d}-{sigma_rel:.3f}"


# Training time of each published model in thousands of images.
_KIMG = {
    "img512-xs": 2147483,
    "img512-s": 2147483,
    "img512-m": 2147483,
    "img512-l": 1879048,
    "img512-xl": 1342177,
    "img512-xxl": 939524,
    "img512-xs-uncond": 2147483,
    "img512-s-uncond": 2147483,
    "img64-s": 1073741,
    "img64-m": 2147483,
    "img64-l": 1073741,
    "img64-xl": 671088,
}
# Without guidance: sigma_rel for the best FID, and for the best FD-DINOv2 where it was published.
_UNGUIDED: dict[str, tuple[float, ...]] = {
    "img512-xs": (0.135, 0.200),
    "img512-s": (0.130, 0.190),
    "img512-m": (0.100, 0.155),
    "img512-l": (0.085, 0.155),
    "img512-xl": (0.085, 0.155),
    "img512-xxl": (0.070, 0.150),
    "img64-s": (0.075,),
    "img64-m": (0.060,),
    "img64-l": (0.040,),
    "img64-xl": (0.040,),
}
# Classifier-free guidance by the unconditional XS model, of the same sigma_rel: (sigma_rel, weight) for each metric.
_GUIDED = {
    "img512-xs": ((0.045, 1.4), (0.150, 1.7)),
    "img512-s": ((0.025, 1.4), (0.085, 1.9)),
    "img512-m": ((0.030, 1.2), (0.015, 2.0)),
    "img512-l": ((0.015, 1.2), (0.035, 1.7)),
    "img512-xl": ((0.020, 1.2), (0.030, 1.7)),
    "img512-xxl": ((0.015, 1.2), (0.015, 1.7)),
}
# Autoguidance: the guide and its training time; (sigma_rel, the guide's sigma_rel, weight) for each metric.
_AUTOGUIDED = {
    "img512-s": ("img512-xs", 134217, ((0.070, 0.125, 2.10), (0.120, 0.165, 2.45))),
    "img512-xxl": ("img512-m", 268435, ((0.075, 0.155, 2.05), (0.130, 0.205, 2.30))),
    "img512-s-uncond": ("img512-xs-uncond", 134217, ((0.070, 0.110, 2.85), (0.090, 0.125, 2.90))),
    "img64-s": ("img64-xs", 134217, ((0.045, 0.110, 1.70), (0.105, 0.175, 2.20))),
}
_METRICS = ("fid", "dino")

PRESETS: dict[str, Preset] = {
    **{
        f"edm2-{model}-{metric}": Preset(_file(model, sigma_rel))
        for model, widths in _UNGUIDED.items()
        for metric, sigma_rel in zip(_METRICS, widths, strict=False)
    },
    **{
        f"edm2-{model}-guid-{metric}": Preset(_file(model, sigma_rel), _file("img512-xs-uncond", sigma_rel), weight)
        for model, settings in _GUIDED.items()
        for metric, (sigma_rel, weight) in zip(_METRICS, settings, strict=True)
    },
    **{
        f"edm2-{model}-autog-{metric}": Preset(_file(model, sigma_rel), _file(guide, guide_sigma_rel, kimg), weight)
        for model, (guide, kimg, settings) in _AUTOGUIDED.items()
        for metric, (sigma_rel, guide_sigma_rel, weight) in zip(_METRICS, settings, strict=True)
    },
}


def find_preset(name: str, folder: Path) -> tuple[Path, Path | None, float]:
    """(network, guide or None, guidance weight) of a preset, the files being in ``folder``, converted or as published.

    Raises UserError for an unknown name, listing the names, and for missing files, saying what to fetch.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; the presets are: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    found = {stem: _weights(stem, folder) for stem in (preset.net, preset.gnet) if stem is not None}
    missing = [f"{stem}.pkl" for stem, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"preset {name} needs {' and '.join(missing)} in {folder} (--weights): fetch that from the post-hoc "
            f"reconstructions published with {PUBLISHED_AT} (licence CC BY-NC-SA 4.0) and put it there as it is, "
            "or make it of the raw snapshots with python_train.reconstruct"
        )
    net, gnet = found[preset.net], None if preset.gnet is None else found[preset.gnet]
    assert net is not None
    return net, gnet, preset.guidance


def _weights(stem: str, folder: Path) -> Path | None:
    paths = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".pkl")]
    return next((path for path in paths if path.is_file()), None)
