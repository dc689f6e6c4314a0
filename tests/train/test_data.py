"""Data sets, encoders and the order of the data."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from python_train import UserError, data
from python_train.data import (
    IndexStream,
    LatentEncoder,
    PixelEncoder,
    batches,
    open_dataset,
    open_encoder,
    stream,
)
from python_train.rng import epoch_order


def picture(value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> PIL.Image.Image:
    shape = size if mode in ("L", "P") else (*size, len(mode))
    return PIL.Image.fromarray((np.arange(np.prod(shape)).reshape(shape) + value).astype(np.uint8), mode)


def save(path: Path, image: PIL.Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three class folders of two pictures."""
    for index, name in enumerate(["ant", "bee", "cat"]):
        for k in range(2):
            save(tmp_path / "set" / name / f"{k}.png", picture(10 * index + k))
    return tmp_path / "set"


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def write_labels(folder: Path, labels: object) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_digits() -> None:
    digits = open_dataset()
    assert (digits.num_images, digits.channels, digits.resolution, digits.label_dim) == (1797, 1, 8, 10)
    images, labels = digits.load_all()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert labels.sum(dim=0).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert sorted(set((images.float() * 16 / 255).round().int().flatten().tolist())) == list(range(17))
    encoded = digits.encoder().encode(images)
    assert encoded.mean().item() == pytest.approx(0, abs=1e-4)
    assert encoded.std().item() == pytest.approx(0.5, abs=1e-4)
    assert digits[3][0].shape == (1, 8, 8)
    assert digits[3][1].tolist() == labels[3].tolist()
    assert open_dataset("digits", cond=False).label_dim == 0
    assert open_dataset("digits", cond=False)[0][1].shape == (0,)


@pytest.mark.parametrize("facts", [{"kind": "pixel"}, {"kind": "standardized", "mean": 77.8537, "std": 95.8509}])
def test_pixel_round_trip_is_exact(facts: dict) -> None:
    encoder = open_encoder(facts)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    z = encoder.encode(pixels)
    assert z.dtype == torch.float32
    assert torch.equal(encoder.decode(z), pixels)
    assert encoder.facts() == facts


def test_pixel_encoder_follows_the_specification() -> None:
    z = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.00783])
    assert PixelEncoder().decode(z).tolist() == [0, 0, 128, 255, 255, 128]  # truncated, offset 128
    assert PixelEncoder().encode(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_latent_encoder_follows_the_specification() -> None:
    encoder = LatentEncoder()
    scale, bias = (value.flatten().tolist() for value in encoder._affine(torch.device("cpu")))
    assert scale == pytest.approx([0.11990407, 0.10822511, 0.13477089, 0.15243903], rel=1e-7)
    assert bias == pytest.approx([-0.69664264, -0.35173160, -0.016172506, 0.32774392], rel=1e-7)
    stored = torch.rand(2, 8, 4, 4)
    torch.manual_seed(5)
    z = encoder.encode(stored)
    torch.manual_seed(5)
    raw = stored[:, :4] + stored[:, 4:] * torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(encoder.decode(z), raw)
    again = open_encoder(encoder.facts())
    assert again.facts() == encoder.facts()


def test_unknown_encoder() -> None:
    with pytest.raises(UserError, match="unknown encoder kind 'jpeg'"):
        open_encoder({"kind": "jpeg"})


@pytest.mark.parametrize("as_zip", [False, True])
def test_class_folders(folders: Path, as_zip: bool) -> None:
    dataset = open_dataset(zipped(folders) if as_zip else folders)
    assert (dataset.num_images, dataset.channels, dataset.resolution, dataset.label_dim) == (6, 3, 8, 3)
    assert dataset.class_names == ["ant", "bee", "cat"]
    image, label = dataset[3]
    assert np.array_equal(image, np.asarray(picture(11)).transpose(2, 0, 1))
    assert label.tolist() == [0, 1, 0]
    assert label.dtype == np.float32
    assert dataset.encoder().facts() == {"kind": "pixel"}
    assert dataset.facts()["name"] == "set"


@pytest.mark.parametrize("as_zip", [False, True])
def test_json_labels(folders: Path, as_zip: bool) -> None:
    write_labels(folders, [[f"{name}\\{k}.png", k] for name in ("ant", "bee", "cat") for k in range(2)])
    dataset = open_dataset(zipped(folders) if as_zip else folders)
    assert dataset.label_dim == 2
    assert [dataset.label(i).tolist() for i in range(2)] == [[1, 0], [0, 1]]


def test_vector_labels(folders: Path) -> None:
    write_labels(folders, [[f"{name}/{k}.png", [k, 0.5, -1]] for name in ("ant", "bee", "cat") for k in range(2)])
    dataset = open_dataset(folders)
    assert (dataset.label_dim, dataset.class_names) == (3, [])
    assert dataset.label(1).tolist() == [1, 0.5, -1]


def test_null_labels_and_numbered_folders_are_unconditional(tmp_path: Path) -> None:
    for index in range(2):
        save(tmp_path / "set" / f"{index:05d}" / f"img{index:08d}.png", picture(index))
    for _ in range(2):  # first without a dataset.json
        with pytest.raises(UserError, match=r"has no labels.*--uncond"):
            open_dataset(tmp_path / "set")
        assert open_dataset(tmp_path / "set", cond=False).label_dim == 0
        write_labels(tmp_path / "set", None)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3)])
def test_channel_counts(tmp_path: Path, mode: str, channels: int) -> None:
    image = picture(3, mode=mode)
    if mode == "P":
        image.putpalette([channel for i in range(256) for channel in (i, 0, 255 - i)])
    save(tmp_path / "0.png", image)
    dataset = open_dataset(tmp_path, cond=False)
    assert dataset.channels == channels
    if mode == "P":
        assert dataset[0][0][:, 0, 0].tolist() == [3, 0, 252]


def test_arrays(tmp_path: Path) -> None:
    latent = np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)
    np.save(tmp_path / "img-mean-std-00000000.npy", latent)
    dataset = open_dataset(tmp_path, cond=False)
    assert np.array_equal(dataset[0][0], latent)
    assert dataset.encoder().facts()["kind"] == "latent"
    np.save(tmp_path / "img-mean-std-00000000.npy", latent[:5])
    with pytest.raises(UserError, match="5 channels of float32; expected"):
        open_dataset(tmp_path, cond=False)
    np.save(tmp_path / "img-mean-std-00000000.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"img-mean-std-00000000\.npy cannot be decoded"):
        open_dataset(tmp_path, cond=False)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data set"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match="no images"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a readable ZIP"):
        open_dataset(tmp_path / "notes.txt")


def test_damaged_image_is_named(folders: Path) -> None:
    path = folders / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    dataset = open_dataset(folders)
    with pytest.raises(UserError, match=r"bee/1\.png cannot be decoded"):
        dataset.load_all()
    with pytest.raises(UserError, match=r"bee/1\.png cannot be decoded"):
        dataset.preload()
    archive = zipped(folders)
    archive.write_bytes(archive.read_bytes().replace(b"IDAT", b"IDAX", 1))  # the ZIP's own checksum no longer fits
    with pytest.raises(UserError, match=r"cannot read .*ant/0\.png"):
        open_dataset(archive)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(0, size=(16, 16)), "cat/9.png is 16x16 with 3 channels uint8 but ant/0.png is 8x8 with 3 channels"),
        (picture(0, mode="L"), "cat/9.png is 8x8 with 1 channel uint8 but ant/0.png is 8x8 with 3 channels"),
    ],
)
def test_unequal_images(folders: Path, image: PIL.Image.Image, message: str) -> None:
    save(folders / "cat" / "9.png", image)
    with pytest.raises(UserError, match=message):
        open_dataset(folders).load_all()


def test_not_square(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", picture(0, size=(8, 12)))
    dataset = open_dataset(tmp_path, cond=False)
    assert (dataset.shape, dataset.resolution) == ((3, 8, 12), 12)
    assert dataset.facts()["size"] == [8, 12]
    dataset.require_divisible(4)
    with pytest.raises(UserError, match="images of 8x12, but both sides must be divisible by 8"):
        dataset.require_divisible(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [["ant/0.png", 0]]}, "no label for 5 of 6 images, e.g. ant/1.png"),
        (
            {"labels": [[f"{n}/{k}.png", "x"] for n in ("ant", "bee", "cat") for k in range(2)]},
            "expected a class number from 0",
        ),
        (
            {"labels": [[f"{n}/{k}.png", k - 1] for n in ("ant", "bee", "cat") for k in range(2)]},
            "expected a class number from 0",
        ),
        ({"labels": [[f"{n}/{k}.png", [0] * k] for n in ("ant", "bee", "cat") for k in range(2)]}, "one length"),
        ({"labels": 3}, "dataset.json must be"),
        ({"classes": []}, "dataset.json must be"),
    ],
)
def test_inconsistent_labels(folders: Path, content: object, message: str) -> None:
    (folders / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_dataset(folders)
    assert open_dataset(folders, cond=False).label_dim == 0


def test_unreadable_json_and_stray_image(folders: Path) -> None:
    save(folders / "stray.png", picture(0))
    with pytest.raises(UserError, match=r"stray.png is in none of the class folders \(ant, bee, cat\)"):
        open_dataset(folders)
    (folders / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json must be"):
        open_dataset(folders)


def test_stream_is_a_permutation_each_epoch_and_shards_interleave() -> None:
    expected = [*epoch_order(7, 0, 10), *epoch_order(7, 1, 10), *epoch_order(7, 2, 10)]
    whole = list(itertools.islice(IndexStream(10, 7), 30))
    assert whole == [int(index) for index in expected]
    shards = [list(itertools.islice(IndexStream(10, 7, 0, rank, 3), 10)) for rank in range(3)]
    assert [index for group in zip(*shards, strict=True) for index in group] == whole
    assert list(itertools.islice(IndexStream(10, 7, 13), 17)) == whole[13:]


@pytest.mark.parametrize("limit", [data.IN_MEMORY_BYTES, 0])
def test_batches_from_memory_and_from_loader_processes(folders: Path, limit: int) -> None:
    dataset = open_dataset(zipped(folders), cache_bytes=limit)
    dataset.preload()
    assert (dataset.in_memory is None) == (limit == 0)
    stream = batches(dataset, 4, IndexStream(6, 0), torch.device("cpu"))
    order = list(itertools.islice(IndexStream(6, 0), 12))
    for step in range(3):
        images, labels = next(stream)
        for row, index in enumerate(order[4 * step : 4 * step + 4]):
            assert np.array_equal(images[row].numpy(), dataset[index][0])
            assert labels[row].tolist() == dataset[index][1].tolist()
    stream.close()


@pytest.mark.parametrize(("cache_bytes", "workers"), [(data.IN_MEMORY_BYTES, 2), (0, 0), (0, 1)])
def test_mirrored(folders: Path, cache_bytes: int, workers: int) -> None:
    plain, both = open_dataset(folders), open_dataset(folders, True, True, cache_bytes, workers)
    assert (both.num_images, both.facts()["xflip"], both.label_dim) == (12, True, 3)
    for index in range(6):
        assert np.array_equal(both[index][0], plain[index][0])
        assert np.array_equal(both[6 + index][0], plain[index][0][:, :, ::-1])
        assert np.array_equal(both[6 + index][1], plain[index][1])
    both.preload()
    assert (both.in_memory is None) == (cache_bytes == 0)
    stream = batches(both, 8, IndexStream(12, 0), torch.device("cpu"))
    order = list(itertools.islice(IndexStream(12, 0), 24))
    for step in range(3):
        images, labels = next(stream)
        for row, index in enumerate(order[8 * step : 8 * step + 8]):
            assert np.array_equal(images[row].numpy(), both[index][0])
            assert np.array_equal(labels[row].numpy(), both[index][1])
    stream.close()


@pytest.mark.parametrize("channels", [1, 3, 7, 16])
def test_arrays_of_pixels(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, [channels, 4, 6], dtype=np.uint8)
    np.save(tmp_path / "0.npy", values)
    dataset = open_dataset(tmp_path, cond=False)
    assert np.array_equal(dataset[0][0], values)
    assert (dataset.channels, dataset.encoder().facts()) == (channels, {"kind": "pixel"})
    np.save(tmp_path / "0.npy", np.zeros([17, 4, 4], np.uint8))
    with pytest.raises(UserError, match=r"17 channels of uint8; expected 1 to 16"):
        open_dataset(tmp_path, cond=False)


def test_kinds_of_labels(folders: Path) -> None:
    names = [f"{name}/{k}.png" for name in ("ant", "bee", "cat") for k in range(2)]
    assert open_dataset(folders, cond=False).label_kind == "none"
    assert open_dataset(folders).label_kind == "index"
    write_labels(folders, [[name, [1, 0, i % 2]] for i, name in enumerate(names)])
    dataset = open_dataset(folders)
    assert (dataset.label_kind, dataset.class_names, dataset.label(1).tolist()) == (
        "multi-hot",
        [],
        [1, 0, 1],
    )
    write_labels(folders, [[name, [0.5, i]] for i, name in enumerate(names)])
    assert open_dataset(folders).label_kind == "vector"
    content = {"labels": [[name, i % 2] for i, name in enumerate(names)], "class_names": ["a", "b", "c"]}
    (folders / "dataset.json").write_text(json.dumps(content))
    dataset = open_dataset(folders)
    assert (dataset.label_dim, dataset.class_names) == (3, ["a", "b", "c"])


def test_official_zip(tmp_path: Path) -> None:
    """Stored members, PNG of compression level 0, labels by name in any order; written as spec 8.1 says."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(1200, 1203)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_STORED) as archive:
        for i, name in enumerate(names):
            buffer = io.BytesIO()
            picture(i, (64, 64)).save(buffer, "png", compress_level=0, optimize=False)
            archive.writestr(name, buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[names[2], 7], [names[0], 3], [names[1], 0]]}))
    dataset = open_dataset(tmp_path / "x.zip")
    assert (dataset.shape, dataset.label_dim) == ((3, 64, 64), 8)
    assert dataset.labels.tolist() == [3, 0, 7]
    assert all(np.array_equal(dataset[i][0], np.asarray(picture(i, (64, 64))).transpose(2, 0, 1)) for i in range(3))


def test_error_in_a_loader_process_names_the_file(folders: Path) -> None:
    (folders / "bee" / "0.png").write_bytes(b"not an image")
    dataset = open_dataset(folders)
    with pytest.raises(UserError) as raised:
        next(batches(dataset, 6, IndexStream(6, 0), torch.device("cpu")))
    assert "bee/0.png cannot be decoded" in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_archives_can_be_pickled(folders: Path) -> None:
    dataset = open_dataset(zipped(folders))
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[5][0], dataset[5][0])


def test_macos_leftovers_are_ignored(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/0.png", buffer.getvalue())
        archive.writestr("__MACOSX/a/0.png", b"junk")
        archive.writestr("a/._0.png", b"junk")
    assert open_dataset(tmp_path / "x.zip", cond=False).num_images == 1


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_reader_that_dies_with_its_batch_is_named(error: Exception) -> None:
    class Loader:
        def __iter__(self) -> None:
            raise error

    with pytest.raises(UserError, match="a process that reads data is gone"):
        next(stream.read_ahead(Loader()))
