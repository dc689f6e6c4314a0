"""Training data: data sets, encoders and the order of the data; ``python -m python_train.data`` makes and checks data
sets."""

from python_train.data.encoders import (
    SIGMA_DATA,
    VAE_MEAN,
    VAE_STD,
    Encoder,
    LatentEncoder,
    PixelEncoder,
    StandardizedEncoder,
    open_encoder,
)
from python_train.data.reader import DIGITS, IN_MEMORY_BYTES, Dataset, Digits, ImageArchive, open_dataset
from python_train.data.stream import IndexStream, batches

__all__ = [
    "DIGITS",
    "IN_MEMORY_BYTES",
    "SIGMA_DATA",
    "VAE_MEAN",
    "VAE_STD",
    "Dataset",
    "Digits",
    "Encoder",
    "ImageArchive",
    "IndexStream",
    "LatentEncoder",
    "PixelEncoder",
    "StandardizedEncoder",
    "batches",
    "open_dataset",
    "open_encoder",
]
