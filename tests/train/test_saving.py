"""Saving in a thread: order, copies, and errors that are never lost; which files are kept."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from runs import TINY, final_files, run

from python_train import checkpoint
from python_train.retention import drop_old_states
from python_train.saving import Writer, copy_to_cpu

SHORT = dataclasses.replace(TINY, duration=2048)


def test_writer_works_in_order_and_elsewhere() -> None:
    done: list[int] = []
    gate = threading.Event()
    writer = Writer()
    writer.submit(lambda: (gate.wait(), done.append(threading.get_ident())))
    writer.check()
    assert not done
    gate.set()
    writer.submit(lambda: done.append(threading.get_ident()))
    writer.wait()
    assert len(set(done)) == 1
    assert done[0] != threading.get_ident()
    writer.close()


@pytest.mark.parametrize("method", ["check", "wait", "close", "submit"])
def test_errors_of_the_writer_are_raised(method: str) -> None:
    begun: list[int] = []
    failed = threading.Event()
    writer = Writer()

    def fail() -> None:
        failed.set()
        raise OSError("no room")

    writer.submit(fail)
    failed.wait()
    while not writer._pending.done():
        pass
    with pytest.raises(OSError, match="no room"):
        writer.submit(lambda: begun.append(1)) if method == "submit" else getattr(writer, method)()
    writer.close()
    assert not begun


def test_copies_share_nothing() -> None:
    tensor = torch.randn(3, 4).t()
    state = {"a": [tensor, (tensor[0], 1, "x", None)]}
    copy = copy_to_cpu(state)
    half = copy_to_cpu(tensor, torch.float16)
    before = tensor.clone()
    tensor.zero_()
    assert torch.equal(copy["a"][0], before)
    assert copy["a"][0].stride() == before.stride()
    assert torch.equal(copy["a"][1][0], before[0])
    assert copy["a"][1][1:] == (1, "x", None)
    assert torch.equal(half, before.half())


def test_what_is_saved_is_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that take as long as the next steps hold the values of their own step."""
    run(SHORT, tmp_path / "whole")
    save_state, stream_snapshot = checkpoint.save_state, checkpoint.stream_snapshot
    waiting = threading.Event()

    def slow(write: object) -> object:
        def slowly(*args: object) -> None:
            waiting.wait(0.3)
            write(*args)

        return slowly

    monkeypatch.setattr(checkpoint, "save_state", slow(save_state))
    monkeypatch.setattr(checkpoint, "stream_snapshot", slow(stream_snapshot))
    run(SHORT, tmp_path / "slow")
    snapshots = [final_files(tmp_path / name)["snapshots"] for name in ("whole", "slow")]
    assert snapshots[0] == snapshots[1]
    for name in ("training-state-0000001.pt", "training-state-0000002.pt"):
        states = [checkpoint.load_state(tmp_path / folder / name) for folder in ("whole", "slow")]
        for one, other in zip(*(state["ema"]["profiles"][0] for state in states), strict=True):
            assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------------ retention


def state(folder: Path, nimg: int, name: str = "run") -> Path:
    path = folder / checkpoint.state_name(nimg)
    checkpoint.save_state(path, {"format_version": 2, "run": name, "nimg": nimg, "x": torch.zeros(10)})
    return path


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem[-7:]) for path in folder.iterdir() if path.suffix == ".pt")


def test_the_last_states_and_every_kth_are_kept(tmp_path: Path) -> None:
    for kimg in range(1, 11):
        state(tmp_path, 1024 * kimg)
        drop_old_states(tmp_path, "run", 1024 * kimg, keep=2, keep_every=4 * 1024)
    assert kept(tmp_path) == [4, 8, 9, 10]
    drop_old_states(tmp_path, "run", 10240, keep=0, keep_every=0)
    assert kept(tmp_path) == [4, 8, 9, 10]
    drop_old_states(tmp_path, "run", 10240, keep=1, keep_every=0)
    assert kept(tmp_path) == [10]


def test_what_another_has_written_is_never_deleted(tmp_path: Path) -> None:
    state(tmp_path, 1024, "another run")
    (tmp_path / checkpoint.state_name(2048)).write_text("my notes")
    checkpoint.save_state(tmp_path / checkpoint.state_name(3072), {"format_version": 1, "nimg": 3072})
    for kimg in (4, 5, 6, 9):
        state(tmp_path, 1024 * kimg)
    drop_old_states(tmp_path, "run", 6 * 1024, keep=1, keep_every=0)
    assert kept(tmp_path) == [1, 2, 3, 6, 9]  # 9: of a run that fell back to an earlier state


def test_retention_of_a_run(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, duration=5 * 1024, snapshot=0, status=0, keep=1, keep_every=2048)
    run(options, tmp_path / "run")
    assert kept(tmp_path / "run") == [2, 4, 5]
