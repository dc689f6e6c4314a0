"""Files of the reference program: what is read of them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import official_files as files
import pytest
import torch
from official_files import (
    Call,
    ordered_dict,
    small_net,
    write,
)
from small_official import NAME, import_everything
from test_safe_pickle import auditing

from python_train import UserError
from python_train.network import Precond
from python_train.official import read_official, read_snapshot, read_training_state
from python_train.pickles.files import read_pickle, reading
from python_train.pickles.names import name_facts, nimg_of
from python_train.pickles.objects import SNAPSHOT
from python_train.pickles.tensors import StoredTensor


@pytest.fixture(scope="module", autouse=True)
def _everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    import_everything(tmp_path_factory.mktemp("first"))


def check_equal(tensors: dict[str, StoredTensor], net: Precond) -> None:
    expected = {name: value.half() for name, value in net.state_dict().items()}
    assert list(tensors) == list(expected), "state-dict names and order"
    for name, value in expected.items():
        assert tensors[name].dtype == torch.float16
        assert torch.equal(tensors[name].read(), value), name


@pytest.mark.parametrize("layout", files.LAYOUTS.values(), ids=list(files.LAYOUTS))
@pytest.mark.parametrize(("channels", "label_dim"), [(3, 3), (4, 0)])
def test_snapshot(layout: files.Layout, channels: int, label_dim: int, tmp_path: Path) -> None:
    net = small_net(label_dim, channels, use_fp16=False)
    path = write(tmp_path / NAME, files.snapshot(net, layout))
    with auditing() as events:
        snapshot = read_snapshot(path)
    assert not events, "something was imported or executed"
    check_equal(snapshot.tensors, net)
    pixels, latents = (
        {"kind": "pixel"},
        {"kind": "latent", "mean": [5.81, 3.25, 0.12, -2.15], "std": [4.17, 4.62, 3.71, 3.28]},
    )
    assert snapshot.header == {
        "format_version": 1,
        "config": net.config,
        "nimg": 65536,
        "sigma_rel": 0.05,
        "ema_kind": "power",
        "dataset": {"name": "img", "path": "datasets/img.zip", "resolution": 8, "label_dim": label_dim},
        "encoder": latents if channels == 4 else pixels,
        "license": "CC BY-NC-SA 4.0",
        "source": {"file": NAME, "bytes": path.stat().st_size},
    }


def test_snapshot_by_the_installed_libraries(tmp_path: Path) -> None:
    """torch, NumPy and pickle of today write what the description says."""
    net = small_net(channels=4)
    snapshot = read_snapshot(write(tmp_path / NAME, files.real_snapshot(net)))
    check_equal(snapshot.tensors, net)
    assert snapshot.header["encoder"]["std"] == pytest.approx([5.0] * 4)
    assert snapshot.header["encoder"]["mean"] == pytest.approx([-2.0] * 4)


def test_both_writers_agree_on_the_instructions(tmp_path: Path) -> None:
    """The spelled-out files use the names of those that the libraries write, and no opcode that those do not."""
    net = small_net(channels=4)
    ours, real = files.snapshot(net), files.real_snapshot(net)
    assert _names(ours) == _names(real)


def _names(content: bytes) -> set[str]:
    known = r"_load_from_bytes|_rebuild_\w+|EasyDict|OrderedDict|ModuleDict|_reconstruct\w*|ndarray|HalfStorage"
    return set(re.findall(known, content.decode("latin1")))


def test_file_names() -> None:
    def facts(name: str) -> tuple[Any, ...]:
        return tuple(name_facts(Path(name)).values())

    assert facts("network-snapshot-0033554-0.075.pkl") == (2**25, 0.075, "power")
    assert facts("edm2-img512-xs-2147483-0.135.pkl") == (2**31, 0.135, "phema")
    assert facts("edm2-img512-xs-0134217-0.100.pkl") == (2**27, 0.1, "power")
    assert facts("phema-0134217-0.100.pkl") == (2**27, 0.1, "phema")
    assert facts("network-snapshot-0000000-0.100.pkl") == (0, 0.1, "power")
    assert facts("x.pkl") == (None, None, "phema")
    for nimg in (0, 1024, 2**20, 2**31, 1234 * 1024):
        assert nimg_of(nimg // 1000) == nimg


@pytest.mark.parametrize("label_dim", [0, 3])
def test_training_state(label_dim: int, tmp_path: Path) -> None:
    arguments = {"model_channels": 64, "channels_per_head": 64, "channel_mult": [1, 2], "dropout": 0, "num_blocks": 2}
    nets = {std: small_net(label_dim, 4, **arguments) for std in (0.05, 0.1)}
    path = write(tmp_path / "training-state-0000065.pt", files.training_state(nets))
    with auditing() as events:
        state = read_training_state(path)
    assert not events, "something was imported or executed"
    assert state.nimg == 65536
    assert list(state.averages) == [0.05, 0.1]
    for std, snapshot in state.averages.items():
        for name, value in nets[std].state_dict().items():
            assert torch.equal(snapshot.tensors[name].read(), value)
        config = snapshot.header["config"]
        told = {key: value for key, value in nets[std].config.items() if key not in ("channels_per_head", "dropout")}
        assert config == told
        assert (snapshot.header["sigma_rel"], snapshot.header["nimg"]) == (std, 65536)
        assert snapshot.header["encoder"]["kind"] == "latent"


def test_training_state_with_traditional_average(tmp_path: Path) -> None:
    net = small_net(model_channels=64, channels_per_head=64, channel_mult_emb=1.5, channel_mult_noise=0.5)
    state = read_official(write(tmp_path / "state.pt", files.training_state(net, nimg=1000)))
    assert list(state.averages) == [None]
    config = state.averages[None].header["config"]
    assert (config["channel_mult_emb"], config["channel_mult_noise"], config["img_channels"]) == (1.5, 0.5, 3)


def test_other_storage_types_and_views(tmp_path: Path) -> None:
    """Tensors may be views into larger storages, of any type of numbers; networks have floating-point ones."""
    base = torch.randn(5, 7, dtype=torch.float64)
    view = base.t()[2:5, 1:4]
    storage = Call(("torch.storage", "_load_from_bytes"), (files.blob(base),))
    args = (storage, view.storage_offset(), tuple(view.shape), view.stride(), False, ordered_dict({}), None)
    path = write(tmp_path / NAME, files.dumps(Call(("torch._utils", "_rebuild_tensor_v2"), args)))
    with reading(path) as file:
        tensor = read_pickle(file, SNAPSHOT)
    assert torch.equal(tensor.read(), view)


def test_arrays(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=dtype).reshape(2, 3) for dtype in ("<f4", "<f8", "<f2", "<i4", "<i8", "|u1")]
    arrays += [np.asfortranarray(arrays[0]), np.array(2.5)]
    for protocol in (2, 3, 4):
        path = write(tmp_path / NAME, pickle.dumps(arrays, protocol))
        with reading(path) as file:
            read = read_pickle(file, SNAPSHOT)
        assert all(np.array_equal(a.value, b) and a.value.dtype == b.dtype for a, b in zip(read, arrays, strict=True))


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "x.pkl", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_official(path)
