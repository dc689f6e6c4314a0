"""The images of one network on disk: where they go, what they are made with, and which are there already."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from python_train import UserError
from python_train.checkpoint import atomic_write, load_snapshot, read_header, write_text
from python_train.data import open_encoder
from python_train.data.latents import decode, open_vae
from python_train.guidance import Guide, Interval
from python_train.network import Precond
from python_train.pictures import save_png, to_pillow
from python_train.sample import sample

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_LEFTOVER = re.compile(r"\.(.+)\.\d+\.tmp")  # of checkpoint.atomic_write
_IMAGE = re.compile(r"\d{6,}\.(png|npy)")  # see image_path


@dataclass(frozen=True)
class GuideFile:
    """A guide that is still a snapshot on disk, see `python_train.guidance.Guide`."""

    path: Path
    weight: float | list[float]
    interval: Interval | None = None

    @property
    def is_active(self) -> bool:
        """Whether it makes any difference; else it is not even loaded (spec 6.2)."""
        return self.weight != 1

    def settings(self) -> dict[str, Any]:
        """How it guides, as JSON can hold it."""
        interval = self.interval
        if isinstance(interval, range):
            interval = {"first_step": interval[0], "last_step": interval[-1]}
        return {"weight": self.weight, "interval": interval}

    def facts(self) -> dict[str, Any]:
        """What options.json says about it."""
        return {**file_facts(self.path), **self.settings()}


def check_guide(header: dict[str, Any], guide_header: dict[str, Any]) -> None:
    """Raise UserError unless the one network can guide the other: same image shape, of pixels or of latents, same
    classes or none (spec 6.2)."""
    config, guide_config = header["config"], guide_header["config"]
    shape, guide_shape = ([facts["img_channels"], facts["img_resolution"]] for facts in (config, guide_config))
    if shape != guide_shape:
        raise UserError(
            "the guide makes images of another shape: [channels, resolution] is "
            f"{guide_shape}, the main network's {shape}"
        )
    if guide_config["label_dim"] not in (0, config["label_dim"]):
        raise UserError(f"the guide knows {guide_config['label_dim']} classes, the main network {config['label_dim']}")
    kind, guide_kind = (facts["encoder"].get("kind") for facts in (header, guide_header))
    if kind != guide_kind:
        raise UserError(f"the guide was trained on other data ({guide_kind}) than the main network ({kind})")


def image_path(outdir: Path, seed: int, subdirs: bool, suffix: str) -> Path:
    """Where the image of a seed goes: ``000123.png``, with subdirs ``000000/000123.png``."""
    folder = outdir / f"{seed // 1000 * 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}{suffix}"


def save_image(path: Path, image: np.ndarray) -> None:
    """Write [C,H,W] atomically, by the suffix: uint8 with C = 1 to 4 as PNG, or an array of any kind as .npy."""
    if path.suffix == ".png":
        save_png(path, to_pillow(image))
        return
    with atomic_write(path) as temp, open(temp, "wb") as file:
        np.save(file, image)


def is_whole(path: Path, shape: Sequence[int] | None) -> bool:
    """Whether a file holds an undamaged image (PNG) or array (.npy) [C,H,W] of that shape; None = of any."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False).shape == tuple(shape or ())
        with Image.open(path) as image:
            image.verify()  # reads all of it and compares its checksums, but the last
            fits = shape is None or (len(image.getbands()), image.height, image.width) == tuple(shape)
        return fits and path.read_bytes().endswith(_PNG_END)
    except (OSError, ValueError, SyntaxError, EOFError):  # SyntaxError: Pillow's word for a broken PNG
        return False


def file_facts(path: Path) -> dict[str, str]:
    """Name and content of a network's file, to tell whether images come from the same one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"file": path.name, "sha256": digest.hexdigest()}


def sampler_facts(sampler: dict[str, Any]) -> dict[str, Any]:
    """All settings of `sample` that decide what an image is, defaults included, as JSON can hold them."""
    parameters = inspect.signature(sample).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "randn_like"}
    settings = {**defaults, **sampler}
    return {k: v if isinstance(v, int | float) and isfinite(v) else str(v) for k, v in settings.items()}


class Job:
    """The images of one network: where they go, what they are made with, and which are there already.

    Raises UserError, before anything is written, for a snapshot or guide that is unreadable or does not fit, a class
    that the network does not have, and where the folder's images were made with other options or by something else;
    with ``overwrite`` only where some of those would stay, since options.json could not tell them apart.
    """

    def __init__(
        self,
        net_path: Path,
        folder: Path,
        seeds: Sequence[int],
        device: torch.device,
        class_idx: int | None,
        guides: Sequence[GuideFile],
        sampler: dict[str, Any],
        subdirs: bool,
        overwrite: bool,
        vae: str | None = None,
    ) -> None:
        self.net_path, self.folder, self.overwrite = net_path, folder, overwrite
        self.guides = [guide for guide in guides if guide.is_active]
        header = read_header(net_path)
        config = header["config"]
        _check_class(net_path, config["label_dim"], class_idx)
        for guide in self.guides:
            check_guide(header, read_header(guide.path))
        self.encoder = open_encoder(header["encoder"])
        latent = header["encoder"]["kind"] == "latent"
        self.vae = vae if latent else None
        self.drawn = (config["img_channels"], config["img_resolution"], config["img_resolution"])
        self.shape = None if self.vae else self.drawn  # what a VAE makes is not known before
        self.drawable = config["img_channels"] <= 4 if not latent else vae is not None
        self.suffix = ".png" if self.drawable else ".npy"
        self.paths = {seed: image_path(folder, seed, subdirs, self.suffix) for seed in seeds}
        facts = {
            "net": file_facts(net_path),
            "class": class_idx,
            "guides": [guide.facts() for guide in self.guides],
            "device": device.type,
            "vae": self.vae,
            **sampler_facts(sampler),
        }
        self.options = json.loads(json.dumps(facts))
        self.record = folder / "options.json"
        if overwrite:
            self._check_rest()
        else:
            self._check_folder()

    def _check_folder(self) -> None:
        if not self.record.exists():
            existing = [path for path in self.paths.values() if path.exists()]
            if existing:
                raise UserError(
                    f"{len(existing)} of the images exist already, such as {existing[0]}, and nothing says what they "
                    "were made with; choose another --outdir, or --overwrite"
                )
            return
        before, now = self._recorded(), self.options
        changes = [f"{k}: {before.get(k)} -> {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)]
        if changes:
            raise UserError(
                f"the images in {self.folder} were made with other options ({'; '.join(changes)}); "
                "choose another --outdir, or --overwrite"
            )

    def _recorded(self) -> dict[str, Any]:
        """What options.json says."""
        try:
            return dict(json.loads(self.record.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.record} is damaged ({error}); choose another --outdir, or --overwrite") from error

    def _is_outdated(self) -> bool:
        """Whether what images there are were made with other options, or nobody knows with which."""
        try:
            return self._recorded() != self.options
        except (UserError, OSError):
            return True

    def _check_rest(self) -> None:
        """Raise UserError if images of other seeds, made with other options, would stay beside the new ones."""
        if not self._is_outdated():
            return
        own = set(self.paths.values())
        found = (path for pattern in ("*", "[0-9]*/*") for path in self.folder.glob(pattern))
        rest = sorted(path for path in found if _IMAGE.fullmatch(path.name) and path not in own)
        if rest:
            raise UserError(
                f"{self.folder} holds {len(rest)} more images, such as {rest[0]}, that were made with other options: "
                "choose another --outdir, or name their seeds too"
            )

    def missing(self, seeds: Iterable[int]) -> list[int]:
        """Those of the seeds whose images are to be drawn: not there, damaged, or to be replaced."""
        return [seed for seed in seeds if self.overwrite or not is_whole(self.paths[seed], self.shape)]

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half written of these images."""
        names = {path.name for path in self.paths.values()}
        for folder in {path.parent for path in self.paths.values() if path.parent.is_dir()}:
            for leftover in folder.glob(".*.tmp"):
                if (match := _LEFTOVER.fullmatch(leftover.name)) and match[1] in names:
                    leftover.unlink(missing_ok=True)

    def make_folders(self) -> None:
        """Make the folders that the images go to."""
        for folder in {self.folder, *(path.parent for path in self.paths.values())}:
            folder.mkdir(parents=True, exist_ok=True)

    def write_options(self) -> None:
        """Say in options.json what the images are made with.

        Those made otherwise, which are to be replaced, are removed before: what an interruption left of them would be
        taken for new ones.
        """
        for path in self.paths.values() if self.overwrite and self._is_outdated() else ():
            path.unlink(missing_ok=True)
        write_text(self.record, json.dumps(self.options, indent=2) + "\n")

    @contextlib.contextmanager
    def networks(self, device: torch.device) -> Iterator[tuple[Precond, list[Guide]]]:
        """The network and its guides on the device, their weights baked."""
        with contextlib.ExitStack() as stack:

            def load(path: Path) -> Precond:
                net, _ = load_snapshot(path, device)
                stack.enter_context(net.baked())
                return net

            yield load(self.net_path), [Guide(load(guide.path), guide.weight, guide.interval) for guide in self.guides]

    def decoder(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Of what the network makes, as `generate_batch` returns it, to what is stored."""
        if self.vae is None:
            return lambda images: images
        try:
            vae = open_vae(self.vae).to(device).eval().requires_grad_(False)
        except UserError as error:
            raise UserError(f"{error}; --latents keeps the latents as they are") from error
        return lambda latents: decode(vae, latents)


def _check_class(net_path: Path, label_dim: int, class_idx: int | None) -> None:
    if class_idx is not None and label_dim == 0:
        raise UserError(f"{net_path} is unconditional: it has no class {class_idx}")
    if class_idx is not None and not 0 <= class_idx < label_dim:
        raise UserError(f"class {class_idx} does not exist: {net_path} has classes 0 to {label_dim - 1}")


def folders_of(net_paths: Sequence[Path], outdir: Path) -> list[Path]:
    """The folder of each network: outdir itself for one, else one named after each file. UserError if names clash."""
    if len(net_paths) == 1:
        return [outdir]
    names = [path.name.removesuffix(".safetensors") for path in net_paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two networks are called {twice}: their images would share a folder; draw them one by one")
    return [outdir / name for name in names]
