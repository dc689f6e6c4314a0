"""Published settings by name (spec 6.5): which networks, at which EMA length, with how much guidance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from python_train import UserError
from python_train.download import is_url, local_file

PUBLISHED_FILES = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"  # CC BY-NC-SA 4.0


@dataclass(frozen=True)
class Preset:
    """File names without suffix of the network and of its guide, the guidance weight (EDM2 paper Eq. 152), and the
    noise levels between which the guide guides, see `python_train.guidance.Guide`; None = all."""

    net: str
    gnet: str | None = None
    guidance: float = 1
    interval: str | None = None


class Found(NamedTuple):
    """A preset whose files are there."""

    net: Path
    gnet: Path | None
    guidance: float
    interval: str | None


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
    "img512-s-uncond": (0.145, 0.170),
    "img64-s": (0.075, 0.160),
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
# The same in a limited interval (spec 6.3): (sigma_rel, weight, limits) for each metric.
_INTERVAL = {
    "img512-s": ((0.025, 2.1, "0.28,2.90"), (0.085, 3.2, "0.60,5.00")),
    "img512-xxl": ((0.015, 2.0, "0.19,1.61"), (0.015, 2.9, "0.60,5.00")),
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
        f"edm2-{model}-interval-{metric}": Preset(
            _file(model, sigma_rel), _file("img512-xs-uncond", sigma_rel), weight, limits
        )
        for model, settings in _INTERVAL.items()
        for metric, (sigma_rel, weight, limits) in zip(_METRICS, settings, strict=True)
    },
    **{
        f"edm2-{model}-autog-{metric}": Preset(_file(model, sigma_rel), _file(guide, guide_sigma_rel, kimg), weight)
        for model, (guide, kimg, settings) in _AUTOGUIDED.items()
        for metric, (sigma_rel, guide_sigma_rel, weight) in zip(_METRICS, settings, strict=True)
    },
}


def find_preset(name: str, weights: str) -> Found:
    """The files and settings of a preset; ``weights`` is the folder of the files, converted or as published, or the URL
    that they lie below, from which they are downloaded once.

    Raises UserError for an unknown name, listing the names, and for missing files, saying what to fetch from where.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; the presets are: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    stems = [stem for stem in (preset.net, preset.gnet) if stem is not None]
    if is_url(weights):
        paths = [_download(f"{weights.rstrip('/')}/{stem}.pkl") for stem in stems]
    else:
        found = [_in_folder(stem, Path(weights)) for stem in stems]
        missing = [f"{PUBLISHED_FILES}/{stem}.pkl" for stem, path in zip(stems, found, strict=True) if path is None]
        if missing:
            raise UserError(
                f"preset {name} needs files that are not in the folder {weights} (--weights): fetch "
                f"{' and '.join(missing)} (licence CC BY-NC-SA 4.0) and put them into {weights} as they are. "
                f"--weights {PUBLISHED_FILES} does so by itself; python_train.reconstruct makes them of the raw "
                "snapshots"
            )
        paths = [path for path in found if path is not None]
    return Found(paths[0], paths[1] if preset.gnet else None, preset.guidance, preset.interval)


def _in_folder(stem: str, folder: Path) -> Path | None:
    paths = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".pkl")]
    return next((path for path in paths if path.is_file()), None)


def _download(url: str) -> Path:
    try:
        return local_file(url)
    except UserError as error:
        name = url.rpartition("/")[2]
        raise UserError(f"{error}: put {name} into a folder, and name the folder by --weights") from error
