"""Dropout in modulated MP-SiLU: the generator, the mask, and what is done with it."""

import itertools

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edm2ext import ops, reference

PHILOX = torch.tensor([0x123456789ABCDEF, -0x7EDCBA9876543211])


def words(*values: int) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """The test vectors of the authors' Random123 library."""
    assert [word.item() for word in reference.philox_4x32(words(*counter), words(*key))] == list(expected)


def kept(x: Tensor, dropout: float, philox: Tensor = PHILOX, subsequence: int = 3) -> Tensor:
    """Where the output is not zero, for inputs without zeros."""
    return ops.mp_silu_modulated(x, torch.ones(x.shape[:2]), dropout, philox, subsequence) != 0


@pytest.mark.parametrize("shape", [(2, 24, 4, 5), (3, 5, 7), (2, 77, 3, 1), (5, 130), (1, 1, 1), (2, 3, 2, 2, 3)])
def test_one_mask_for_all_layouts_dtypes_and_backends(backend: str, shape: tuple[int, ...]) -> None:
    expected = reference.dropout_mask(shape, round(0.3 * 2**16), PHILOX, 3)
    for dtype, layout in itertools.product(DTYPES, LAYOUTS.values()):
        assert torch.equal(kept(layout(torch.ones(shape, dtype=dtype)), 0.3), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 4, 5), (3, 5, 7), (2, 193, 3, 11), (1, 3, 20, 20), (0, 4, 3, 3), (2, 3, 0)])
def test_matches_reference(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    for expanded in (False, True):
        compare(
            "mp_silu_modulated",
            [torch.randn(shape), torch.randn(shape[:2])],
            dtype=dtype,
            layout=layout,
            expanded_grad=expanded,
            dropout=0.4,
            philox=PHILOX,
            subsequence=65535,
        )


def test_survivors_are_scaled_by_the_inverse_rate(backend: str) -> None:
    x, c = torch.randn(2, 64, 8, 8), torch.randn(2, 64)
    y, plain = ops.mp_silu_modulated(x, c, 0.25, PHILOX), ops.mp_silu_modulated(x, c)
    survivors = y != 0
    torch.testing.assert_close(y[survivors], plain[survivors] / 0.75)


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    count = 400_000
    mask = reference.dropout_mask((1, 40, count // 40), round(p * 2**16), PHILOX)
    deviations = (mask.float().mean().item() - (1 - p)) / (p * (1 - p) / count) ** 0.5
    assert abs(deviations) < 4
    per_channel = mask.float().mean(dim=(0, 2))
    assert ((per_channel - (1 - p)).abs() < 5 * (p * (1 - p) / (count / 40)) ** 0.5).all()


def test_masks_of_layers_steps_and_seeds_are_independent() -> None:
    streams = [(PHILOX, 0), (PHILOX, 1), (PHILOX, 256), (PHILOX + torch.tensor([0, 1]), 0)]
    streams += [(PHILOX + torch.tensor([0, 2**32]), 0), (PHILOX + torch.tensor([1, 0]), 0)]
    streams += [(PHILOX + torch.tensor([2**32, 0]), 0)]
    masks = torch.stack([reference.dropout_mask((4, 50, 500), 2**15, *s).float().flatten() for s in streams])
    shifted = [masks[0, 1:], masks[0, 8:], masks[0, 50:], masks[0, 25_000:]]  # element, block, pixel, sample
    size = min(len(row) for row in shifted)
    correlations = torch.corrcoef(torch.stack([*(row[:size] for row in masks), *(row[:size] for row in shifted)]))
    assert (correlations - torch.eye(len(correlations))).abs().max() < 4.5 / size**0.5


def test_every_bit_of_seed_offset_and_subsequence_counts(backend: str) -> None:
    x = torch.ones(1, 64, 4)
    masks = [kept(x, 0.5)]
    for bit in range(64):
        flip = torch.tensor(1 << bit if bit < 63 else -(1 << 63))
        masks += [kept(x, 0.5, torch.stack([PHILOX[0] ^ flip, PHILOX[1]]))]
        masks += [kept(x, 0.5, torch.stack([PHILOX[0], PHILOX[1] ^ flip]))]
    masks += [kept(x, 0.5, PHILOX, 3 ^ (1 << bit)) for bit in range(16)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


def test_recomputation_repeats_the_mask(backend: str) -> None:
    x, c = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, requires_grad=True)

    def loss(x: Tensor, c: Tensor) -> Tensor:
        return ops.mp_silu_modulated(x, c, 0.5, PHILOX, 2).square().sum()

    expected = torch.autograd.grad(loss(x, c), (x, c))
    again = torch.autograd.grad(checkpoint(loss, x, c, use_reentrant=False), (x, c))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_gradient_is_zero_where_dropped(backend: str) -> None:
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    y = ops.mp_silu_modulated(x, torch.ones(2, 8), 0.5, PHILOX)
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)


def test_dropped_nan_stays(backend: str) -> None:
    assert ops.mp_silu_modulated(torch.full((1, 8), torch.nan), torch.ones(1, 8), 0.5, PHILOX).isnan().all()


def test_no_dropout_needs_no_philox(backend: str) -> None:
    x, c = torch.randn(2, 3, 4), torch.randn(2, 3)
    assert torch.equal(ops.mp_silu_modulated(x, c, 0.0), ops.mp_silu_modulated(x, c))
    assert torch.equal(ops.mp_silu_modulated(x, c, 0.0, PHILOX, 5), ops.mp_silu_modulated(x, c))


def test_bad_input(backend: str) -> None:
    x, c = torch.randn(2, 3, 4), torch.randn(2, 3)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"mp_silu_modulated: dropout must be in \[0, 1\), got"):
            ops.mp_silu_modulated(x, c, p, PHILOX)
    with pytest.raises(ValueError, match=r"mp_silu_modulated: dropout=0\.5 needs philox"):
        ops.mp_silu_modulated(x, c, 0.5)
    with pytest.raises(ValueError, match=r"philox must be int64 of shape \[2\], got torch.int32 \[2\]"):
        ops.mp_silu_modulated(x, c, 0.5, PHILOX.int())
    with pytest.raises(ValueError, match=r"philox must be int64 of shape \[2\], got torch.int64 \[4\]"):
        ops.mp_silu_modulated(x, c, 0.5, PHILOX.repeat(2))
    with pytest.raises(ValueError, match=r"subsequence must be in \[0, 65535\], got 65536"):
        ops.mp_silu_modulated(x, c, 0.5, PHILOX, 65536)
    with pytest.raises(ValueError, match="x and philox must be on one device, got cpu and meta"):
        ops.mp_silu_modulated(x, c, 0.5, PHILOX.to("meta"))
