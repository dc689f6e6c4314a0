"""Post-hoc EMA on snapshot files: exactness, a synthetic training run, the command and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from edm2ext.phema import PowerEMA
from python_train import UserError
from python_train.checkpoint import load_snapshot, save_snapshot, snapshot_name
from python_train.network import Precond
from python_train.reconstruct import Snapshot, find_snapshots, main, reconstruct, target_time

TRACKED, UNSTORED = (0.05, 0.10), (0.075, 0.15)
STEP, STEPS, EVERY = 1024, 256, 16
DATASET, ENCODER = {"name": "synthetic"}, {"kind": "pixel"}


def make_network(channels: int = 1) -> Precond:
    return Precond(
        img_resolution=4, img_channels=channels, label_dim=3, use_fp16=False, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[], channels_per_head=8, logvar_channels=8,
    )  # fmt: skip


def save(folder: Path, net: Precond, nimg: int, sigma_rel: float, kind: str = "power", prefix: str = "") -> Path:
    path = folder / snapshot_name(nimg, sigma_rel, *([prefix] if prefix else []))
    facts = {"dataset": DATASET, "encoder": ENCODER}
    save_snapshot(path, net, nimg=nimg, sigma_rel=sigma_rel, ema_kind=kind, **facts)
    return path


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, list[torch.Tensor]]]:
    """A run whose weights drift smoothly with noise on top; returns its folder and the averages tracked directly."""
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    net = make_network().requires_grad_(False)
    params = list(net.parameters())
    ema = PowerEMA(params, TRACKED + UNSTORED)
    drift = [torch.randn(param.shape, generator=generator) for param in params]
    with torch.no_grad():
        for step in range(STEPS + 1):
            nimg = step * STEP
            if step > 0:
                for param, direction in zip(params, drift, strict=True):
                    param += direction / step + 0.05 * torch.randn(param.shape, generator=generator)
                ema.update(nimg, STEP)
            if step % EVERY == 0:
                for sigma_rel, profile in zip(TRACKED, ema.profiles, strict=False):
                    stored = make_network()
                    stored.load_state_dict(net.state_dict())
                    for param, average in zip(stored.parameters(), profile, strict=True):
                        param.copy_(average)
                    save(folder, stored, nimg, sigma_rel)
    return folder, dict(zip(ema.sigma_rels, ema.profiles, strict=True))


def flat(tensors: object) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_unstored_profiles_equal_those_tracked_directly(
    training: tuple[Path, dict[float, list[torch.Tensor]]], backend: str
) -> None:
    folder, tracked = training
    results = list(reconstruct(find_snapshots(folder), UNSTORED))
    assert [result.sigma_rel for result in results] == list(UNSTORED)
    for result in results:
        found, wanted = flat(result.net.parameters()), flat(tracked[result.sigma_rel])
        nearest_stored = min((flat(tracked[width]) - wanted).norm() for width in TRACKED)
        assert (found - wanted).norm() < 0.05 * nearest_stored
        assert (found - wanted).norm() < 2**-10 * wanted.norm()  # float16 files: 2**-12 for their rounding alone


def test_stored_profiles_come_back(training: tuple[Path, dict[float, list[torch.Tensor]]], backend: str) -> None:
    folder, _ = training
    middle = STEPS // 2 * STEP
    for result in reconstruct(find_snapshots(folder), TRACKED, middle):
        stored, header = load_snapshot(folder / snapshot_name(middle, result.sigma_rel))
        assert result.nimg == header["nimg"] == middle
        for name, value in result.net.state_dict().items():
            torch.testing.assert_close(value, stored.state_dict()[name], rtol=2**-10, atol=2**-20)


def test_batches_do_not_change_results(training: tuple[Path, dict[float, list[torch.Tensor]]]) -> None:
    snapshots = find_snapshots(training[0])
    widths = [0.03, 0.06, 0.2]
    together = list(reconstruct(snapshots, widths))
    for one, other in zip(together, reconstruct(snapshots, widths, batch=2), strict=True):
        assert torch.equal(flat(one.net.parameters()), flat(other.net.parameters()))
    assert not together[0].net.training
    assert not any(param.requires_grad for param in together[0].net.parameters())


def run(indir: Path, outdir: Path, *args: object) -> Result:
    return CliRunner().invoke(main, ["--indir", str(indir), "--outdir", str(outdir), *(str(arg) for arg in args)])


def test_command_writes_what_the_library_returns(
    training: tuple[Path, dict[float, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder, _ = training
    out = tmp_path / "out"
    result = run(folder, out, "--outstd", "0.06,0.08,...,0.12", "--batch", 3)
    assert result.exit_code == 0, result.output
    last = STEPS * STEP
    widths = (0.06, 0.08, 0.10, 0.12)
    assert sorted(path.name for path in out.iterdir()) == [snapshot_name(last, width, "phema") for width in widths]
    for expected in reconstruct(find_snapshots(folder), widths):
        net, header = load_snapshot(out / snapshot_name(last, expected.sigma_rel, "phema"))
        assert header["ema_kind"] == "phema"
        assert header["sigma_rel"] == pytest.approx(expected.sigma_rel)
        assert (header["nimg"], header["dataset"], header["encoder"]) == (last, DATASET, ENCODER)
        assert torch.equal(flat(net.parameters()), flat(expected.net.parameters()))

    marker = out / snapshot_name(last, 0.06, "phema")
    marker.write_bytes(b"kept")
    result = run(folder, out, "--outstd", "0.06,0.14")
    assert result.exit_code == 1
    assert "1 of the results exist already" in result.output
    result = run(folder, out, "--outstd", "0.06,0.14", "--skip-existing")
    assert result.exit_code == 0, result.output
    assert "1 networks written" in result.output
    assert marker.read_bytes() == b"kept"
    assert run(folder, out, "--outstd", "0.06,0.14", "--skip-existing").exit_code == 0
    assert run(folder, out, "--outstd", "0.06", "--overwrite").exit_code == 0
    assert marker.read_bytes() != b"kept"


def test_command_options_select_inputs_and_time(
    training: tuple[Path, dict[float, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder, _ = training
    kimg = 4 * EVERY * STEP // 1000
    result = run(
        folder, tmp_path, "--outstd", "0.09", "--outkimg", kimg, "--prefix", "mine", "--instd", "0.10",
        "--inprefix", "network-snapshot",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    net, header = load_snapshot(tmp_path / f"mine-{kimg:07d}-0.090.safetensors")
    assert header["nimg"] == 4 * EVERY * STEP
    inputs = find_snapshots(folder, sigma_rels=[0.10])
    assert {snapshot.sigma_rel for snapshot in inputs} == {0.10}
    expected = next(reconstruct(inputs, [0.09], header["nimg"]))
    assert torch.equal(flat(net.parameters()), flat(expected.net.parameters()))


def test_reconstructed_and_foreign_files_are_not_inputs(tmp_path: Path) -> None:
    net = make_network()
    wanted = [save(tmp_path, net, nimg, 0.05) for nimg in (0, 1024, 2048)]
    save(tmp_path, net, 2048, 0.15, "phema", "phema")
    (tmp_path / "training-state-0000002.pt").write_bytes(b"")
    (tmp_path / "grid.png").write_bytes(b"")
    assert [snapshot.path for snapshot in find_snapshots(tmp_path)] == wanted
    assert len(find_snapshots(tmp_path, prefix="phema")) == 1
    result = next(reconstruct(find_snapshots(tmp_path), [0.05]))
    torch.testing.assert_close(flat(result.net.parameters()), flat(net.half().float().parameters()))


def test_errors_name_file_and_cause(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    run_dir.mkdir()
    net = make_network()
    for nimg in (0, 1024, 2048):
        save(run_dir, net, nimg, 0.05)
    cases = [
        ([tmp_path / "missing", out, "--outstd", "0.1"], "no such folder"),
        ([tmp_path, out, "--outstd", "0.1"], "holds no network-snapshot-*.safetensors"),
        ([run_dir, out, "--outstd", "0.3"], "0.3"),
        ([run_dir, out, "--outstd", "abc"], "abc"),
        ([run_dir, out, "--outstd", "0.1001,0.1004"], "do not tell these apart"),
        ([run_dir, out, "--outstd", "0.1", "--outkimg", "7"], "no snapshot was taken at 7000 images"),
        ([run_dir, out, "--outstd", "0.1", "--instd", "0.2"], "holds no"),
    ]
    for args, words in cases:
        result = run(*args)
        assert result.exit_code == 1, args
        assert words in result.output, result.output
    broken = save(run_dir, net, 3072, 0.05)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    result = run(run_dir, out, "--outstd", "0.1")
    assert result.exit_code == 1
    assert broken.name in result.output
    assert "damaged" in result.output
    broken.unlink()

    other = save(run_dir, make_network(channels=2), 3072, 0.05)
    result = run(run_dir, out, "--outstd", "0.1")
    assert result.exit_code == 1
    assert other.name in result.output
    assert "config differs" in result.output
    other.unlink()

    save(run_dir, net, 2048, 0.05, prefix="copy")
    result = run(run_dir, out, "--outstd", "0.1")
    assert result.exit_code == 1
    assert "hold the same average" in result.output
    assert not list(out.glob("*")), "something half-written was left"


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A header that promises another network than the file holds."""
    path = save(tmp_path, make_network(), 1024, 0.05)
    wrong = Snapshot(path, find_snapshots(tmp_path)[0].header | {"config": make_network(channels=2).config})
    with pytest.raises(UserError, match="missing, unknown or of a wrong shape"):
        next(reconstruct([wrong], [0.1]))


def test_time_without_averages(tmp_path: Path) -> None:
    save(tmp_path, make_network(), 0, 0.05)
    with pytest.raises(UserError, match="the only snapshots are those at 0 images"):
        target_time(find_snapshots(tmp_path))


def test_help_explains_every_option() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for param in main.params:
        assert param.hidden or param.opts[0] in result.output
        assert param.help
