"""The page about a run: self-contained, whole, and honest about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from python_train import UserError, report
from python_train.report import main, write_page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a <run>"
    folder.mkdir()
    options = {"options": {"data": "digits", "duration": 4096, "lr": 0.01}, "network": {"model_channels": 8}}
    (folder / "options.json").write_text(json.dumps(options))
    lines = [
        {
            "Progress/kimg": 0.512 * i,
            "Loss/loss": 1 / (i + 1) if i else float("nan"),
            "Loss/learning_rate": 0.01,
            "Metric/kid/0.050": 0.5 / (i + 1),
            **{f"Noise/{sigma}/{kind}": 1.0 for sigma in (0.1, 2) for kind in ("error", "expected")},
            "Timing/sec_per_kimg": 2.5,
            "Timing/total_sec": 60.0 * i,
            **{
                f"Magnitude/Enc 8/{kind}_{which}": 1.0 + i
                for kind in ("activations", "weights")
                for which in ("max", "mean")
            },
        }
        for i in range(5)
    ]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text("kimg 1\nWARNING: weights of <layer> drift\n")
    (folder / "network-snapshot-0000002-0.050.safetensors").write_bytes(b"no snapshot")
    Image.new("RGB", (20, 10), (10, 200, 30)).save(folder / "grid.png")
    for kimg in (1, 2):
        Image.new("RGB", (20, 10), (10, 200, 30)).save(folder / f"samples-000000{kimg}-0.050.png")
    return folder


def test_page(run: Path) -> None:
    text = report.page(run)
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") == 4 + 1 + 4  # loss, learning rate, metric, speed; noise levels; magnitudes of 2 kinds
    assert re.findall(r"samples-\d+-0\.050\.png</figcaption>", text) == ["samples-0000002-0.050.png</figcaption>"]
    assert "data:image/png;base64,iVBOR" in text
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "2,048 images (50 % of 4,096), 0:04 hours, loss 0.2000" in text
    assert "WARNING: weights of &lt;layer&gt; drift" in text
    assert "<td>options.lr</td><td>0.01</td>" in text
    assert re.search(r"network-snapshot-0000002-0\.050\.safetensors</td><td>unreadable", text)
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)([^"')\s>]+)""", text)
    assert not fetched, fetched  # opens offline


def test_a_run_that_has_just_begun(run: Path) -> None:
    for name in ("stats.jsonl", "log.txt", "grid.png", "samples-0000001-0.050.png", "samples-0000002-0.050.png"):
        (run / name).unlink()
    text = report.page(run)
    assert "no statistics yet" in text
    assert "<svg" not in text


def test_command(run: Path) -> None:
    result = CliRunner().invoke(main, [str(run)])
    assert result.exit_code == 0, result.output
    assert (run / "report.html").read_text() == report.page(run)
    assert f"wrote {run / 'report.html'}" in result.output


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run: there is no options\.json"):
        write_page(tmp_path, tmp_path / "report.html")
    (tmp_path / "options.json").write_text("{")
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1
    assert "options.json is damaged" in result.output
    assert not (tmp_path / "report.html").exists()
