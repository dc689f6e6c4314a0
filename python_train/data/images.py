"""One item of a data set: bytes of an image or array file to pixels, within bounds."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from python_train import UserError

MAX_CHANNELS = 16
MAX_PIXELS = 2**26
# Formats that Pillow decodes by itself: no PostScript (it starts an interpreter), no films, no stubs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "QOI", "PCX", "SGI", "ICO")


@functools.cache
def _formats() -> list[str]:
    PIL.Image.init()
    return [kind for kind in _FORMATS if kind in PIL.Image.OPEN]


@functools.cache
def _suffixes() -> frozenset[str]:
    formats = _formats()
    return frozenset({".npy", *(suffix for suffix, kind in PIL.Image.EXTENSION.items() if kind in formats)})


def is_item(name: str) -> bool:
    """Whether the name is that of an image that can be decoded, or of a NumPy array (spec 8.2)."""
    return PurePosixPath(name).suffix.lower() in _suffixes()


def open_image(data: bytes) -> PIL.Image.Image:
    """Open an image file, not decoded yet. Raises ValueError or one of Pillow's errors."""
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_formats())
    except PIL.UnidentifiedImageError:
        raise ValueError(f"not an image of a known kind: {', '.join(_formats())}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} are more than {MAX_PIXELS:,} pixels")
    return image


class Picture(NamedTuple):
    """A decoded image, and whether its EXIF data say that it lies on its side or its head."""

    image: PIL.Image.Image
    lying: bool


def decode_rgb(where: str, data: bytes, upright: bool = False) -> Picture:
    """An image file as 8-bit RGB (spec 8.3: transparency is dropped, not blended; the EXIF orientation is left alone,
    unless ``upright``).

    Raises UserError, starting with ``where``, for damaged files and for those with more than 8 bits per channel.
    """
    try:
        with open_image(data) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits per channel (Pillow's mode {image.mode}): convert it first")
            lying = _orientation(image) in range(2, 9)
            if lying and upright:
                return Picture(PIL.ImageOps.exif_transpose(image).convert("RGB"), False)
            return Picture(image.convert("RGB"), lying)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UserError(f"{where} cannot be decoded ({error})") from error


def _orientation(image: PIL.Image.Image) -> object:
    """The EXIF orientation; 1, upright, where there is none or it cannot be read."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF data
        return image.getexif().get(PIL.ExifTags.Base.Orientation, 1)
    return 1


def decode_array(where: str, name: str, data: bytes) -> np.ndarray:
    """Bytes of an image file or .npy to a writable [C, H, W]: uint8 with 1 to 16 channels, or float32 with 2 to 32
    (mean and standard deviation of latents). Raises UserError, starting with ``where``, for anything else."""
    try:
        if name.lower().endswith(".npy"):
            array = _npy(data)
            array = array.reshape(-1, *array.shape[-2:])
        else:
            with open_image(data) as image:
                if image.mode in ("1", "P", "PA"):
                    image = image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
                array = np.asarray(image)
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    except Exception as error:  # Pillow and NumPy raise many kinds for a damaged file
        raise UserError(f"{where} cannot be decoded; the file is damaged or of an unknown kind ({error})") from error
    channels, dtype = array.shape[0], array.dtype.newbyteorder("=")
    if array.size and (
        (dtype == np.uint8 and channels <= MAX_CHANNELS)
        or (dtype == np.float32 and channels <= 2 * MAX_CHANNELS and channels % 2 == 0)
    ):
        return np.array(array, dtype, order="C")
    raise UserError(
        f"{where} has {channels} channels of {dtype}; expected 1 to {MAX_CHANNELS} of uint8, or an even number up to "
        f"{2 * MAX_CHANNELS} of float32 (mean and standard deviation of latents)"
    )


def _npy(data: bytes) -> np.ndarray:
    """A view of an array file's content; unlike numpy.load never larger than the file, whatever its header says."""
    file = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    if major not in (1, 2):
        raise ValueError(f"unknown version {major} of the format")
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject or len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape {shape} of {dtype}; expected [channels, height, width] of numbers")
    count = math.prod(shape)
    if count * dtype.itemsize > len(data) - file.tell():
        raise ValueError("the file is shorter than its header says")
    array = np.frombuffer(data, dtype, count, file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def encode_png(image: PIL.Image.Image) -> bytes:
    """An uncompressed PNG (spec 8.1)."""
    file = io.BytesIO()
    image.save(file, "png", compress_level=0, optimize=False)
    return file.getvalue()
