"""Post-hoc EMA on snapshot files: exactness, a synthetic training run, the command and its errors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from edm2ext.phema import PowerEMA, Quality, Target, open_average, save_average, solve_coefficients
from edm2ext.phema import Reconstruction as Reconstructing
from edm2ext.phema.stored import OpenFiles
from python_train import UserError, data, loop
from python_train.checkpoint import load_snapshot, save_snapshot, snapshot_name
from python_train.config import make_options
from python_train.network import Precond
from python_train.pickles.tensors import Storage, StoredTensor
from python_train.reconstruct import Snapshot, find_snapshots, main, reconstruct, target_time
from python_train.reconstruct.__main__ import main as dispatch
from python_train.reconstruct.command import warnings
from python_train.reconstruct.snapshots import in_pickle, open_snapshots
from python_train.trainer import Trainer

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
        ([run_dir, out, "--outstd", "0.1", "--device", "toaster"], "device 'toaster' cannot be used here"),
        ([run_dir, out, "--outstd", "0.1", "--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
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


def test_several_times_in_one_pass(training: tuple[Path, dict[float, list[torch.Tensor]]], tmp_path: Path) -> None:
    folder, _ = training
    times = [EVERY * STEP * k for k in (4, 9)]
    kimg = ",".join(str(time // 1000) for time in times)
    result = run(folder, tmp_path, "--outstd", "0.07,0.13", "--outkimg", kimg, "--dtype", "fp32", "--memory", 1)
    assert result.exit_code == 0, result.output
    assert "4 networks written" in result.output
    for time in times:
        for expected in reconstruct(find_snapshots(folder), [0.07, 0.13], time):
            path = tmp_path / snapshot_name(time, expected.sigma_rel, "phema")
            net, header = load_snapshot(path)
            assert header["nimg"] == time
            torch.testing.assert_close(flat(net.parameters()), flat(expected.net.parameters()), rtol=1e-3, atol=1e-6)
            assert load_file(path)["unet.out_gain"].dtype == torch.float32
    for bad, words in (("x,16", "thousands of images separated by commas"), ("77", "no snapshot was taken at 77000")):
        result = run(folder, tmp_path, "--outstd", "0.07", "--outkimg", bad)
        assert result.exit_code == 1
        assert words in result.output


def test_lengths_of_some_parameters(training: tuple[Path, dict[float, list[torch.Tensor]]], tmp_path: Path) -> None:
    folder, _ = training
    result = run(folder, tmp_path, "--outstd", "0.06", "--group", "unet.dec.*=0.15", "--group", "unet.*=0.10")
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    net, header = load_snapshot(path)
    assert path.name.startswith("phema-groups-")
    assert header["sigma_rel_of"] == {"unet.dec.*": 0.15, "unet.*": 0.10}
    plain = {found.sigma_rel: found.net for found in reconstruct(find_snapshots(folder), [0.06, 0.10, 0.15])}
    for name, param in net.named_parameters():
        width = 0.15 if name.startswith("unet.dec.") else 0.10 if name.startswith("unet.") else 0.06
        assert torch.equal(param, plain[width].get_parameter(name)), name
    for bad in ("unet.dec.*", "=0.1", "unet.*=x"):
        assert "--group: expected a pattern" in run(folder, tmp_path, "--outstd", "0.06", "--group", bad).output
    result = run(folder, tmp_path, "--outstd", "0.06", "--group", "vnet.*=0.1", "--overwrite")
    assert "no parameter is named like 'vnet.*'" in result.output


def test_other_shapes_of_the_profile(tmp_path: Path, training: tuple[Path, dict[float, list[torch.Tensor]]]) -> None:
    """The mean of the last part of training, and the classic EMA, as tracked directly."""
    folder = tmp_path / "run"
    folder.mkdir()
    net = make_network().requires_grad_(False)
    ema = PowerEMA(list(net.parameters()), TRACKED)
    sums = {name: [torch.zeros_like(p) for p in net.parameters()] for name in ("window", "exponential")}
    steps, sigma_rel = 256, 0.0722  # sqrt(12) of it is a quarter
    length = sigma_rel * steps
    for step in range(1, steps + 1):
        for i, param in enumerate(net.parameters()):
            param += 0.05 * torch.randn(param.shape)
            sums["window"][i] += param * (step > steps * 3 // 4) / (steps / 4)
            sums["exponential"][i].lerp_(param, 1 - math.exp(-1 / length))
        ema.update(step * STEP)
        if step % 8 == 0:
            for width, profile in zip(TRACKED, ema.profiles, strict=True):
                facts = {"dataset": DATASET, "encoder": ENCODER, "parameters": profile}
                path = folder / snapshot_name(step * STEP, width)
                save_snapshot(path, net, nimg=step * STEP, sigma_rel=width, ema_kind="power", **facts)
    for shape, tracked in sums.items():
        result = run(folder, tmp_path, "--outstd", "0.0722", "--shape", shape)
        assert result.exit_code == 0, result.output
        path = tmp_path / snapshot_name(steps * STEP, sigma_rel, f"phema-{shape}")
        found, header = load_snapshot(path)
        assert header["shape"] == shape
        distance = (flat(found.parameters()) - flat(tracked)).norm()
        assert distance < 0.03 * (flat(net.parameters()) - flat(tracked)).norm(), shape
        assert distance < 0.02 * flat(tracked).norm()


def test_expectations_are_printed(training: tuple[Path, dict[float, list[torch.Tensor]]], tmp_path: Path) -> None:
    folder, _ = training
    result = run(folder, tmp_path / "out", "--outstd", "0.01,0.05,0.12", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    assert "32 stored averages, 32 in fp16: sigma_rel 0.05, 0.1, from 16Ki to 256Ki images" in result.output
    rows = [line.split() for line in result.output.splitlines() if line.lstrip()[:3] in ("0.0", "0.1")]
    assert [row[0] for row in rows] == ["0.010", "0.050", "0.120"]
    profile, total, noise = ([float(row[i]) for row in rows] for i in (1, 3, 4))
    assert profile[0] > 10 > 1 > profile[1] == 0
    assert total[1] == 1
    assert noise[1] == pytest.approx(100 * 2.07e-4, rel=0.05)
    assert "WARNING" not in result.output, "the profile of 0.01 is off, its weights are not"
    result = run(folder, tmp_path / "out", "--outstd", "0.01,0.05,0.12", "--dry-run", "--fit", "profile")
    assert "WARNING: the snapshots are too few for sigma_rel 0.01:" in result.output


def test_warnings_go_by_what_counts() -> None:
    """By the weights where they are known and were fitted, else by the profile; by rounding in any case."""

    def quality(profile: float, rounding: float, expected: float) -> Quality:
        return Quality(Target(0.2), profile, 1.5, rounding, expected, 0.19)

    def words(kind: str, *errors: float) -> list[str]:
        return [text.partition(" for ")[0] for text in warnings([quality(*errors)], kind)]

    few, coarse = "the snapshots are too few", "the snapshots are stored too coarsely"
    assert words("weights", 0.05, 0.001, 0.002) == []
    assert words("weights", 0.001, 0.001, 0.006) == [few]
    assert words("weights", 0.05, 0.001, math.nan) == words("profile", 0.05, 0.001, 0.002) == [few]
    assert words("profile", 0.01, 0.001, 0.006) == []
    assert words("weights", 0.001, 0.02, 0.0201) == [coarse]
    assert words("weights", 0.001, 0.02, 0.03) == [few, coarse]
    (text,) = warnings([quality(0.05, 0.001, 0.006)], "weights")
    assert "for sigma_rel 0.2: the weights are off by 0.6 % at 0.2 (the profile's width comes out as 0.190)" in text
    assert "the profile is off by 5 % at 0.2" in warnings([quality(0.05, 0.001, 0.006)], "profile")[0]


def test_published_coefficients_on_demand(
    training: tuple[Path, dict[float, list[torch.Tensor]]], tmp_path: Path
) -> None:
    folder, _ = training
    assert run(folder, tmp_path, "--outstd", "0.2", "--fit", "profile").exit_code == 0
    snapshots = [snapshot for snapshot in find_snapshots(folder) if snapshot.nimg > 0]
    coefs = solve_coefficients([s.nimg for s in snapshots], [s.sigma_rel for s in snapshots], snapshots[-1].nimg, 0.2)
    (path,) = tmp_path.iterdir()
    for name, value in load_file(path).items():
        stored = [load_file(snapshot.path)[name].double() for snapshot in snapshots]
        if not name.startswith("unet.emb_fourier"):
            expected = sum(float(c) * v for c, v in zip(coefs[:, 0], stored, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=2**-10, atol=2**-20)


def test_run_stores_more_bits(tmp_path: Path) -> None:
    """From the option of a run to a network: the same training, stored more finely."""
    options = make_options(
        "digits", model_channels=8, channel_mult=(1,), attn_resolutions=(), batch=1024, duration=4096, snapshot=1024,
        checkpoint=4096, status=4096,
    )  # fmt: skip
    nets = {}
    for storage in ("fp16", "fp16+8", "fp32"):
        folder = tmp_path / storage
        loop.train(replace(options, snapshot_storage=storage), data.open_dataset("digits"), folder)
        snapshots = find_snapshots(folder)
        assert len(snapshots) == 10
        work = Reconstructing(open_snapshots(snapshots), [0.08])
        (found,) = work.in_memory(dtype=torch.float32)
        nets[storage] = flat(found[name] for name in sorted(work.combination.offsets())).double()
        load_snapshot(snapshots[-1].path)
        sizes = [path.stat().st_size for path in folder.glob("network-snapshot-*")]
        assert len(sizes) == (20 if storage == "fp16+8" else 10)
    errors = {s: float((nets[s] - nets["fp32"]).norm() / nets["fp32"].norm()) for s in ("fp16", "fp16+8")}
    assert 1e-5 < errors["fp16"] < 1e-3
    assert errors["fp16+8"] < errors["fp16"] / 50
    with pytest.raises(UserError, match="snapshot_storage must be one of fp16, fp16\\+8, fp32, got 'int4'"):
        replace(options, snapshot_storage="int4").validate()


@pytest.mark.slow
def test_network_in_training_comes_out_as_tracked(tmp_path: Path) -> None:
    """64 times, two profiles, stored in float32, of a real training: relative L2 error over all parameters."""
    widths = (0.04, 0.06, 0.08, 0.12, 0.16, 0.20, 0.25)
    options = make_options(
        "digits", model_channels=8, channel_mult=(1,), attn_resolutions=(), batch=16, rampup=1024, decay=40,
        sigma_rels=TRACKED + widths,
    )  # fmt: skip
    digits = data.open_dataset("digits")
    trainer = Trainer(loop.build_network(options, digits.resolution, 1, 10), options, digits.encoder())
    batches = data.batches(digits, 16, data.IndexStream(digits.num_images, 0), torch.device("cpu"))
    files = []
    for step in range(64 * 6 + 1):
        if step > 0:
            trainer.step(batches)
        if step % 6 == 0:
            for sigma_rel, profile in zip(TRACKED, trainer.ema.profiles, strict=False):
                files.append(tmp_path / f"{trainer.nimg}-{sigma_rel}.safetensors")
                header = {"nimg": trainer.nimg, "sigma_rel": sigma_rel, "updates": step}
                save_average(files[-1], dict(zip(trainer.names, profile, strict=True)), header, "fp32")
    work = Reconstructing([open_average(path) for path in files], widths)
    qualities = work.quality(work.motion())
    for quality, result, tracked in zip(
        qualities, work.in_memory(dtype=torch.float32), trainer.ema.profiles[len(TRACKED) :], strict=True
    ):
        truth = flat(tracked).double()
        error = float((flat(result[name] for name in trainer.names).double() - truth).norm() / truth.norm())
        assert error <= 1e-4
        assert quality.expected_error / 2 <= error <= 2 * quality.expected_error


def test_pickles_of_any_layout(tmp_path: Path) -> None:
    """Tensors that are contiguous, transposed, or views into a storage."""
    flat_numbers = torch.arange(1000, dtype=torch.float16)
    path = tmp_path / "storage"
    path.write_bytes(b"1234" + flat_numbers.numpy().tobytes())
    storage = Storage(path, torch.float16, 4, 1000)
    for shape, stride, offset in (
        ((5, 4), (4, 1), 3),
        ((4, 5, 6), (30, 1, 5), 0),
        ((7, 1, 3), (3, 99, 1), 2),
        ((), (), 9),
    ):
        stored = StoredTensor(storage, offset, shape, stride)
        expected = flat_numbers.as_strided(shape, stride, offset)
        source = in_pickle(stored)
        with OpenFiles() as files:
            for first, count in ((0, expected.numel()), (1, expected.numel() - 1)):
                target = torch.empty(max(count, 0), dtype=torch.float16)
                if count > 0:
                    source.read(files, first, target)
                assert torch.equal(target, expected.flatten()[first : first + max(count, 0)])


def test_module_dispatches_to_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], "Choose the EMA length after training."),
        (["plan", "--help"], "Plan the snapshots of a run"),
        (["search", "--help"], "Find the EMA length that is best by a metric"),
    ):
        with pytest.raises(SystemExit) as done:
            dispatch(arguments)
        assert done.value.code == 0
        assert words in capsys.readouterr().out


def test_help_explains_every_option() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for param in main.params:
        assert param.hidden or param.opts[0] in result.output
        assert param.help
