"""Watching a run: errors by noise level, grids drawn during training, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from python_train import UserError, data, loop, noise_levels, sample_grids
from python_train.config import TrainOptions
from python_train.network import Precond
from python_train.probe import Probe
from python_train.saving import Saver

TINY = TrainOptions(
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(),
    batch=32,
    duration=2048,
    lr=0.02,
    decay=50,
    rampup=100,
    precision="fp32",
    status=1024,
    snapshot=0,
    checkpoint=1024,
    tensorboard=False,
)


def stats_of(outdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (outdir / "stats.jsonl").read_text().splitlines()]


def test_error_of_a_network_that_knows_only_mean_and_variance() -> None:
    """F = 0: D = c_skip x, whose error times lambda is 1 in expectation for data of standard deviation sigma_data."""
    net = Precond(8, 1, 0, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    torch.nn.init.zeros_(net.unet.out_gain)
    generator = torch.Generator().manual_seed(0)
    images = 0.5 * torch.randn(256, 1, 8, 8, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    levels = noise_levels.measure(net, images, None, (0.01, 0.5, 20.0), noise)
    assert [level.error for level in levels] == pytest.approx([1, 1, 1], rel=0.05)
    for level in levels:
        with torch.no_grad():
            _, u = net(images[:1], level.sigma, return_logvar=True)
        assert level.expected == pytest.approx(float(u.exp()), rel=1e-5)


def test_what_is_measured_on_is_of_all_classes(tmp_path: Path) -> None:
    """Of a set in the order of its classes, mirrored images among it."""
    for i in range(4 * 30):
        path = tmp_path / "abcd"[i // 30] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
    dataset = data.open_dataset(tmp_path, xflip=True)
    probe = Probe(dataset, dataset.encoder(), torch.device("cpu"), [1.0])
    assert len(set(probe.indices)) == 32
    assert np.bincount([dataset.label(i).argmax() for i in probe.indices]).tolist() == [8, 8, 8, 8]
    assert sum(i < dataset.num_stored for i in probe.indices) == 16


def test_training_levels() -> None:
    levels = noise_levels.training_levels(-0.4, 1.0, levels=3, width=2)
    assert levels == pytest.approx([math.exp(-2.4), math.exp(-0.4), math.exp(1.6)])


def test_grids_and_metrics_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_grids, "REFERENCE_IMAGES", 100)
    options = dataclasses.replace(TINY, sample=1024, metric_images=40)
    loop.train(options, data.open_dataset("digits"), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").glob("samples-*"))
    assert names == [f"samples-000000{k}-0.{ema}.png" for k in (0, 1, 2) for ema in ("050", "100")]
    with Image.open(tmp_path / "run" / names[0]) as first, Image.open(tmp_path / "run" / names[-1]) as last:
        assert first.size == last.size
        assert np.asarray(first).std() > 10
        assert (np.asarray(first) != np.asarray(last)).any()
    first, *_, last = stats_of(tmp_path / "run")
    assert {key for key in last if key.startswith("Metric/")} == {
        f"Metric/{name}/{ema}" for name in ("fd", "kid") for ema in ("0.050", "0.100")
    }
    assert all(math.isfinite(last[key]) and last[key] > 0 for key in last if key.startswith("Metric/"))


@pytest.mark.parametrize(("channels", "words"), [(5, "the data have 5 channels"), (2, "the data have 2 channels")])
def test_grids_that_cannot_be_drawn_are_refused_before_anything_is_written(
    tmp_path: Path, channels: int, words: str
) -> None:
    (tmp_path / "data").mkdir()
    for index in range(3):
        np.save(tmp_path / f"data/{index}.npy", np.full((channels, 8, 8), index, np.uint8))
    options = dataclasses.replace(TINY, data=str(tmp_path / "data"), cond=False, sample=1024)
    with pytest.raises(UserError, match=words):
        loop.train(options, data.open_dataset(options.data, cond=False), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_drawing_changes_nothing(tmp_path: Path) -> None:
    loop.train(dataclasses.replace(TINY, sample=1024), data.open_dataset("digits"), tmp_path / "with")
    loop.train(TINY, data.open_dataset("digits"), tmp_path / "without")
    nets = [
        torch.load(tmp_path / name / "training-state-0000002.pt", weights_only=True)["net"]
        for name in ("with", "without")
    ]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert [entry["Loss/loss"] for entry in stats_of(tmp_path / "with")][1:] == [
        entry["Loss/loss"] for entry in stats_of(tmp_path / "without")
    ][1:]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = dataclasses.replace(TINY, tensorboard=True, sample=2048)
    with monkeypatch.context() as patch:  # it ends before there is a training state, and begins anew
        patch.setattr(Saver, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            loop.train(options, data.open_dataset("digits"), tmp_path)
    loop.train(dataclasses.replace(options, slice=1024), data.open_dataset("digits"), tmp_path)
    loop.train(options, data.open_dataset("digits"), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("Loss/learning_rate")}
    expected = {round(1000 * e["Progress/kimg"]): e["Loss/learning_rate"] for e in stats_of(tmp_path)}
    assert [event.step for event in events.Scalars("Loss/learning_rate")] == [0, 1024, 2048]
    assert written == pytest.approx(expected, rel=1e-5)
    assert [event.step for event in events.Images("Samples/0.050")][-1] == 2048
    assert any(tag.startswith("Noise/") for tag in events.Tags()["scalars"])


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with wandb's interface: the package talks to a server."""
    logged, started = [], {}

    class Run:
        def log(self, values: dict, step: int) -> None:
            logged.append((step, values))

        def finish(self) -> None:
            logged.append("finished")

    def init(**arguments: object) -> Run:
        started.update(arguments)
        return Run()

    fake = types.SimpleNamespace(init=init, Image=lambda picture: ("image", picture.size))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = dataclasses.replace(TINY, duration=1024, wandb="digits-project", sample=1024)
    loop.train(options, data.open_dataset("digits"), tmp_path / "my-run")
    assert started["project"] == "digits-project"
    assert started["id"] == "my-run"
    assert started["resume"] == "allow"
    assert started["config"]["lr"] == 0.02
    assert [entry[0] for entry in logged[:-1]] == [0, 1024]
    assert logged[-1] == "finished"
    assert "Loss/loss" not in logged[0][1]  # NaN before the first step
    assert math.isfinite(logged[1][1]["Loss/loss"])
    assert logged[1][1]["Samples/0.050"][0] == "image"


def test_wandb_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'edm2ext\[wandb\]'"):
        loop.train(dataclasses.replace(TINY, wandb="project"), data.open_dataset("digits"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_images": 10}, "metric-images is for what sample draws"),
        ({"vae": "some/vae"}, "vae is for what sample draws"),
        ({"sample": 1024, "metric_images": 1}, "metric_images must be at least 2"),
        ({"sample": 1000}, "sample 1000 is not divisible by batch 32"),
        ({"sample": 96}, "sample 96 is not divisible by 1024"),
    ],
)
def test_contradictions(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes).validate()
