"""Snapshots and training states: round trips, whole-or-nothing writes, and damaged files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_train import UserError, checkpoint
from python_train.network import Precond

HEADER = {
    "nimg": 131072,
    "sigma_rel": 0.05,
    "ema_kind": "power",
    "dataset": {"name": "digits", "label_dim": 10},
    "encoder": {"kind": "pixel"},
}


def small_net() -> Precond:
    return Precond(8, 1, 10, use_fp16=False, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[])


def test_snapshot_round_trip(tmp_path: Path) -> None:
    net = small_net()
    path = tmp_path / checkpoint.snapshot_name(131072, 0.05)
    assert path.name == "network-snapshot-0000131-0.050.safetensors"
    checkpoint.save_snapshot(path, net, **HEADER, extra={"note": "x"})
    again, header = checkpoint.load_snapshot(path)
    assert header == {"format_version": 2, "config": net.config, **HEADER, "note": "x"}
    assert checkpoint.read_header(path) == header
    assert not again.training
    for (name, value), (name_again, value_again) in zip(
        net.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == name_again
        assert value_again.dtype == torch.float32
        assert torch.equal(value_again, value.half().float())
    assert not any(param.requires_grad for param in again.parameters())
    assert again(torch.zeros(1, 1, 8, 8), 1.0).shape == (1, 1, 8, 8)
    assert os.listdir(tmp_path) == [path.name]


def test_snapshot_of_an_average(tmp_path: Path) -> None:
    net = small_net()
    average = [torch.full_like(param, 2.0) for param in net.parameters()]
    checkpoint.save_snapshot(tmp_path / "a.safetensors", net, **HEADER, parameters=average)
    again, _ = checkpoint.load_snapshot(tmp_path / "a.safetensors")
    assert all((param == 2).all() for param in again.parameters())
    assert torch.equal(again.logvar_fourier.freqs, net.logvar_fourier.freqs.half().float())
    with pytest.raises(ValueError, match="zip"):
        checkpoint.save_snapshot(tmp_path / "b.safetensors", net, **HEADER, parameters=average[1:])
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_bad_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(UserError, match="no such snapshot"):
        checkpoint.load_snapshot(path)
    checkpoint.save_snapshot(path, small_net(), **HEADER)
    whole = path.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"s\.safetensors is damaged"):
            checkpoint.load_snapshot(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a snapshot of this program"):
        checkpoint.read_header(path)
    header = {"format_version": 1, "config": small_net().config, **HEADER}
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"edm2": json.dumps(header)})
    with pytest.raises(UserError, match="does not fit its configuration"):
        checkpoint.load_snapshot(path)
    for change, message in (
        ({"format_version": 3}, "format version 3; this program reads 1 to 2"),
        ({"config": None}, "the snapshot header has the config None"),
    ):
        safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"edm2": json.dumps({**header, **change})})
        with pytest.raises(UserError, match=message):
            checkpoint.load_snapshot(path)
    header.pop("encoder")
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, {"edm2": json.dumps(header)})
    with pytest.raises(UserError, match="header lacks encoder"):
        checkpoint.load_snapshot(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(checkpoint.HEADER_KEYS[1:]), json_values, max_size=2),
       config=st.dictionaries(st.sampled_from(list(small_net().config)), json_values, max_size=2))  # fmt: skip
def test_any_header(tmp_path: Path, header: dict[str, object], config: dict[str, object]) -> None:
    """A network as the header says, or an error that names the file."""
    net = small_net()
    facts = {"format_version": 1, "config": {**net.config, **config}, **HEADER, **header}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(dict(net.state_dict()), path, {"edm2": json.dumps(facts)})
    try:
        found, said = checkpoint.load_snapshot(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert said == facts
        assert {name: p.shape for name, p in found.named_parameters()} == {
            n: p.shape for n, p in net.named_parameters()
        }


@pytest.mark.parametrize("header", ["3", "null", "[1]", "[" * 100000, '"format_version"', "{"])
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(dict(small_net().state_dict()), path, {"edm2": header})
    with pytest.raises(UserError, match="is not a snapshot of this program"):
        checkpoint.load_snapshot(path)


def test_more_blocks_than_tensors(tmp_path: Path) -> None:
    net = small_net()
    facts = {"format_version": 1, **HEADER, "config": {**net.config, "num_blocks": 10**9}}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(dict(net.state_dict()), path, {"edm2": json.dumps(facts)})
    with pytest.raises(UserError, match="fewer tensors than blocks"):
        checkpoint.load_snapshot(path)


def test_state_round_trip_and_order(tmp_path: Path) -> None:
    state = {"format_version": 1, "nimg": 5, "x": torch.randn(3), "list": [torch.zeros(2), 1.5, "a", None]}
    for nimg in (0, 999_000, 10_000_000_000):
        checkpoint.save_state(tmp_path / checkpoint.state_name(nimg), state)
    (tmp_path / "training-state-x.pt").touch()
    assert [path.name for path in checkpoint.list_states(tmp_path)] == [
        "training-state-10000000.pt",
        "training-state-0000999.pt",
        "training-state-0000000.pt",
    ]
    again = checkpoint.load_state(tmp_path / "training-state-0000999.pt")
    assert torch.equal(again["x"], state["x"])
    assert again["list"][1:] == [1.5, "a", None]


def test_damaged_states(tmp_path: Path) -> None:
    path = tmp_path / "training-state-0000001.pt"
    checkpoint.save_state(path, {"format_version": 1, "x": torch.arange(10000.0)})
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"training-state-0000001\.pt is damaged"):
            checkpoint.load_state(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # inside the numbers: only the checksum can tell
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="checksum"):
        checkpoint.load_state(path)
    torch.save({"format_version": 99}, path)
    with pytest.raises(UserError, match=r"training-state-0000001\.pt has format version 99; this program reads 1 to 2"):
        checkpoint.load_state(path)
    torch.save({"x": 1}, path)
    with pytest.raises(UserError, match="is not a training state of this program"):
        checkpoint.load_state(path)


class _Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("should-not-exist",)


def test_states_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format_version": 1, "x": _Malicious()}, tmp_path / "s.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_state(tmp_path / "s.pt")
    assert os.listdir(tmp_path) == ["s.pt"]


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_text(path, "one")

    def fail_half_way() -> None:
        with checkpoint.atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match=r"cannot write .*missing/file"):
        checkpoint.write_text(tmp_path / "missing" / "file", "x")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: checkpoint.write_text(path, "x" * 40_000),
        lambda path: checkpoint.save_state(path, {"format_version": 1, "x": torch.zeros(20_000)}),
        lambda path: checkpoint.save_snapshot(path, small_net(), **HEADER),
    ],
    ids=["text", "state", "snapshot"],
)
def test_no_room_leaves_the_old_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A limit on file sizes makes a real write fail half-way, as a full disk does."""
    path = tmp_path / "file"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=rf"cannot write {path}: File too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


_OVERWRITE_FOREVER = """
import sys
from python_train import checkpoint
for round in range(10**9):
    checkpoint.write_text(sys.argv[1], f"{round:09d}" * 100_000)
    print(round, flush=True)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", _OVERWRITE_FOREVER, str(path)], stdout=subprocess.PIPE)
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    text = path.read_text()
    assert text == text[:9] * 100_000
    assert int(text[:9]) >= 4
