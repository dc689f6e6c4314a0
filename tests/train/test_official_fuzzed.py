"""Damaged files of the reference program, fuzzed: refused with a reason, or read."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import official_files as files
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from official_files import (
    Items,
    Mention,
    New,
    easy_dict,
    ordered_dict,
    persistent,
    small_net,
    write,
)
from small_official import NAME, import_everything, minimal_state, reason, tiny_net
from test_fuzz_files import damage
from test_safe_pickle import auditing

from python_train import UserError
from python_train.official import OfficialSnapshot, read_snapshot, read_training_state


@pytest.fixture(scope="module", autouse=True)
def _everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    import_everything(tmp_path_factory.mktemp("first"))


class Mutant(files._Writer):
    """Writes something else in the place of one value."""

    def __init__(self, at: int, instead: Any) -> None:
        super().__init__(files.CURRENT, 4)
        self.at, self.instead, self.count = at, instead, 0

    def write(self, value: Any) -> bytes:
        self.count += 1
        if self.count == self.at:
            return self.instead if isinstance(self.instead, bytes) else super().write(self.instead)
        return super().write(value)


INSTEAD = [
    None, True, -1, 0, 2**31, 2**100, -(2**100), float("nan"), float("inf"), "", "x", "a.b", "é" * 200, [], (), {},
    set(), [[]], ((),), {"a": {}}, ordered_dict({}), easy_dict({}), New(("torch.nn.modules.container", "ModuleDict")),
    persistent("Precond", {}), Mention(("numpy", "ndarray")), Mention(("torch._utils", "_rebuild_tensor_v2")),
    Mention(("dnnlib.util", "EasyDict")), b"C\x00", b"C\x03abc", b"h\x00", b"h\x05", b"h\x20", b"]\x94h\x10a",
    b"(NNt", b"N\x85\x86", b"", b"NN",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> tuple[Items, bytes, int]:
    """A small snapshot: its content, its bytes, and how many values there are in it."""
    torch.manual_seed(0)
    content = files.contents(tiny_net(channels=4))
    writer = Mutant(-1, None)
    return content, writer.dumps(content), writer.count


def fuzz(content: bytes, path: Path) -> bool:
    """Whether the file was read; anything but reading it or refusing it in a sentence is an error."""
    write(path, content)
    snapshots: list[OfficialSnapshot] = []
    why = reason(lambda: snapshots.append(read_snapshot(path)))
    assert why is None or (why.startswith(f"{path} is refused: ") and "\n" not in why), why
    for snapshot in snapshots:
        for tensor in snapshot.tensors.values():
            tensor.read()
    return why is None


def fuzz_values(rounds: int, whole: tuple[Items, bytes, int], path: Path) -> None:
    content, _, count = whole
    rng = random.Random(rounds)
    with auditing() as events:
        read = [fuzz(Mutant(rng.randint(1, count), rng.choice(INSTEAD)).dumps(content), path) for _ in range(rounds)]
    assert 0 < sum(read) < rounds
    assert not events


def fuzz_bytes(rounds: int, whole: tuple[Items, bytes, int], path: Path) -> None:
    rng = random.Random(rounds)
    with auditing() as events:
        read = [fuzz(damage(whole[1], rng), path) for _ in range(rounds)]
    assert sum(read) < rounds
    assert not events


def test_other_values_in_a_snapshot(whole: tuple[Items, bytes, int], tmp_path: Path) -> None:
    fuzz_values(40, whole, tmp_path / NAME)


def test_other_bytes_in_a_snapshot(whole: tuple[Items, bytes, int], tmp_path: Path) -> None:
    fuzz_bytes(40, whole, tmp_path / NAME)


@given(seed=st.integers(0, 2**32), cut=st.floats(0, 1))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_training_states(seed: int, cut: float, tmp_path: Path) -> None:
    content = files.zip_file(files.dumps(minimal_state(), protocol=2), {"0": bytes(16)})
    damaged = damage(content, random.Random(seed))[: round(len(content) * (cut + 0.5))]
    path = write(tmp_path / "training-state-0000001.pt", damaged)
    with pytest.raises(UserError, match="is refused: "):  # whole, it holds no network either
        read_training_state(path)


@pytest.mark.slow
def test_snapshots_fuzzed_for_a_minute(whole: tuple[Items, bytes, int], tmp_path: Path) -> None:
    end, rounds = time.monotonic() + 60, 100
    while time.monotonic() < end:
        fuzz_values(rounds, whole, tmp_path / NAME)
        fuzz_bytes(rounds, whole, tmp_path / NAME)
        rounds += 1


@pytest.mark.slow
def test_training_states_fuzzed(tmp_path: Path) -> None:
    net = small_net(model_channels=64, channels_per_head=64, channel_mult=[1])
    content = files.training_state({0.05: net})
    names = [match.start() for match in re.finditer(rb"data\.pkl|PK", content)]
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):  # near what describes the rest: the pickle and the directory
            at = min(rng.choice(names) + rng.randrange(2000), len(content) - 1)
            damaged[at] = rng.randrange(256)
        path = write(tmp_path / "training-state-0000065.pt", bytes(damaged))
        why = reason(lambda path=path: read_training_state(path))
        assert why is None or why.startswith(f"{path} is refused: ")
