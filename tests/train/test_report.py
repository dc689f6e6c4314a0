"""The page about a run: self-contained, whole, and honest about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from python_train import UserError, report
from python_train.report import main, write_page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a <run>"
    folder.mkdir()
    options = {"options": {"data": "digits", "duration": 4096, "lr": 0.01}, "network": {"model_channels": 8},
               "versions": {"torch": "2.13"}}  # fmt: skip
    (folder / "options.json").write_text(json.dumps(options))
    lines = [
        {
            "Progress/kimg": 0.512 * i,
            "Loss/loss": 1 / (i + 1) if i else float("nan"),
            "Loss/learning_rate": 0.01,
            "Metric/kid/0.050": 0.5 / (i + 1),
            "Metric/kid/0.100": 0.4,
            "Magnitude/Enc 8/clipped": 0.01 * (i == 3),
            "Loss/nonfinite_gradients": 0,
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
    # loss, learning rate, metric, speed; noise levels; magnitudes of 2 kinds; clipped values
    assert text.count("<svg") == 4 + 1 + 4 + 1
    assert "EMA 0.050" in text
    assert "EMA 0.100" in text
    assert "largest part clipped" in text
    assert "not finite" not in text
    assert "<td>torch</td><td>&quot;2.13&quot;</td>" in text
    assert re.findall(r"samples-\d+-0\.050\.png</figcaption>", text) == ["samples-0000002-0.050.png</figcaption>"]
    assert "data:image/png;base64,iVBOR" in text
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "2,048 images (50 % of 4,096), 0:04 hours, loss 0.2000" in text
    assert "WARNING: weights of &lt;layer&gt; drift" in text
    assert "<td>options.lr</td><td>0.01</td>" in text
    assert re.search(r"network-snapshot-0000002-0\.050\.safetensors</td><td>unreadable", text)
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)([^"')\s>]+)""", text)
    assert not fetched, fetched  # opens offline


def test_nothing_out_of_range(run: Path) -> None:
    lines = (run / "stats.jsonl").read_text().splitlines()
    (run / "stats.jsonl").write_text("\n".join(lines[:3]))
    assert "No activation was clipped, and every gradient was finite" in report.page(run)


def test_ema_lengths(run: Path) -> None:
    """Of a demo, and of searches, by a metric that is to be large here."""
    (run / "report.json").write_text(json.dumps({"sweep": [{"sigma_rel": 0.05, "kid": 1.5}]}))
    Image.new("RGB", (20, 10)).save(run / "ema-sweep.png")
    search = run / "search"
    search.mkdir()
    points = [{"point": {"sigma_rel": width}, "value": -width, "settings": "x"} for width in (0.2, 0.1)]
    (search / "table.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    (search / "best.json").write_text(json.dumps({"point": {"sigma_rel": 0.2}, "metric": "precision", "value": 0.2}))
    Image.new("RGB", (20, 10)).save(search / "sigma_rel.png")
    text = report.page(run)
    section = text[text.index("<h2>EMA lengths</h2>") :]
    section = section[: section.index("<h2>Snapshots</h2>")]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section) == ["ema-sweep.png", "search/sigma_rel.png"]
    assert "<th>sigma_rel</th><th>kid</th>" in section
    cells = '<tr><td class="number">0.1</td><td class="number">0.1</td></tr><tr><td class="number">0.2</td>'
    assert f"<th>sigma_rel</th><th>precision</th></tr>{cells}" in section


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
statistics = st.dictionaries(
    st.sampled_from(["Progress/kimg", "Loss/loss", "Timing/sec_per_kimg", "Timing/total_sec", "Metric/kid/0.05"]),
    json_values,
)


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=json_values | st.dictionaries(st.sampled_from(["options", "versions"]), json_values),
       stats=st.lists(statistics | json_values, max_size=3), sweep=json_values)  # fmt: skip
def test_any_files(tmp_path: Path, options: object, stats: list[object], sweep: object) -> None:
    """A page, or an error that names the file."""
    (tmp_path / "options.json").write_text(json.dumps(options))
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in stats))
    (tmp_path / "report.json").write_text(json.dumps({"sweep": sweep}))
    try:
        assert report.page(tmp_path).startswith("<!doctype html>")
    except UserError as error:
        assert "options.json is damaged" in str(error)  # noqa: PT017


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
