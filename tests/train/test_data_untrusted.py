"""Data sets made to do harm: an error that names the item, nothing written elsewhere, bounded memory."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_train import UserError
from python_train.data import container, open_dataset
from python_train.data.check import check
from python_train.data.convert import convert
from python_train.data.images import decode_array

FUZZ = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def png(width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (1, 2, 3)).save(file, "png")
    return file.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def npy_claiming(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue() + bytes(64)


def archive(path: Path, entries: list[tuple[zipfile.ZipInfo | str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of duplicate names, which are wanted here
        with zipfile.ZipFile(path, "w", method) as file:
            for entry, content in entries:
                file.writestr(entry, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


def why_refused(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def refusal(path: Path, tmp_path: Path) -> str:
    """Why reading and converting both refuse it; nothing may have been written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as read:
        open_dataset(path, cond=False).load_all()
    with pytest.raises(UserError) as converted:
        convert(path, tmp_path / "out" / "a.zip", workers=1)
    after = [p for p in sorted(tmp_path.rglob("*")) if "out" not in p.parts]
    assert after == before
    assert not (tmp_path / "out" / "a.zip").exists()
    assert check(path, workers=1).problems
    return f"{read.value}\n{converted.value}"


@pytest.mark.parametrize("name", ["../e.png", "/e.png", "a/../../e.png", "..\\e.png", "C:\\e.png", "C:e.png"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "x.zip", [("0.png", png()), (name, png())])
    text = refusal(path, tmp_path)
    assert text.count(f"{name} has a name that leads out of the archive") == 2


def test_links_duplicates_and_methods_in_a_zip(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", [("0.png", png()), (link("1.png"), b"/etc/passwd")])
    assert "1.png is a link, which is not followed" in refusal(path, tmp_path)
    path = archive(tmp_path / "b.zip", [("0.png", png()), ("1.png", png()), ("1.png", png(4, 4))])
    assert "1.png is in the archive 2 times" in refusal(path, tmp_path)
    path = archive(tmp_path / "c.zip", [("0.png", png())], zipfile.ZIP_BZIP2)
    assert "0.png is packed by method 12; only stored and deflated" in refusal(path, tmp_path)
    path = archive(tmp_path / "d.zip", [("0.png", png())])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    assert "0.png is encrypted" in refusal(path, tmp_path)


def test_links_out_of_a_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png())
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "0.png").write_bytes(png())
    os.symlink("a/0.png", folder / "1.png")
    assert open_dataset(folder, cond=False).num_images == 2  # within the folder is well
    os.symlink("../outside/secret.png", folder / "2.png")
    assert "2.png is a link out of the folder" in refusal(folder, tmp_path)
    (folder / "2.png").unlink()
    os.symlink("../outside", folder / "more")
    assert "more is a link out of the folder" in refusal(folder, tmp_path)
    (folder / "more").unlink()
    os.symlink("..", folder / "a" / "again")
    assert "a/again is a link to a folder" in refusal(folder, tmp_path)


def test_a_link_as_the_data_set_itself_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0.png").write_bytes(png())
    os.symlink("real", tmp_path / "link")
    assert open_dataset(tmp_path / "link", cond=False).num_images == 1


def test_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "0.png")
    assert "0.png is not a regular file" in refusal(tmp_path / "set", tmp_path)
    with pytest.raises(UserError, match=r"0\.png is neither a folder nor a file"):
        open_dataset(tmp_path / "set" / "0.png")


def test_zip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_FILE_BYTES", 2**25)
    huge = zipfile.ZipInfo("1.png")
    huge.compress_type = zipfile.ZIP_DEFLATED
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0.png", png())
        with file.open(huge, "w") as entry:
            for _ in range(container.MAX_FILE_BYTES // 2**24 + 1):
                entry.write(bytes(2**24))
    assert path.stat().st_size < 2**20
    assert f"1.png has {container.MAX_FILE_BYTES + 2**24:,} bytes; at most" in refusal(path, tmp_path)

    path = archive(tmp_path / "b.zip", [("0.png", bytes(2**26))], zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 100)  # the directory lies about the size
    path.write_bytes(content)
    assert "its size differs" in refusal(path, tmp_path)


_MEMORY = """
import resource, sys
from python_train import UserError
from python_train.data import open_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        open_dataset(path, cond=False).load_all()
    except UserError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    paths = [
        archive(tmp_path / "a.zip", [("0.png", png_claiming(60000, 60000))]),
        archive(tmp_path / "b.zip", [("0.png", png_claiming(2**31 - 1, 2**31 - 1))]),
        archive(tmp_path / "c.zip", [("0.npy", npy_claiming((8, 2**15, 2**15)))]),
        archive(tmp_path / "d.zip", [("0.npy", npy_claiming((8, 2**40, 2**40)))]),
        archive(tmp_path / "e.zip", [("0.png", bytes(2**28))], zipfile.ZIP_DEFLATED),
    ]
    content = bytearray(paths[-1].read_bytes())
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 100)
    paths[-1].write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _MEMORY, *map(str, paths)], capture_output=True, text=True
    )
    *messages, grown = result.stdout.splitlines()
    assert len(messages) == len(paths), result.stderr
    assert all(str(path) in message for path, message in zip(paths, messages, strict=True)), messages
    assert int(grown) < 200_000, grown  # KiB


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 2**20, 2**20), "<f4"),
        ((-1, 4, 4), "<f4"),
        ((4,), "<f4"),
        ((), "<f4"),
        ((8, 0, 4), "<f4"),
        ((2, 2, 2), "|O"),
    ],
)
def test_arrays_that_are_not_what_they_say(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(UserError, match=r"^x\.npy "):
        decode_array("x.npy", "x.npy", npy_claiming(shape, dtype))


def test_arrays_of_other_byte_and_index_orders(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal([8, 3, 5]).astype(np.float32)
    for stored in (values, values.astype(">f4"), np.asfortranarray(values)):
        file = io.BytesIO()
        np.save(file, stored)
        array = decode_array("x", "x.npy", file.getvalue())
        assert array.dtype.isnative
        assert array.flags.writeable
        assert np.array_equal(array, values)


@pytest.mark.parametrize("content", ["{", "[]", "3", '"labels"', '{"labels": {"0.png": {}}}', '{"labels": [["0.png"]]}',
                                     '{"labels": [3]}', "[" * 100000, '{"labels": ' + "9" * 5000 + "}", "\0", "\xff",
                                     '{"labels": null, "statistics": {"mean": [0], "std": [0]}}',
                                     '{"labels": null, "statistics": [1]}',
                                     '{"labels": null, "class_names": [1]}'])  # fmt: skip
def test_broken_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "dataset.json").write_text(content, encoding="latin1")
    with pytest.raises(UserError, match=r"dataset\.json must be"):
        open_dataset(tmp_path)
    assert [problem.name for problem in check(tmp_path, workers=1).problems] == ["dataset.json"]
    assert open_dataset(tmp_path, cond=False).num_images == 1


@pytest.mark.parametrize("label", [-1, 10**9, 2**70, True, 1.5, "1", None, {}, [], [1, "x"], [float("nan")], [1e300],
                                   [True], [[1]]])  # fmt: skip
def test_labels_out_of_range(tmp_path: Path, label: object) -> None:
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["0.png", label]]}))
    with pytest.raises(UserError, match=r"0\.png has the label"):
        open_dataset(tmp_path)
    assert [problem.name for problem in check(tmp_path, workers=1).problems] == ["0.png"]


def test_labels_beyond_the_class_names(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["0.png", 2]], "class_names": ["a", "b"]}))
    with pytest.raises(UserError, match=r"0\.png has the label 2; expected a class number from 0 to 1"):
        open_dataset(tmp_path)


def test_postscript_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "0.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(UserError, match="no images"):
        open_dataset(tmp_path, cond=False)
    (tmp_path / "0.eps").rename(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0\.png cannot be decoded.*not an image of a known kind"):
        open_dataset(tmp_path, cond=False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(labels=st.lists(st.tuples(st.sampled_from(["0.png", "1.png", "x"]), json_values), max_size=4) | json_values,
       extra=st.dictionaries(st.sampled_from(["class_names", "statistics", "about"]), json_values))  # fmt: skip
def test_any_index(tmp_path: Path, labels: object, extra: dict) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels, **extra}))
    problems = check(tmp_path, workers=1).problems
    reason = why_refused(lambda: open_dataset(tmp_path))
    if reason is not None:
        assert problems or "has no labels" in reason
        return
    dataset = open_dataset(tmp_path)
    assert np.isfinite(np.stack([dataset.label(i) for i in range(2)])).all()
    assert all("there is no such file" in reason for _, reason in problems)


@FUZZ
@given(names=st.lists(st.text(alphabet="a.b/\\:é", min_size=1, max_size=8), max_size=4), seed=st.integers(0, 2**32))
def test_any_archive(tmp_path: Path, names: list[str], seed: int) -> None:
    """Odd names, and damage anywhere: all items or an error, and no file but the archive."""
    path = archive(tmp_path / "x.zip", [("0.png", png()), *((name + ".png", png()) for name in names)])
    rng = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(3)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    unopened = why_refused(lambda: check(path, workers=1))
    reason = why_refused(lambda: open_dataset(path, cond=False).load_all())
    if unopened is None:
        problems = check(path, workers=1).problems
        assert (reason is not None) == any("class folders" not in text for _, text in problems), (reason, problems)
    else:
        assert reason == unopened
    assert list(tmp_path.iterdir()) == [path]


@FUZZ
@given(content=st.binary(max_size=200), head=st.sampled_from([b"", b"\x93NUMPY\x01\x00", png()[:40], b"BM", b"GIF89a"]))
def test_any_bytes(content: bytes, head: bytes) -> None:
    for name in ("x.npy", "x.png"):
        reason = why_refused(lambda name=name: decode_array("x.file", name, head + content))
        assert reason is None or reason.startswith("x.file ")


def test_huge_pictures_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(UserError, match=r"9000x9000 are more than 67,108,864 pixels"):
        decode_array("x", "x.png", png_claiming(9000, 9000))
