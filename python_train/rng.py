"""Random streams that depend only on integers (spec 4.6, 4.7): the same on every machine and after every resume."""

from __future__ import annotations

import numpy as np
import torch

_PRIME_1 = 11400714785074694791
_PRIME_2 = 14029467366897019727
_PRIME_5 = 2870177450012600261
_MASK = 2**64 - 1


def tuple_seed(*values: int) -> int:
    """The 31-bit seed of a tuple of integers: CPython's tuple hash modulo 2^31, written out (spec 4.6).

    Written out because it is part of the reproducible format: a different interpreter must give the same numbers.
    """
    acc = _PRIME_5
    for value in values:
        acc = (acc + _int_hash(value) * _PRIME_2) & _MASK
        acc = ((acc << 31) | (acc >> 33)) & _MASK
        acc = acc * _PRIME_1 & _MASK
    acc = (acc + (len(values) ^ (_PRIME_5 ^ 3527539))) & _MASK
    if acc == _MASK:
        acc = 1546275796
    return acc % 2**31


def _int_hash(value: int) -> int:
    """CPython's 64-bit hash of an int as an unsigned word: reduced modulo the Mersenne prime 2^61 - 1, -1 taken."""
    reduced = abs(value) % (2**61 - 1)
    reduced = -reduced if value < 0 else reduced
    return (-2 if reduced == -1 else reduced) & _MASK


def reseed(*values: int) -> None:
    """Seed torch's CPU generator, every CUDA generator and NumPy's global generator from the integers."""
    seed = tuple_seed(*values)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is part of the format


def epoch_order(seed: int, epoch: int, num_items: int) -> np.ndarray:
    """The permutation [num_items] int64 in which one epoch visits the data (spec 4.7)."""
    order = np.arange(num_items)
    np.random.RandomState(tuple_seed(seed, epoch)).shuffle(order)
    return order
