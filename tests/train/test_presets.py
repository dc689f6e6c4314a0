"""Published settings by name: the table, where files are looked for, and the command that uses them."""

from __future__ import annotations

import re
from pathlib import Path

import official_files as files
import pytest
from click.testing import CliRunner, Result
from official_files import small_net, write

from python_train import UserError, generate
from python_train.official import FILE_NAME
from python_train.presets import PRESETS, Preset, find_preset


def test_table() -> None:
    assert len(PRESETS) == 6 * 2 + 4 + 6 * 2 + 4 * 2
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
    for name, preset in PRESETS.items():
        assert (preset.gnet is None) == (preset.guidance == 1) == (re.search("guid|autog", name) is None)
        assert all(FILE_NAME.fullmatch(f"{stem}.pkl") for stem in (preset.net, preset.gnet) if stem)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown preset 'x'; the presets are: edm2-img512-xs-fid, "):
        find_preset("x", tmp_path)
    name, net = "edm2-img512-s-guid-fid", "edm2-img512-s-2147483-0.025"
    guide = "edm2-img512-xs-uncond-2147483-0.025"
    with pytest.raises(UserError, match=rf"needs {net}\.pkl and {guide}\.pkl in {tmp_path} .*fetch that from"):
        find_preset(name, tmp_path)
    write(tmp_path / f"{net}.pkl", b"")
    with pytest.raises(UserError, match=rf"needs {guide}\.pkl in"):
        find_preset(name, tmp_path)
    write(tmp_path / f"{guide}.pkl", b"")
    write(tmp_path / f"{guide}.safetensors", b"")
    found = find_preset(name, tmp_path)
    assert found == (tmp_path / f"{net}.pkl", tmp_path / f"{guide}.safetensors", 1.4)


def run(*args: object) -> Result:
    return CliRunner().invoke(generate.main, ["--device", "cpu", "--seeds", "0", "--steps", "2", *map(str, args)])


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
