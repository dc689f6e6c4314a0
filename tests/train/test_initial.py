"""Fine-tuning: weights of a snapshot fit, are named where they do not, and start anew only on request."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import official_files
import pytest
import torch
from runs import TINY, run

from python_train import UserError, checkpoint, loop
from python_train.initial import load_weights
from python_train.network import Precond

ONE_STEP = dataclasses.replace(TINY, duration=1024, snapshot=1024, status=0)


def network(**changed: object) -> Precond:
    options = dataclasses.replace(TINY, **{key: value for key, value in changed.items() if key != "label_dim"})
    return loop.build_network(options, 8, 1, changed.get("label_dim", 10))


def save(path: Path, net: Precond) -> Path:
    checkpoint.save_snapshot(path, net, nimg=5, sigma_rel=0.1, ema_kind="power", dataset={}, encoder={})
    return path


def test_all_of_it_fits(tmp_path: Path) -> None:
    theirs, ours = network(dropout=0.0, precision="fp16"), network()
    notes = load_weights(ours, save(tmp_path / "s.safetensors", theirs))
    assert notes == [f"starting from the weights of {tmp_path / 's.safetensors'} (5 images, sigma_rel 0.1)"]
    for (name, value), own in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(own, value.half().float()), name


def test_a_published_network(tmp_path: Path) -> None:
    """The authors' pickles are read as they are."""
    theirs = official_files.small_net()
    path = official_files.write(tmp_path / "edm2-img512-xs-0000065-0.100.pkl", official_files.snapshot(theirs))
    ours = Precond(**{**theirs.config, "use_fp16": False})
    notes = load_weights(ours, path)
    assert notes[0].startswith(f"starting from the weights of {path} (")
    for (name, value), own in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(own, value.half().float()), name


def test_layers_that_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "s.safetensors", network(label_dim=3, num_blocks=2))
    ours = network(channels_per_head=8)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(UserError) as refused:
        load_weights(ours, path)
    message = str(refused.value)
    assert f"{path} does not fit this network:" in message
    assert "\n  unet.emb_label.weight: [16, 10] here, [16, 3] in the file" in message
    assert "\n  unet.enc.8x8_block1.conv_res0.weight: [8, 8, 3, 3] in the file, nothing here" in message
    assert "\n  unet.enc.4x4_down.attn" not in message
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())

    notes = load_weights(ours, path, reinit=True)
    assert "starting anew: unet.emb_label.weight: [16, 10] here, [16, 3] in the file" in notes
    assert "the network was trained with channels_per_head 64; here it is 8" in notes
    stored = checkpoint.read_tensors(path)
    anew = {note.split(": ")[1] for note in notes if note.startswith("starting anew")}
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name] if name in anew else stored[name].float()), name


def test_nothing_fits(tmp_path: Path) -> None:
    path = save(tmp_path / "s.safetensors", network())
    checkpoint.stream_snapshot(path, checkpoint.read_header(path), {"x": [1]}, [torch.zeros(1)])
    with pytest.raises(UserError, match="has nothing that fits this network"):
        load_weights(network(), path, reinit=True)


def test_a_run_starts_from_it(tmp_path: Path) -> None:
    run(ONE_STEP, tmp_path / "first")
    (snapshot,) = (tmp_path / "first").glob("*1-0.050.safetensors")
    tuned = dataclasses.replace(ONE_STEP, init_from=str(snapshot), lr=1e-6)
    run(tuned, tmp_path / "tuned")
    assert (
        f"starting from the weights of {snapshot} (1,024 images, sigma_rel 0.05)"
        in (tmp_path / "tuned" / "log.txt").read_text()
    )
    tensors = checkpoint.read_tensors(snapshot)
    again = checkpoint.read_tensors(tmp_path / "tuned" / "network-snapshot-0000001-0.100.safetensors")
    for name, value in tensors.items():
        if value.dim() > 1:  # directions: lengths are normalised
            a, b = value.float().flatten(), again[name].float().flatten()
            assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999, name
    snapshot.unlink()  # it is not needed to go on
    assert run(dataclasses.replace(tuned, duration=2048), tmp_path / "tuned") == 2048
    with pytest.raises(UserError, match=r"options\.init_from: .* -> None"):
        run(dataclasses.replace(tuned, init_from=None), tmp_path / "tuned")


def test_nothing_is_written_where_it_does_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "s.safetensors", network(label_dim=3))
    options = dataclasses.replace(ONE_STEP, init_from=str(path))
    with pytest.raises(UserError, match="With --reinit these layers"):
        run(options, tmp_path / "run")
    with pytest.raises(UserError, match="no such snapshot: nowhere"):
        run(dataclasses.replace(ONE_STEP, init_from="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="which is not given"):
        dataclasses.replace(ONE_STEP, reinit=True).validate()
    assert run(dataclasses.replace(options, reinit=True), tmp_path / "run") == 1024
    assert "starting anew: unet.emb_label.weight" in (tmp_path / "run" / "log.txt").read_text()
