"""The search for the best EMA length and guidance: where it ends, what it measures, and that it goes on."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from edm2ext.phema import PowerEMA
from python_train import UserError, data
from python_train.checkpoint import save_snapshot, snapshot_name
from python_train.metrics.compare import ReferenceFeatures
from python_train.metrics.extractors import feature_extractor
from python_train.metrics.reference import Reference, write_reference
from python_train.network import Precond
from python_train.reconstruct import search
from python_train.reconstruct.search import Table, at_the_end, corners, minimise, parabola_minimum, plot, search_axes

WIDTHS = [0.02, 0.04, 0.08, 0.16]


class Bowl:
    """A metric whose best point is known: sigma_rel 0.05, guidance 2, interval "b"; it counts its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, point: dict[str, Any]) -> float:
        self.calls.append(point)
        guidance = point.get("guidance", 2)
        interval = {None: 0.3, "a": 0.5, "b": 0.0}[point.get("interval", "b")] if guidance != 1 else 0.3
        return log(point["sigma_rel"] / 0.05) ** 2 + (guidance - 2) ** 2 + interval


def table(tmp_path: Path, settings: object = 0) -> Table:
    return Table(tmp_path / "table.jsonl", {"settings": settings})


def test_one_axis_is_swept_once_and_refined(tmp_path: Path) -> None:
    bowl = Bowl()
    found = minimise({"sigma_rel": WIDTHS}, bowl, table(tmp_path), refine=["sigma_rel"])
    assert found.point == {"sigma_rel": 0.05}, "between the listed ones"
    assert len(bowl.calls) == found.measured == len(WIDTHS) + 1


def test_several_axes_are_searched_together(tmp_path: Path) -> None:
    bowl = Bowl()
    axes = {"sigma_rel": WIDTHS, "guidance": [1, 1.5, 2, 3], "guide_sigma_rel": [0.1], "interval": [None, "a", "b"]}
    found = minimise(axes, bowl, table(tmp_path), refine=["sigma_rel"])
    assert found.point == {"sigma_rel": 0.05, "guidance": 2, "guide_sigma_rel": 0.1, "interval": "b"}
    assert len(bowl.calls) < 4 * 4 * 3, "fewer than all"
    assert len(bowl.calls) == len({json.dumps(call) for call in bowl.calls}), "nothing is measured twice"


def test_without_guidance_the_guide_makes_no_difference(tmp_path: Path) -> None:
    bowl = Bowl()
    axes = {"sigma_rel": [0.05], "guidance": [1], "guide_sigma_rel": [0.1, 0.2], "interval": [None, "a"]}
    minimise(axes, bowl, table(tmp_path))
    assert len(bowl.calls) == 1


def test_interrupted_search_goes_on(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    bowl = Bowl()

    def stopping(point: dict[str, Any]) -> float:
        if len(bowl.calls) == 3:
            raise Stop
        return bowl(point)

    with pytest.raises(Stop):
        minimise({"sigma_rel": WIDTHS}, stopping, table(tmp_path))
    with open(tmp_path / "table.jsonl", "a", encoding="utf-8") as file:
        file.write('{"point": {"sigma')  # killed while writing
    again = Bowl()
    found = minimise({"sigma_rel": WIDTHS}, again, table(tmp_path))
    assert found.point == {"sigma_rel": 0.04}
    assert len(again.calls) == 1
    assert len((tmp_path / "table.jsonl").read_text().splitlines()) == 4
    with pytest.raises(UserError, match=r"table\.jsonl holds a search with other settings"):
        table(tmp_path, settings=1)
    whole = (tmp_path / "table.jsonl").read_text()
    (tmp_path / "table.jsonl").write_text(whole.rstrip("\n"))  # killed before the end of the line
    minimise({"sigma_rel": [*WIDTHS, 0.2]}, again, table(tmp_path))
    lines = (tmp_path / "table.jsonl").read_text().splitlines()
    assert lines[:4] == whole.splitlines()
    assert len(lines) == 5
    (tmp_path / "table.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(UserError, match="line 1 is not a measurement"):
        table(tmp_path)


def test_parabola() -> None:
    assert parabola_minimum([(x, log(x / 0.05) ** 2) for x in WIDTHS]) == 0.05
    assert parabola_minimum([(0.1, 1.0), (0.2, 2.0)]) is None
    assert parabola_minimum([(0.1, 2.0), (0.15, 1.0), (0.2, 3.0)]) == pytest.approx(0.1341)
    assert parabola_minimum([(0.02, 1.0), (0.05, 0.0), (0.125, 1.0)]) is None, "a point of the curve already"


def test_axes_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "guide.safetensors"
    assert search_axes("0.1,0.2", None, "1,2", None, []) == {"sigma_rel": [0.1, 0.2]}
    axes = search_axes("0.1,0.2", file, "1,2", None, ["15-21"])
    assert axes == {
        "sigma_rel": [0.1, 0.2], "guidance": [1, 2], "guide_sigma_rel": [None], "interval": [None, "15-21"]
    }  # fmt: skip
    assert search_axes("0.1", tmp_path, "2", "0.05,0.15", [])["guide_sigma_rel"] == [0.05, 0.15]
    assert len(corners(axes)) == 8
    for arguments, words in (
        (("0.1", None, "1", "0.1", []), "need a guiding network"),
        (("0.1", file, "1", "0.1", []), "is one network"),
        (("0.1", file, "much", None, []), "--guidance: expected numbers"),
        (("0.1", file, "2", None, ["x"]), "guidance interval: expected"),
    ):
        with pytest.raises(UserError, match=words):
            search_axes(*arguments)


def test_a_guide_that_does_not_fit_at_first_is_not_given_up(tmp_path: Path) -> None:
    """Guidance helps only by a guide of another length than the search begins with."""
    axes = search_axes("0.1", tmp_path, "1,1.5,2", "0.05,0.1,0.15", ["1-2"])
    fits = {"sigma_rel": 0.1, "guide_sigma_rel": 0.15, "interval": "1-2"}

    def metric(point: dict[str, Any]) -> float:
        if point["guidance"] == 1:
            return 1.0
        return 2.0 - 1.5 * all(point[name] == value for name, value in fits.items())

    assert minimise(axes, metric, table(tmp_path)).point in ({**fits, "guidance": g} for g in (1.5, 2))


def test_the_end_of_what_was_tried_is_named() -> None:
    axes = {"sigma_rel": [0.05, 0.1, 0.2], "guide_sigma_rel": [None], "interval": [None], "guidance": [1.0, 2.0, 3.0]}
    best = {"sigma_rel": 0.1, "guide_sigma_rel": None, "interval": None, "guidance": 2.0}
    for found, expected in (
        ({}, []),
        ({"sigma_rel": 0.05}, ["sigma_rel"]),
        ({"sigma_rel": 0.2, "guidance": 3.0}, ["sigma_rel", "guidance"]),
        ({"guidance": 1.0}, []),
    ):
        assert at_the_end(axes, {**best, **found}) == expected
    guides = {**axes, "guide_sigma_rel": [0.1, 0.15]}
    assert at_the_end(guides, {**best, "guide_sigma_rel": 0.1}) == ["guide_sigma_rel"]
    assert at_the_end(guides, {**best, "guide_sigma_rel": 0.1, "guidance": 1.0}) == [], "makes no difference"


def test_plot_is_drawn(tmp_path: Path) -> None:
    axes = {"sigma_rel": WIDTHS, "guidance": [1, 2], "guide_sigma_rel": [None], "interval": [None]}
    measured = table(tmp_path)
    found = minimise(axes, Bowl(), measured)
    plot(tmp_path / "plot.png", measured, found.point, "KID", False)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored averages of a small network that moves at random, and a reference of the pixels of the digits."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = Precond(
        img_resolution=8, img_channels=1, label_dim=10, use_fp16=False, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[], channels_per_head=8, logvar_channels=8,
    ).requires_grad_(False)  # fmt: skip
    ema = PowerEMA(list(net.parameters()))
    digits = data.open_dataset(data.DIGITS)
    for step in range(1, 5):
        for param in net.parameters():
            param += 0.1 * torch.randn(param.shape)
        ema.update(1024 * step)
        for sigma_rel, profile in zip(ema.sigma_rels, ema.profiles, strict=True):
            facts = {"dataset": digits.facts(), "encoder": digits.encoder().facts(), "parameters": profile}
            path = folder / snapshot_name(1024 * step, sigma_rel)
            save_snapshot(path, net, nimg=1024 * step, sigma_rel=sigma_rel, ema_kind="power", **facts)
    extractor = feature_extractor("pixels")
    features = ReferenceFeatures.of(extractor(digits.load_all()[0][:64]))
    write_reference(folder / "ref", Reference({"pixels": features}, {"pixels": extractor.identity}, (1, 8, 8)))
    return folder


def command(folder: Path, out: Path, *arguments: str) -> Result:
    options = ["--indir", str(folder), "--outdir", str(out), "--ref", str(folder / "ref"), "--features", "pixels"]
    fast = ["--seeds", "0-7", "--steps", "2", "--device", "cpu", "--outstd", "0.05,0.1,0.15"]
    return CliRunner().invoke(search.main, [*options, *fast, *arguments])


def test_command_measures_each_point_once(run_dir: Path, tmp_path: Path) -> None:
    result = command(run_dir, tmp_path)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert {line["point"]["sigma_rel"] for line in lines} >= {0.05, 0.1, 0.15}
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == "KID-pixels"
    assert best["value"] == min(line["value"] for line in lines)
    assert (tmp_path / "sigma_rel.png").exists()
    again = command(run_dir, tmp_path)
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout[result.stdout.index("best of") :], "all was known"
    other = command(run_dir, tmp_path, "--metric", "coverage")
    assert other.exit_code == 1
    assert "holds a search with other settings" in other.output


def test_command_searches_guidance_too(run_dir: Path, tmp_path: Path) -> None:
    result = command(
        run_dir, tmp_path, "--metric", "coverage", "--gnet", str(run_dir), "--gnet-outstd", "0.2", "--guidance", "1,2",
        "--guidance-interval", "0-0", "--rounds", "1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    points = [json.loads(line)["point"] for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert {point["guidance"] for point in points} == {1, 2}
    assert json.loads((tmp_path / "best.json").read_text())["value"] >= 0, "of coverage the largest"


def test_the_guide_may_be_of_an_earlier_time(run_dir: Path, tmp_path: Path) -> None:
    """The time makes a difference, and belongs to what a table is of."""
    guided = ["--gnet", str(run_dir), "--gnet-outstd", "0.1", "--guidance", "3", "--rounds", "1"]
    found = []
    for kimg in (["--gnet-kimg", "1"], ["--gnet-kimg", "4"], []):
        out = tmp_path / "-".join(["out", *kimg[1:]])
        result = command(run_dir, out, *guided, *kimg)
        assert result.exit_code == 0, result.output
        found.append([json.loads(line)["value"] for line in (out / "table.jsonl").read_text().splitlines()])
    assert found[0] != found[1] == found[2]
    result = command(run_dir, tmp_path / "out-1", *guided)
    assert result.exit_code == 1
    assert "holds a search with other settings" in result.output


def test_another_reference_under_the_same_name_is_noticed(run_dir: Path, tmp_path: Path) -> None:
    extractor = feature_extractor("pixels")
    for number in (0, 1):
        some = data.open_dataset(data.DIGITS).load_all()[0][64 * number : 64 * number + 64]
        features = {"pixels": ReferenceFeatures.of(extractor(some))}
        write_reference(tmp_path / "ref", Reference(features, {"pixels": extractor.identity}, (1, 8, 8)))
        result = command(run_dir, tmp_path / "out", "--ref", str(tmp_path / "ref"), "--outstd", "0.1")
        assert result.exit_code == number, result.output
    assert "holds a search with other settings" in result.output


def test_bad_command_lines_draw_nothing(run_dir: Path, tmp_path: Path) -> None:
    published = tmp_path / "published.ref"
    gaussian = ReferenceFeatures.of(torch.randn(99, 64)).gaussian
    write_reference(published, Reference({"pixels": ReferenceFeatures(gaussian)}, {}, (1, 8, 8)))
    for arguments, words in (
        (["--kimg", "77"], "no snapshot was taken at 77000"),
        (["--class", "12"], "class 12 does not exist"),
        (["--features", "inception"], "has no features inception"),
        (["--seeds", "x"], "seeds: expected"),
        (["--seeds", "0-3"], "4 generated images are too few"),
        (["--ref", str(published)], "holds no features of single images, which kid needs"),
        (["--gnet", str(run_dir), "--gnet-kimg", "77"], "no snapshot was taken at 77000"),
    ):
        result = command(run_dir, tmp_path / "out", *arguments)
        assert result.exit_code == 1, result.output
        assert words in result.output
        assert not list(tmp_path.glob("out/table.jsonl"))
