"""Commands check and stats."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch

from python_train import UserError
from python_train.data import VAE_MEAN, VAE_STD, open_dataset
from python_train.data.__main__ import main
from python_train.data.check import check
from python_train.data.statistics import measure, store


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, [size, size, 3], dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(6):
        PIL.Image.fromarray(pixels(i)).save(folder / f"{i}.png")
    return folder


def label(folder: Path, labels: list) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def latents(tmp_path: Path, channels: int = 4, count: int = 50) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    rng = np.random.default_rng(0)
    center, width = np.arange(channels)[:, None, None], 1 + np.arange(channels)[:, None, None]
    for i in range(count):
        mean = center + width * rng.standard_normal([channels, 8, 8])
        std = np.full([channels, 8, 8], 0.5)
        np.save(folder / f"img-mean-std-{i:08d}.npy", np.concatenate([mean, std]).astype(np.float32))
    return folder


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_sound_data_set(images: Path, as_zip: bool) -> None:
    label(images, [[f"{i}.png", i % 3] for i in range(6)])
    result = run("check", zipped(images) if as_zip else images, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "6 items, 8x8 with 3 channels uint8; 0 problems" in result.output


def test_everything_wrong_is_named(images: Path, tmp_path: Path) -> None:
    (images / "0.png").write_bytes((images / "0.png").read_bytes()[:90])
    PIL.Image.fromarray(pixels(1, 4)).save(images / "1.png")
    np.save(images / "2.npy", np.full([8, 4, 4], np.nan, np.float32))
    np.save(images / "3.npy", np.full([8, 4, 4], -1, np.float32))
    (images / "4.npy").write_bytes(b"\x93NUMPY\x01\x00")
    os.symlink("/etc/hostname", images / "5.jpg")
    os.symlink("missing.png", images / "6.jpg")
    os.mkfifo(images / "7.png")
    label(images, [["0.png", 0], ["1.png", -1], ["2.png", 1], ["3.png", "x"], ["4.png", 2], ["9.png", 0],
                   ["4.png", 2]])  # fmt: skip
    result = run("check", images, "--workers", 1)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    for text in (
        "0.png: cannot be decoded",
        "1.png: is 4x4 with 3 channels uint8 where most are 8x8 with 3 channels uint8",
        "1.png: has the label -1; expected a class number",
        "2.npy: has values that are not finite",
        "3.npy: has standard deviations",
        '3.png: has the label "x"',
        "4.npy: cannot be decoded",
        "4.png: is in dataset.json 2 times",
        "5.jpg: is a link out of the folder",
        "5.png: has no label",
        "6.jpg: is a link to nothing",
        "7.png: is not a regular file",
        "9.png: has a label in dataset.json, but there is no such file",
    ):
        assert any(line.startswith(text) for line in lines), (text, lines)
    assert not any(line.startswith(("0.png: has", "2.png")) for line in lines)


def test_processes_find_the_same(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_train.data.check.CHUNK", 2)
    (images / "3.png").write_bytes(b"")
    assert check(images, workers=2) == check(images, workers=1)


def test_no_data_at_all(tmp_path: Path) -> None:
    assert run("check", tmp_path / "nowhere").exit_code == 1
    (tmp_path / "empty").mkdir()
    result = run("check", tmp_path / "empty")
    assert result.exit_code == 1
    assert "holds no images" in result.output


# --------------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_pixels(images: Path) -> None:
    values = np.stack([pixels(i) for i in range(6)]).reshape(-1, 3).astype(np.float64)
    statistics = measure(images, workers=1)
    assert statistics.mean == pytest.approx(values.mean(axis=0))
    assert statistics.std == pytest.approx(values.std(axis=0))


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("channels", [4, 3])
def test_latents_are_whitened_by_what_is_stored(tmp_path: Path, channels: int, as_zip: bool) -> None:
    path = latents(tmp_path, channels)
    (path / "notes.txt").write_text("mine")
    (path / "dataset.json").write_text(json.dumps({"labels": None, "mine": 1}))
    path = zipped(path) if as_zip else path
    if channels == 4:
        assert open_dataset(path, cond=False).encoder().facts() == {
            "kind": "latent", "mean": list(VAE_MEAN), "std": list(VAE_STD)
        }  # fmt: skip
    else:
        with pytest.raises(UserError, match=r"latents of 3 channels without statistics.*data stats"):
            open_dataset(path, cond=False).encoder()
    result = run("stats", path, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert f"channel {channels - 1}: mean " in result.output
    dataset = open_dataset(path, cond=False)
    assert (dataset.num_images, dataset.channels) == (50, 2 * channels)
    encoder = dataset.encoder()
    stored, _ = dataset.load_all()
    torch.manual_seed(0)
    z = torch.cat([encoder.encode(stored) for _ in range(20)])
    assert z.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * channels, abs=5e-3)
    assert z.std(dim=(0, 2, 3)).tolist() == pytest.approx([0.5] * channels, abs=5e-3)
    if as_zip:
        with zipfile.ZipFile(path) as archive:
            assert archive.read("notes.txt") == b"mine"
            assert json.loads(archive.read("dataset.json"))["mine"] == 1
    else:
        assert json.loads((path / "dataset.json").read_text())["mine"] == 1


def test_statistics_keep_the_labels_of_class_folders(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels(i)).save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png")
    before = open_dataset(tmp_path / "set")
    store(tmp_path / "set", measure(tmp_path / "set", workers=1))
    after = open_dataset(tmp_path / "set")
    assert after.class_names == before.class_names == ["a", "b"]
    assert np.array_equal(after.labels, before.labels)


def test_statistics_do_not_lose_the_labels_of_class_folders(tmp_path: Path) -> None:
    for i, folder in enumerate(["a", "b", "."]):
        (tmp_path / folder).mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels(i)).save(tmp_path / folder / f"{i}.png")
    result = run("stats", tmp_path, "--workers", 1)
    assert result.exit_code == 1
    assert "2.png is in none of the class folders (a, b): the labels would be lost" in result.output
    assert not (tmp_path / "dataset.json").exists()


def test_processes_sum_alike(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("python_train.data.statistics.CHUNK", 2)
    assert measure(images, workers=2) == measure(images, workers=1)


def test_no_statistics(images: Path, tmp_path: Path) -> None:
    PIL.Image.fromarray(pixels(1)[..., 0]).save(images / "3.png")
    with pytest.raises(UserError, match=r"3\.png and 0\.png differ in their channels"):
        measure(images, workers=1)
    (tmp_path / "flat").mkdir()
    PIL.Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "flat" / "0.png")
    with pytest.raises(UserError, match="channel 0 is constant"):
        measure(tmp_path / "flat", workers=1)
