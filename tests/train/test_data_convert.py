"""Conversion of images to a data set: every transform of spec 8.3, labels, atomicity, resuming."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import click.testing
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
from PIL.Image import Resampling
from runs import children

from python_train import UserError
from python_train.data import container, open_dataset, staging
from python_train.data import convert as conversion
from python_train.data.__main__ import main
from python_train.data.convert import convert
from python_train.data.transforms import TRANSFORMS, dhariwal_plan, make_transform


def photo(width: int, height: int, seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    """Noise on a gradient."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros([height, 1, 3])
    image = PIL.Image.fromarray((ramp + rng.integers(0, 55, [height, width, 3])).astype(np.uint8))
    return image.convert(mode)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two class folders of three pictures of different sizes and kinds."""
    for index, (size, mode, suffix) in enumerate(
        [((20, 30), "RGB", "png"), ((17, 16), "L", "png"), ((40, 33), "RGB", "jpg"), ((16, 16), "RGBA", "png"),
         ((50, 16), "RGB", "bmp"), ((64, 128), "P", "gif")]
    ):  # fmt: skip
        folder = tmp_path / "photos" / ("ant" if index < 3 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        photo(*size, seed=index, mode=mode).save(folder / f"{index}.{suffix}")
    return tmp_path / "photos"


def files(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with zipfile.ZipFile(path) as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


# --------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("size", "halvings", "resized", "left", "top"),
    [
        ((500, 375), [(250, 187), (125, 93)], (86, 64), 11, 0),
        ((333, 500), [(166, 250), (83, 125)], (64, 96), 0, 16),
        ((130, 257), [(65, 128)], (64, 126), 0, 31),
        ((127, 128), [], (64, 65), 0, 0),
    ],
)
def test_dhariwal_examples_of_the_specification(
    size: tuple[int, int], halvings: list[tuple[int, int]], resized: tuple[int, int], left: int, top: int
) -> None:
    assert dhariwal_plan(size, 64) == (halvings, resized, left, top)
    image = photo(*size)
    expected = image
    for halved in halvings:
        expected = expected.resize(halved, Resampling.BOX)
    expected = np.asarray(expected.resize(resized, Resampling.BICUBIC))[top : top + 64, left : left + 64]
    result = make_transform("center-crop-dhariwal", (64, 64))(image)
    assert np.array_equal(np.asarray(result), expected)


@pytest.mark.parametrize("size", [(40, 33), (33, 40), (16, 16), (17, 300)])
def test_center_crop(size: tuple[int, int]) -> None:
    image = photo(*size)
    (w, h), s = size, min(size)
    square = PIL.Image.fromarray(np.asarray(image)[(h - s) // 2 : (h + s) // 2, (w - s) // 2 : (w + s) // 2])
    expected = square.resize((16, 16), Resampling.LANCZOS)
    assert np.array_equal(np.asarray(make_transform("center-crop", (16, 16))(image)), np.asarray(expected))


def test_center_crop_wide() -> None:
    transform = make_transform("center-crop-wide", (32, 16))
    image = photo(80, 61)
    rows = PIL.Image.fromarray(np.asarray(image)[10:50])  # 40 of 61 rows give 2:1
    result = np.asarray(transform(image))
    assert result.shape == (32, 32, 3)
    assert not result[:8].any()
    assert not result[24:].any()
    assert np.array_equal(result[8:24], np.asarray(rows.resize((32, 16), Resampling.LANCZOS)))
    assert transform(photo(31, 100)) is None
    assert transform(photo(100, 49)) is None
    assert transform(photo(100, 50)).size == (32, 32)


def test_none_resizes_only_what_differs() -> None:
    image = photo(16, 24)
    assert make_transform("none", None)(image) is image
    assert make_transform("none", (16, 24))(image) is image
    resized = make_transform("none", (10, 12))(image)
    assert np.array_equal(np.asarray(resized), np.asarray(image.resize((10, 12), Resampling.LANCZOS)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("crop", None, "unknown transform 'crop'; there are none, center-crop"),
        ("center-crop", None, "needs a resolution"),
        ("center-crop-dhariwal", (64, 32), "makes squares, but the resolution is 64x32"),
        ("center-crop-wide", (16, 32), "a width of at least the height"),
    ],
)
def test_transforms_that_cannot_be(name: str, size: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_transform(name, size)


# --------------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("dest_name", ["out.zip", "out"])
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "center-crop-wide"])
def test_container(photos: Path, tmp_path: Path, dest_name: str, transform: str) -> None:
    dest = tmp_path / dest_name
    result = convert(photos, dest, transform, (16, 16), workers=1)
    assert result == (6, 0, (16, 16), "index", [])
    content = files(dest)
    assert sorted(content) == [*(f"00000/img{i:08d}.png" for i in range(6)), "dataset.json"]
    index = json.loads(content["dataset.json"])
    assert index["labels"] == [[f"00000/img{i:08d}.png", int(i > 2)] for i in range(6)]
    assert index["class_names"] == ["ant", "bee"]
    dataset = open_dataset(dest)
    assert (dataset.num_images, dataset.shape, dataset.class_names) == (6, (3, 16, 16), ["ant", "bee"])
    for i, path in enumerate(sorted(photos.rglob("*.*"))):
        with PIL.Image.open(path) as original:
            expected = make_transform(transform, (16, 16))(original.convert("RGB"))
        assert np.array_equal(dataset[i][0], np.asarray(expected).transpose(2, 0, 1))
        png = content[f"00000/img{i:08d}.png"]
        assert len(png) > 16 * 16 * 3  # not compressed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([dest_name, "photos"])


def test_labels_of_a_source_with_json_and_a_cap(photos: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, [0.1, i]] for i, name in enumerate(names)]}))
    assert convert(photos, tmp_path / "a.zip", "none", (8, 4), max_images=2, workers=1).label_kind == "vector"
    index = json.loads(files(tmp_path / "a.zip")["dataset.json"])
    assert index == {"labels": [["00000/img00000000.png", [0.1, 0]], ["00000/img00000001.png", [0.1, 1]]]}
    assert open_dataset(tmp_path / "a.zip").shape == (3, 4, 8)
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, 1] for name in names[1:]]}))
    result = convert(photos, tmp_path / "b.zip", "none", (8, 4), workers=1)
    assert result.remarks == [f"1 of 6 images have no label, such as {names[0]}: none is kept"]
    assert json.loads(files(tmp_path / "b.zip")["dataset.json"]) == {"labels": None}
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, -1] for name in names]}))
    with pytest.raises(UserError, match=r"ant/0\.png has the label -1; expected a class number"):
        convert(photos, tmp_path / "c.zip", "none", (8, 4), workers=1)


def test_class_folders_a_level_too_deep_are_told(photos: Path, tmp_path: Path) -> None:
    """As in a ZIP of a folder."""
    result = convert(photos.parent, tmp_path / "a", "none", (8, 8), workers=1)
    assert (result.written, result.label_kind) == (6, "none")
    assert result.remarks == ["the folders in photos/ are not taken as classes: only those at the top are"]
    assert convert(tmp_path / "a", tmp_path / "b", workers=1).remarks == []  # the container's own folders
    for path in photos.rglob("*.*"):
        photo(8, 8).save(path)
    for copy in ("a", "b"):
        shutil.rmtree(tmp_path / copy)
    with pytest.raises(UserError, match=r"nor several class folders \(those in photos/ are a level too deep\)"):
        open_dataset(tmp_path)


def test_small_images_are_left_out(photos: Path, tmp_path: Path) -> None:
    result = convert(photos, tmp_path / "a.zip", "center-crop-wide", (32, 16), workers=1)
    assert (result.written, result.skipped) == (2, 4)
    labels = [label for _, label in json.loads(files(tmp_path / "a.zip")["dataset.json"])["labels"]]
    assert labels == [0, 1]
    with pytest.raises(UserError, match="all 6 images are too small"):
        convert(photos, tmp_path / "b.zip", "center-crop-wide", (320, 160), workers=1)


def test_unequal_results_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ant/1\.png becomes 17x16, but ant/0\.png 20x30"):
        convert(photos, tmp_path / "a.zip", workers=1)
    assert not (tmp_path / "a.zip").exists()


def test_processes_make_the_same_file(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(photos, tmp_path / "one.zip", "center-crop", (8, 8), workers=1)
    monkeypatch.setattr(conversion, "CHUNK", 2)
    convert(photos, tmp_path / "two.zip", "center-crop", (8, 8), workers=2)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_damaged_image_then_resumed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "CHUNK", 2)
    bad = photos / "bee" / "4.bmp"
    whole = bad.read_bytes()
    bad.write_bytes(b"BM")
    dest = tmp_path / "a.zip"
    with pytest.raises(UserError, match=r"bee/4\.bmp cannot be decoded"):
        convert(photos, dest, "center-crop", (8, 8), workers=1)
    assert not dest.exists()
    chunks = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".a.zip.partial").glob("chunk-*")}
    assert len(chunks) == 2
    bad.write_bytes(whole)
    written = []
    monkeypatch.setattr(conversion, "write_chunk", lambda path, items: (written.append(path.name),
                        staging.write_chunk(path, items)))  # fmt: skip
    convert(photos, dest, "center-crop", (8, 8), workers=1)
    assert len(written) == 1
    assert written[0] not in chunks
    assert not (tmp_path / ".a.zip.partial").exists()
    convert(photos, tmp_path / "b.zip", "center-crop", (8, 8), workers=1)
    assert hashlib.sha256(dest.read_bytes()).digest() == hashlib.sha256((tmp_path / "b.zip").read_bytes()).digest()


def test_full_disk_leaves_nothing_at_the_destination(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, items: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "write_zip", full)
    with pytest.raises(OSError, match="No space left"):
        convert(photos, tmp_path / "a.zip", "center-crop", (8, 8), workers=1)
    monkeypatch.undo()
    assert not (tmp_path / "a.zip").exists()
    convert(photos, tmp_path / "a.zip", "center-crop", (8, 8), workers=1)


def test_nothing_is_overwritten_and_two_at_once_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("mine")
    with pytest.raises(UserError, match=r"a\.zip exists already"):
        convert(photos, tmp_path / "a.zip", "center-crop", (8, 8))
    assert (tmp_path / "a.zip").read_text() == "mine"
    with staging.Staging(tmp_path / "b.zip"), pytest.raises(UserError, match="another process is making"):
        convert(photos, tmp_path / "b.zip", "center-crop", (8, 8))


def _die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_reported() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(staging.in_processes(_die, [1, 2], 2))


_SLEEP = """
import signal, time
from python_train.data import staging
signal.signal(signal.SIGINT, signal.default_int_handler)
list(staging.in_processes(time.sleep, [300.0] * 8, 2))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_they_work_for(number: signal.Signals) -> None:
    """At once, not when they are done with what they have begun."""

    def wait_for(condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.05)

    def workers() -> list[int]:
        return [pid for server in children(process.pid) for pid in children(server)]

    process = subprocess.Popen([sys.executable, "-c", _SLEEP], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(workers()) == 2)
        found = workers()
        process.send_signal(number)
        assert process.wait(60) != 0
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found))
    finally:
        process.kill()


def test_item_names() -> None:
    assert container.item_name(0) == "00000/img00000000.png"
    assert container.item_name(1234567, ".npy", "img-mean-std-") == "01234/img-mean-std-01234567.npy"


def test_16_bit_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(np.full([8, 8], 40000, np.uint16)).save(tmp_path / "in" / "0.png")
    with pytest.raises(UserError, match=r"0\.png cannot be decoded \(more than 8 bits per channel"):
        convert(tmp_path / "in", tmp_path / "a.zip", workers=1)


def test_all_damaged_images_are_named_at_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "CHUNK", 2)
    for name in ("ant/0.png", "ant/1.png", "bee/4.bmp"):
        (photos / name).write_bytes((photos / name).read_bytes()[:40])
    with pytest.raises(UserError) as error:
        convert(photos, tmp_path / "a.zip", "center-crop", (8, 8), workers=1)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 images cannot be read:"
    assert [line.partition(": ")[2].split()[0] for line in lines[1:]] == ["ant/0.png", "ant/1.png", "bee/4.bmp"]
    assert len(list((tmp_path / ".a.zip.partial").glob("chunk-*"))) == 1  # of the third and fourth
    for name in ("ant/0.png", "ant/1.png", "bee/4.bmp"):
        (photos / name).unlink()
    assert convert(photos, tmp_path / "a.zip", "center-crop", (8, 8), workers=1).written == 3
    many = [str(i) for i in range(30)]
    assert conversion._listed(many).splitlines()[-1] == "  ... and 10 more"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photographs_that_lie_on_their_side(tmp_path: Path, suffix: str) -> None:
    """As the camera stored them, as in the papers' data; or as it held them."""
    upright = PIL.Image.new("RGB", (16, 32), (200, 0, 0))
    upright.paste((0, 0, 200), (0, 0, 16, 8))  # blue at the top
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned clockwise
    (tmp_path / "in").mkdir()
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "in" / f"0.{suffix}", exif=exif)
    lying = convert(tmp_path / "in", tmp_path / "a", workers=1)
    assert lying.size == (32, 16)
    assert lying.remarks == [
        f"1 images lie on their side, as their EXIF data say, such as 0.{suffix}: --upright turns them"
    ]
    assert convert(tmp_path / "in", tmp_path / "b", upright=True, workers=1)[2:] == ((16, 32), "none", [])
    red, _, blue = PIL.Image.open(tmp_path / "b" / "00000" / "img00000000.png").getpixel((8, 1))
    assert blue > 150 > 50 > red


def test_command(photos: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> click.testing.Result:
        return click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])

    result = run("convert", photos, tmp_path / "a.zip", "--transform", "center-crop", "--resolution", 8, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "6 images of 8x8 (width x height), labels: index" in result.output
    result = run("convert", photos, tmp_path / "a.zip", "--resolution", "8by8")
    assert result.exit_code == 2
    assert "expected a side such as 64" in result.output
    result = run("convert", photos, tmp_path / "a.zip")
    assert result.exit_code == 1
    assert "exists already" in result.output
    result = run("convert", tmp_path / "nowhere", tmp_path / "b.zip")
    assert "no such data set" in result.output


_CONVERT = """
import sys
from pathlib import Path
from python_train.data import convert
convert.CHUNK = 4
print("ready", flush=True)
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), "center-crop-dhariwal", (32, 32), workers=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dest_name", ["out.zip", "out"])
def test_killed_at_any_moment(tmp_path: Path, dest_name: str) -> None:
    """After each kill the destination is whole or not there; at last it is what an uninterrupted conversion makes."""
    (tmp_path / "photos").mkdir()
    for i in range(120):
        photo(300, 200, seed=i).save(tmp_path / "photos" / f"{i}.png")
    start = time.monotonic()
    convert(tmp_path / "photos", tmp_path / "whole", "center-crop-dhariwal", (32, 32), workers=1)
    takes = time.monotonic() - start
    dest, kills = tmp_path / dest_name, 0
    rng = random.Random(0)
    while not dest.exists():
        process = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, tmp_path / "photos", dest], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            try:
                process.wait(takes * rng.uniform(0.05, 0.5) * 1.3**kills)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    assert kills >= 2
    assert files(dest) == files(tmp_path / "whole")
