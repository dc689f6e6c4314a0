"""Published settings by name: the table, where files are looked for, and the command that uses them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import official_files as files
import pytest
import torch
from click.testing import CliRunner, Result
from official_files import small_net, write
from served import served

from python_train import UserError, generate
from python_train.guidance import interval_steps
from python_train.pickles.names import FILE_NAME
from python_train.presets import PRESETS, PUBLISHED_FILES, Preset, find_preset
from python_train.sampling_options import parse_interval
from python_train.solvers import noise_levels


def test_table() -> None:
    assert len(PRESETS) == 7 * 2 + 5 + 6 * 2 + 2 * 2 + 4 * 2
    assert PRESETS["edm2-img512-xs-fid"] == Preset("edm2-img512-xs-2147483-0.135")
    assert PRESETS["edm2-img512-xxl-dino"] == Preset("edm2-img512-xxl-0939524-0.150")
    assert PRESETS["edm2-img64-xl-fid"] == Preset("edm2-img64-xl-0671088-0.040")
    assert PRESETS["edm2-img512-s-guid-dino"] == Preset(
        "edm2-img512-s-2147483-0.085", "edm2-img512-xs-uncond-2147483-0.085", 1.9
    )
    assert PRESETS["edm2-img512-xxl-autog-fid"] == Preset(
        "edm2-img512-xxl-0939524-0.075", "edm2-img512-m-0268435-0.155", 2.05
    )
    assert PRESETS["edm2-img512-s-uncond-autog-dino"] == Preset(
        "edm2-img512-s-uncond-2147483-0.090", "edm2-img512-xs-uncond-0134217-0.125", 2.9
    )
    assert PRESETS["edm2-img64-s-autog-fid"] == Preset("edm2-img64-s-1073741-0.045", "edm2-img64-xs-0134217-0.110", 1.7)
    assert PRESETS["edm2-img512-s-uncond-fid"] == Preset("edm2-img512-s-uncond-2147483-0.145")
    levels = noise_levels(32, dtype=torch.float64).tolist()
    guided = {  # spec 6.3: steps, weight, EMA length of both networks
        "s-interval-fid": (range(15, 22), 2.1, "0.025"),
        "s-interval-dino": (range(13, 20), 3.2, "0.085"),
        "xxl-interval-fid": (range(17, 23), 2.0, "0.015"),
        "xxl-interval-dino": (range(13, 20), 2.9, "0.015"),
    }
    for name, (steps, weight, width) in guided.items():
        preset = PRESETS[f"edm2-img512-{name}"]
        assert interval_steps(parse_interval(preset.interval), levels) == steps
        assert (preset.guidance, preset.gnet) == (weight, f"edm2-img512-xs-uncond-2147483-{width}")
        assert preset.net.endswith(width)
    for name, preset in PRESETS.items():
        assert (preset.interval is not None) == ("interval" in name)
        assert (preset.gnet is None) == (preset.guidance == 1) == (re.search("guid|interval|autog", name) is None)
        assert all(FILE_NAME.fullmatch(f"{stem}.pkl") for stem in (preset.net, preset.gnet) if stem)


def test_files(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(UserError, match=r"unknown preset 'x'; the presets are: edm2-img512-xs-fid, "):
        find_preset("x", folder)
    name, net = "edm2-img512-s-guid-fid", "edm2-img512-s-2147483-0.025"
    guide = "edm2-img512-xs-uncond-2147483-0.025"
    urls = f"{PUBLISHED_FILES}/{net}.pkl and {PUBLISHED_FILES}/{guide}.pkl"
    with pytest.raises(
        UserError, match=re.escape(f"fetch {urls} (licence CC BY-NC-SA 4.0) and put them into {folder}")
    ):
        find_preset(name, folder)
    write(tmp_path / f"{net}.pkl", b"")
    with pytest.raises(UserError, match=re.escape(f"fetch {PUBLISHED_FILES}/{guide}.pkl (")):
        find_preset(name, folder)
    write(tmp_path / f"{guide}.pkl", b"")
    write(tmp_path / f"{guide}.safetensors", b"")
    found = find_preset(name, folder)
    assert found == (tmp_path / f"{net}.pkl", tmp_path / f"{guide}.safetensors", 1.4, None)


def test_files_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks under the names of the published ones, downloaded once; what does not come is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    preset = PRESETS["edm2-img512-s-interval-fid"]
    site = tmp_path / "site"
    site.mkdir()
    write(site / f"{preset.net}.pkl", files.snapshot(small_net()))
    with served(site) as url:
        args = ["--preset", "edm2-img512-s-interval-fid", "--weights", f"{url}/", "--outdir", tmp_path / "a"]
        result = run(*args)
        assert result.exit_code == 1
        words = " ".join(result.output.split())
        assert f"{url}/{preset.gnet}.pkl cannot be fetched" in words
        assert f"put {preset.gnet}.pkl into a folder, and name the folder by --weights" in words
        write(site / f"{preset.gnet}.pkl", files.snapshot(small_net(label_dim=0)))
        result = run(*args)
        assert result.exit_code == 0, result.output
    assert run(*args).exit_code == 0, "the files are there already"
    (guide,) = json.loads((tmp_path / "a/options.json").read_text())["guides"]
    assert (guide["file"], guide["weight"], guide["interval"]) == (f"{preset.gnet}.pkl", 2.1, [0.28, 2.9])


def run(*args: object) -> Result:
    return CliRunner().invoke(generate.main, ["--device", "cpu", "--seeds", "0", "--steps", "8", *map(str, args)])


def test_generate(tmp_path: Path) -> None:
    """Small networks under the names of the published ones."""
    weights = tmp_path / "weights"
    weights.mkdir()
    preset = PRESETS["edm2-img512-s-guid-fid"]
    write(weights / f"{preset.net}.pkl", files.snapshot(small_net()))
    write(weights / f"{preset.gnet}.pkl", files.snapshot(small_net(label_dim=0)))
    result = run("--preset", "edm2-img512-s-guid-fid", "--weights", weights, "--outdir", tmp_path / "a")
    assert result.exit_code == 0, result.output
    pair = ["--net", weights / f"{preset.net}.pkl", "--gnet", weights / f"{preset.gnet}.pkl", "--guidance", 1.4]
    assert run(*pair, "--outdir", tmp_path / "b").exit_code == 0
    assert (tmp_path / "a/000000.png").read_bytes() == (tmp_path / "b/000000.png").read_bytes()

    result = run("--preset", "edm2-img512-s-fid", "--weights", weights, "--outdir", tmp_path / "c")
    assert result.exit_code == 1
    assert "edm2-img512-s-2147483-0.130.pkl" in result.output
    result = run("--preset", "edm2-img512-s-fid", "--guidance", 2, "--outdir", tmp_path / "c")
    assert result.exit_code == 1
    assert "--preset decides on the networks and the guidance: leave --guidance out" in result.output
    result = run("--outdir", tmp_path / "c")
    assert result.exit_code == 1
    assert "name a network: --net or --preset" in result.output
    assert not (tmp_path / "c").exists()
