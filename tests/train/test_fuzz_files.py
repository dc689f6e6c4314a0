"""Damaged files of every kind: read as they were or refused with a reason, never a crash."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from python_train import UserError, checkpoint, data
from python_train.network import Precond

ROUNDS = 400


def damage(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, dropped, doubled or cut off."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(damaged))
        match rng.randrange(5):
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at : at + rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
            case 2:
                del damaged[rng.randrange(len(damaged)) :]
            case 3:
                damaged[at:at] = damaged[at : at + rng.randint(1, 64)]
            case 4:  # length fields are near the ends
                damaged[rng.choice([rng.randrange(16), -1 - rng.randrange(16)]) % len(damaged)] = rng.randrange(256)
        if not damaged:
            return b""
    return bytes(damaged)


def small_network() -> Precond:
    torch.manual_seed(0)
    return Precond(8, 1, 3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8)


def write_snapshot(path: Path) -> None:
    net = small_network()
    facts = data.open_dataset("digits")
    checkpoint.save_snapshot(
        path, net, nimg=1, sigma_rel=0.1, ema_kind="power", dataset=facts.facts(), encoder=facts.encoder().facts()
    )


def read_snapshot(path: Path) -> object:
    net, header = checkpoint.load_snapshot(path)
    return [value.shape for value in net.state_dict().values()], header["nimg"]


def write_state(path: Path) -> None:
    checkpoint.save_state(path, {"format_version": checkpoint.FORMAT_VERSION, "net": small_network().state_dict()})


def write_archive(path: Path) -> None:
    folder = path.parent / "images"
    for index in range(4):
        (folder / f"{index % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{index % 2}" / f"{index}.png")
    shutil.make_archive(str(path.with_suffix("")), "zip", folder)


def read_archive(path: Path) -> object:
    dataset = data.open_dataset(str(path))
    return [dataset.read(index).shape for index in range(dataset.num_images)]


KINDS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], object]]] = {
    "snapshot": ("network-snapshot-0000000-0.100.safetensors", write_snapshot, read_snapshot),
    "training state": ("training-state-0000001.pt", write_state, checkpoint.load_state),
    "data": ("data.zip", write_archive, read_archive),
}


def why_refused(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_with_a_reason(kind: str, tmp_path: Path) -> None:
    name, write, read = KINDS[kind]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(ROUNDS):
        path.write_bytes(damage(whole, rng))
        reason = why_refused(lambda: read(path))
        assert reason is None or path.name in reason or "images" in reason, reason
        refused += reason is not None
    assert refused > ROUNDS // 4
