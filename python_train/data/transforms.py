"""How images of any size become images of one size (spec 8.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import PIL.Image
from PIL.Image import Resampling

from python_train import UserError

Size = tuple[int, int]  # width, height, as Pillow has it
Transform = Callable[[PIL.Image.Image], "PIL.Image.Image | None"]


def _resized(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    return image if image.size == size else image.resize(size, Resampling.LANCZOS)


def stretch(image: PIL.Image.Image, size: Size | None) -> PIL.Image.Image:
    """The whole image, resized (Lanczos) if its size is another; with no size given it stays as it is."""
    return image if size is None else _resized(image, size)


def center_crop(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The largest square in the centre, resized (Lanczos)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return _resized(image.crop((left, top, left + side, top + side)), size)


def center_crop_wide(image: PIL.Image.Image, size: Size) -> PIL.Image.Image | None:
    """The central rows that give the aspect of ``size``, resized (Lanczos) and centred on a black square as wide as
    ``size``. None, to be skipped, for an image narrower than ``size`` or with too few rows."""
    width, height = size
    rows = round(image.width * height / width)
    if image.width < width or image.height < rows or rows < height:
        return None
    top = (image.height - rows) // 2
    canvas = PIL.Image.new("RGB", (width, width))
    canvas.paste(_resized(image.crop((0, top, image.width, top + rows)), size), (0, (width - height) // 2))
    return canvas


class DhariwalPlan(NamedTuple):
    """Steps of the ADM preprocessing: halvings by box filter, one bicubic resize, and where to crop."""

    halvings: list[Size]
    resized: Size
    left: int
    top: int


def dhariwal_plan(size: Size, target: int) -> DhariwalPlan:
    """The steps for an image of ``size`` and a square of side ``target`` (spec 8.3)."""
    width, height = size
    halvings = []
    while min(width, height) >= 2 * target:
        width, height = width // 2, height // 2
        halvings.append((width, height))
    scale = target / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return DhariwalPlan(halvings, (width, height), (width - target) // 2, (height - target) // 2)


def center_crop_dhariwal(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The central square as in ADM (Dhariwal and Nichol 2021): the preprocessing of ImageNet (spec 8.3)."""
    target = size[0]
    plan = dhariwal_plan(image.size, target)
    for halved in plan.halvings:
        image = image.resize(halved, Resampling.BOX)
    image = image.resize(plan.resized, Resampling.BICUBIC)
    return image.crop((plan.left, plan.top, plan.left + target, plan.top + target))


_TRANSFORMS: dict[str, Callable[..., PIL.Image.Image | None]] = {
    "none": stretch,
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}
TRANSFORMS = tuple(_TRANSFORMS)


def make_transform(name: str, size: Size | None) -> Transform:
    """The transform of that name to ``size`` (width, height); it returns None for an image to be skipped.

    Raises UserError for a transform that needs a size and has none, or whose size has the wrong shape.
    """
    if name not in _TRANSFORMS:
        raise UserError(f"unknown transform {name!r}; there are {', '.join(TRANSFORMS)}")
    if size is None and name != "none":
        raise UserError(f"transform {name} needs a resolution")
    if size is not None:
        width, height = size
        if name == "center-crop-dhariwal" and width != height:
            raise UserError(f"transform {name} makes squares, but the resolution is {width}x{height} (width x height)")
        if name == "center-crop-wide" and width < height:
            raise UserError(f"transform {name} needs a width of at least the height, got {width}x{height}")
    return lambda image: _TRANSFORMS[name](image, size)
