"""The commands ref, calc and gen: files, several networks, guidance, several processes, and their errors."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import official_files as files
import pytest
import safetensors
import torch
from click.testing import CliRunner, Result
from feature_networks import sample_images
from torch import Tensor

from python_train.checkpoint import load_snapshot, save_snapshot, snapshot_name
from python_train.data import Digits, open_dataset, open_encoder
from python_train.data.latents import decode
from python_train.generate import generate_batch
from python_train.guidance import Guide
from python_train.metrics import ReferenceFeatures, feature_extractor, images, score
from python_train.metrics.__main__ import main
from python_train.metrics.kid import subset_kid
from python_train.metrics.moments import gaussian_of
from python_train.metrics.reference import Reference, read_reference, write_reference
from python_train.network import Precond
from python_train.pictures import save_png, to_pillow
from python_train.reconstruct import find_snapshots, reconstruct

CPU = ["--device", "cpu"]
DRAW = [*CPU, "--steps", "3", "--bootstrap", "3"]


def make_network(label_dim: int = 10, channels: int = 1, resolution: int = 8) -> Precond:
    """A random network whose every path is live."""
    net = Precond(
        img_resolution=resolution, img_channels=channels, label_dim=label_dim, use_fp16=False, model_channels=8,
        channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8, logvar_channels=8,
    )  # fmt: skip
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.7)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a few snapshots, a reference of the digits and a folder of some of them."""
    folder = tmp_path_factory.mktemp("metrics")
    torch.manual_seed(1)
    (folder / "run").mkdir()
    for nimg in (8192, 16384):
        for sigma_rel in (0.05, 0.10):
            path = folder / "run" / snapshot_name(nimg, sigma_rel)
            save(path, make_network(), nimg=nimg, sigma_rel=sigma_rel)
    assert run("ref", "digits", folder / "digits.ref", "--features", "pixels", *CPU).exit_code == 0
    (folder / "images").mkdir()
    for index, image in enumerate(open_dataset("digits").load_all()[0][:60]):
        save_png(folder / "images" / f"{index:03d}.png", to_pillow(image.numpy()))
    return folder


def save(path: Path, net: Precond, **facts: Any) -> Path:
    defaults = {
        "nimg": 1024,
        "sigma_rel": 0.05,
        "ema_kind": "power",
        "dataset": {},
        "encoder": Digits().encoder().facts(),
    }
    save_snapshot(path, net, **{**defaults, **facts})
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def values(results: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in results["metrics"].items()}


NAMES = ["FD-pixels", "KID-pixels", "precision-pixels", "recall-pixels", "density-pixels", "coverage-pixels"]


# ------------------------------------------------------------------------------------------------------------- commands


def test_reference_holds_all_images(work: Path) -> None:
    found = read_reference(work / "digits.ref")
    everything = feature_extractor("pixels")(open_dataset("digits").load_all()[0])
    features = found.features["pixels"]
    assert torch.equal(features.features, everything)
    torch.testing.assert_close(features.gaussian.sigma, gaussian_of(everything).sigma, rtol=1e-9, atol=1e-12)
    assert (features.gaussian.num, found.shape, found.name) == (1797, (1, 8, 8), "digits")


def test_calc_is_the_library_function(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = run(
        "calc", work / "images", "--ref", work / "digits.ref", "--out", out, "--bootstrap", 5, "--batch", 7, *CPU
    )
    assert result.exit_code == 0, result.output
    found = read(out)
    assert found["images"] == 60
    extract = feature_extractor("pixels")
    digits = open_dataset("digits").load_all()[0]
    expected = score(extract(digits[:60]), extract(digits))
    assert list(found["metrics"]) == NAMES
    assert list(values(found).values()) == pytest.approx(list(expected.values()), rel=1e-6)
    for name, metric in found["metrics"].items():
        assert f"{name}" in result.output
        low, high = metric["interval"]
        assert low <= metric["value"] <= high


def test_calc_takes_some_of_the_images(work: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        args = ["--num", 30, "--seed", seed, "--out", tmp_path / f"{seed}.json", "--bootstrap", 0]
        result = run("calc", work / "images", "--ref", work / "digits.ref", *args, *CPU)
        assert result.exit_code == 0, result.output
    first, second = read(tmp_path / "0.json"), read(tmp_path / "1.json")
    assert first["images"] == second["images"] == 30
    assert values(first) != values(second)
    assert first["metrics"]["FD-pixels"]["interval"] is None


def test_kid_of_subsets(work: Path, tmp_path: Path) -> None:
    args = ["calc", work / "images", "--ref", work / "digits.ref", "--bootstrap", 0, "--kid-subset"]
    assert run(*args, 30, "--out", tmp_path / "out.json", *CPU).exit_code == 0
    found = read(tmp_path / "out.json")["metrics"]["KID-pixels"]
    extract = feature_extractor("pixels")
    digits = extract(open_dataset("digits").load_all()[0])
    expected = subset_kid(digits[:60], digits, 30)
    assert found["value"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["std"] == pytest.approx(np.std(expected, ddof=1), rel=1e-6)
    result = run(*args, 61, *CPU)
    assert result.exit_code == 1
    assert "KID of subsets of 61 images: there are only 60 generated ones" in " ".join(result.output.split())


def test_what_cannot_be_measured_is_not_drawn(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.Drawing, "images", None)
    net = ["gen", "--net", work / "run" / snapshot_name(8192, 0.05), "--ref", work / "digits.ref", *DRAW]
    result = run(*net, "--seeds", "0-30", "--kid-subset", 40)
    assert "KID of subsets of 40 images: there are only 31 generated ones" in " ".join(result.output.split())
    result = run(*net, "--seeds", "0-4")
    assert "5 generated images are too few" in " ".join(result.output.split())
    for keep, words in ((3, "the features of 3 images are too few for any metric: keep 6 or more"), (0, "")):
        result = run("ref", "digits", tmp_path / "few.ref", "--features", "pixels", "--keep", keep, *CPU)
        assert result.exit_code == bool(words)
        assert words in " ".join(result.output.split())
    assert read_reference(tmp_path / "few.ref").features["pixels"].features is None
    calc = ["calc", work / "images", "--ref", tmp_path / "few.ref", *CPU]
    result = run(*calc, "--out", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert list(values(read(tmp_path / "out.json"))) == ["FD-pixels"]
    result = run(*calc, "--kid-subset", 10)
    assert "mean and covariance only, of which there is no KID" in " ".join(result.output.split())


def test_gen_measures_what_generate_draws(work: Path, tmp_path: Path) -> None:
    """An EMA sweep of a run with a guide from an earlier time of it, against networks made by hand."""
    args = ["--net", work / "run", "--sigma-rel", "0.05,0.08", "--gnet", work / "run", "--gnet-sigma-rel", 0.10]
    args += ["--gnet-kimg", 8, "--guidance", 1.5, "--guidance-interval", "1-1", "--solver", "euler", "--seeds", "0-11"]
    result = run("gen", *args, "--ref", work / "digits.ref", "--out", tmp_path / "out.json", *DRAW)
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "out.json")
    snapshots = find_snapshots(work / "run")
    (guide,) = reconstruct(snapshots, [0.10], 8192)
    extract = feature_extractor("pixels")
    target = read_reference(work / "digits.ref").features["pixels"]
    for row, candidate in zip(found, reconstruct(snapshots, [0.05, 0.08]), strict=True):
        encoder = open_encoder(candidate.encoder)
        guides = [Guide(guide.net, 1.5, range(1, 2))]
        drawn = generate_batch(candidate.net, encoder, range(12), guides=guides, solver="euler", num_steps=3)
        expected = score(extract(drawn), target)
        assert list(values(row).values()) == pytest.approx(list(expected.values()), rel=1e-3)
        assert row["of"]["sigma_rel"] == candidate.sigma_rel
        assert row["of"]["nimg"] == 16384
        assert row["of"]["guides"][0]["nimg"] == 8192
    assert values(found[0]) != values(found[1])
    assert result.output.count("12 images of") == 2


def test_each_guide_keeps_its_own_length(work: Path, tmp_path: Path) -> None:
    """Also if guides are alike but for it, or one of them has the weight 1."""
    folder = str(work / "run")
    base = ["--net", folder, "--sigma-rel", "0.05", "--seeds", "0-7", "--ref", work / "digits.ref", *DRAW]
    lengths = ["--gnet-sigma-rel", 0.06, "--gnet-sigma-rel", 0.14]

    def gen(name: str, *guides: object) -> dict[str, Any]:
        result = run("gen", *base, *guides, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        return read(tmp_path / name)[0]

    two = gen("two", *["--gnet", folder, "--guidance", 2] * 2, *lengths)
    assert [guide["sigma_rel"] for guide in two["of"]["guides"]] == [0.06, 0.14]
    second = gen("second", *["--gnet", folder] * 2, "--guidance", 1, "--guidance", 2, *lengths)
    assert [guide["sigma_rel"] for guide in second["of"]["guides"]] == [0.14]
    alone = gen("alone", "--gnet", folder, "--guidance", 2, "--gnet-sigma-rel", 0.14)
    assert values(second) == values(alone)
    none = gen("none", "--gnet", folder, "--guidance", 1, "--gnet-sigma-rel", 0.14)
    assert none["of"]["guides"] == []
    assert values(none) == values(gen("unguided"))


def test_gen_warns_of_lengths_that_the_snapshots_do_not_support(work: Path) -> None:
    args = ["gen", "--net", work / "run", "--gnet", work / "run", "--guidance", 2, "--seeds", "0-7"]
    for width, guide, warned in ((0.05, 0.10, 0), (0.02, 0.10, 1), (0.05, 0.25, 1), (0.02, 0.25, 1)):
        result = run(*args, "--sigma-rel", width, "--gnet-sigma-rel", guide, "--ref", work / "digits.ref", *DRAW)
        assert result.exit_code == 0, result.output
        assert result.output.count(f"WARNING: {work / 'run'}: the snapshots are too few for sigma_rel") == warned
    assert "for sigma_rel 0.02, 0.25:" in " ".join(result.output.split())


def test_gen_of_files(work: Path, tmp_path: Path) -> None:
    nets = [save(tmp_path / f"{name}.safetensors", make_network()) for name in "ab"]
    guide = save(tmp_path / "guide.safetensors", make_network(label_dim=0))
    args = ["--net", nets[0], "--net", nets[1], "--gnet", guide, "--guidance", 2, "--class", 3, "--seeds", "0-8"]
    result = run("gen", *args, "--ref", work / "digits.ref", "--out", tmp_path / "out.json", *DRAW)
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "out.json")
    assert [row["of"]["file"] for row in found] == [str(path) for path in nets]
    assert found[0]["of"]["class"] == 3
    assert values(found[0]) != values(found[1])


@pytest.mark.slow
def test_processes_share_the_work(work: Path, tmp_path: Path) -> None:
    """Two gloo processes against one, to the last bit."""
    args = ["gen", "--net", work / "run", "--sigma-rel", "0.05", "--seeds", "0-30", "--ref", work / "digits.ref"]
    args = [str(arg) for arg in [*args, "--batch", 4, *DRAW]]
    assert run(*args, "--out", tmp_path / "one.json").exit_code == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "python_train.metrics", *args, "--out", str(tmp_path / "two.json")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("31 images of") == 1
    assert read(tmp_path / "two.json") == read(tmp_path / "one.json")


def test_latents_are_decoded(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Decoded:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    class VAE(torch.nn.Module):
        def decode(self, z: Tensor) -> Decoded:
            assert len(z) <= 4
            return Decoded(torch.nn.functional.interpolate(z[:, :3], scale_factor=2) / 10)

    encoder = {"kind": "latent", "mean": [1.0, 2.0, 3.0, 4.0], "std": [0.5, 0.5, 1.0, 1.0]}
    net = save(tmp_path / "latent.safetensors", make_network(channels=4), encoder=encoder)
    monkeypatch.setattr(images, "open_vae", lambda name: VAE())
    pixels = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    reference = Reference({"pixels": ReferenceFeatures.of(feature_extractor("pixels")(pixels))}, {}, (3, 16, 16))
    write_reference(tmp_path / "ref", reference)
    args = ["--net", net, "--seeds", "0-9", "--ref", tmp_path / "ref", "--out", tmp_path / "out.json"]
    result = run("gen", *args, *DRAW)
    assert result.exit_code == 0, result.output
    latents = generate_batch(load_snapshot(net)[0], open_encoder(encoder), range(10), num_steps=3)
    expected = score(feature_extractor("pixels")(decode(VAE(), latents)), reference.features["pixels"])
    assert list(values(read(tmp_path / "out.json")[0]).values()) == pytest.approx(list(expected.values()), rel=1e-3)


def test_decoding_truncates() -> None:
    class VAE:
        def decode(self, z: Tensor) -> Any:
            return type("Decoded", (), {"sample": z})

    z = torch.tensor([-0.5, 0, 0.5, 254.9 / 255, 1, 2]).reshape(1, 1, 1, 6)
    assert decode(VAE(), z).flatten().tolist() == [0, 0, 127, 254, 255, 255]


# ------------------------------------------------------------------------------------------------ published references


@pytest.fixture(scope="module")
def statistics() -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    rows = random.randn(300, 2048)
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


@pytest.mark.parametrize("layout", ["current", "NumPy 1"])
def test_published_pickles_are_read(layout: str, statistics: dict[str, np.ndarray], tmp_path: Path) -> None:
    small = {"mu": statistics["mu"][:16], "sigma": statistics["sigma"][:16, :16]}
    arrays = {
        name: files.numpy_array(np.ascontiguousarray(value), files.LAYOUTS[layout]) for name, value in small.items()
    }
    content = {"num_images": 1281167, "fid": arrays, "fd_dinov2": arrays}
    path = files.write(tmp_path / "img512.pkl", files.dumps(content, files.LAYOUTS[layout]))
    found = read_reference(path)
    assert list(found.features) == ["inception", "dinov2"]
    for features in found.features.values():
        assert features.gaussian.num == 1281167
        assert features.features is None
        np.testing.assert_array_equal(features.gaussian.mu, small["mu"])
        np.testing.assert_allclose(features.gaussian.sigma, small["sigma"], rtol=1e-15)


def test_pickles_as_numpy_writes_them_and_npz(statistics: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"num_images": 9, "fid": statistics}, protocol=4))
    np.savez(tmp_path / "ref.npz", **statistics)
    for name in ("ref.pkl", "ref.npz"):
        found = read_reference(tmp_path / name)
        assert list(found.features) == ["inception"]
        np.testing.assert_array_equal(found.features["inception"].gaussian.mu, statistics["mu"])


# --------------------------------------------------------------------------------------------------------------- errors


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_damaged_references_are_refused(work: Path, tmp_path: Path) -> None:
    whole = (work / "digits.ref").read_bytes()
    sigma, mu = np.eye(3), np.zeros(3)
    lopsided, infinite = sigma + np.tri(3, k=-1), np.full([3, 3], np.inf)
    with safetensors.safe_open(work / "digits.ref", "pt") as file:
        header = json.loads(file.metadata()["edm2_reference"])
    newer = whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9')
    assert header["format_version"] == 1
    assert newer != whole
    cases: list[tuple[str, bytes, str]] = [
        ("a.ref", whole[:-100], "a.ref is damaged"),
        ("b.ref", b"", "b.ref is damaged"),
        ("c.ref", newer, "has version 9; this program reads 1"),
        ("d.pkl", pickle.dumps(Malicious(tmp_path / "executed")), "d.pkl is refused"),
        ("e.pkl", pickle.dumps({"num_images": 3}), "it has neither of fid, fd_dinov2"),
        ("f.pkl", pickle.dumps({"fid": {"mu": mu}}), "it lacks mu or sigma"),
        ("g.pkl", pickle.dumps({"fid": {"mu": mu, "sigma": np.eye(4)}}), "expected mu [D] and sigma [D,D]"),
        ("h.pkl", pickle.dumps({"fid": {"mu": mu, "sigma": infinite}}), "mu or sigma is not finite"),
        ("i.pkl", pickle.dumps({"fid": {"mu": mu, "sigma": lopsided}}), "sigma is not symmetric"),
        ("j.npz", b"PK\3\4", "j.npz is damaged"),
    ]
    np.savez(tmp_path / "k.npz", mu=mu)
    cases.append(("k.npz", (tmp_path / "k.npz").read_bytes(), "k.npz is damaged, or not a reference file with mu"))
    for name, content, words in cases:
        (tmp_path / name).write_bytes(content)
        result = run("calc", work / "images", "--ref", tmp_path / name, *CPU)
        assert result.exit_code == 1, name
        assert words in " ".join(result.output.split()), result.output
    assert not (tmp_path / "executed").exists()


def test_errors_come_before_work_and_write_nothing(work: Path, tmp_path: Path) -> None:
    ref = ["--ref", work / "digits.ref"]
    calc, gen = ["calc", work / "images", *ref], ["gen", *ref, "--seeds", "0-3"]
    net = ["--net", work / "run", "--sigma-rel", "0.05"]
    file = ["--net", work / "run" / snapshot_name(8192, 0.05)]
    larger = save(tmp_path / "larger.safetensors", make_network(resolution=16))
    for index, image in enumerate(sample_images(3)):
        save_png(tmp_path / f"{index}.png", to_pillow(image.numpy()))
    inception = {"inception": ReferenceFeatures.of(torch.randn(9, 2048))}
    write_reference(tmp_path / "fid.ref", Reference(inception, {}, (1, 8, 8)))
    other = {"pixels": ReferenceFeatures.of(torch.randn(9, 64))}
    write_reference(tmp_path / "other.ref", Reference(other, {"pixels": "something else"}, (1, 8, 8)))
    (tmp_path / "taken.json").write_text("precious")
    before = sorted(tmp_path.iterdir())
    for args, words in [
        (["calc", tmp_path / "missing", *ref], "no such data set"),
        (["calc", tmp_path, *ref], "images are 40x48, those of"),
        (["calc", work / "images", "--ref", tmp_path / "no.ref"], "no such reference file"),
        ([*calc, "--features", "efflite0"], "has no features efflite0; it has pixels"),
        ([*calc, "--num", 61], "holds 60 images, fewer than --num 61"),
        ([*calc, "--out", tmp_path / "taken.json"], "taken.json exists already; name another file, or --overwrite"),
        ([*calc, "--out", tmp_path / "no/out.json"], "the folder of"),
        ([*calc, "--device", "toaster"], "device 'toaster' cannot be used"),
        (["calc", work / "images", "--ref", tmp_path / "fid.ref"], "inception need --inception FILE or URL"),
        (["calc", work / "images", "--ref", tmp_path / "other.ref"], "made by a network with other weights"),
        (["ref", "digits", work / "digits.ref"], "digits.ref exists already"),
        (["ref", "digits", "/proc/x.ref"], "cannot write /proc/x.ref"),
        ([*calc, "--out", "/proc/x.json"], "cannot write /proc/x.json"),
        (["ref", "digits", tmp_path / "x.ref", "--dinov2", tmp_path / "no.pth"], "no such file of weights"),
        (gen, "name a network: --net or --preset"),
        ([*gen, "--net", work / "run"], "name the EMA length sigma_rel"),
        ([*gen, "--net", tmp_path, "--sigma-rel", "0.05"], "holds no network-snapshot-"),
        ([*gen, *net, "--kimg", 9], "no snapshot was taken at 9000 images"),
        ([*gen, *file, "--sigma-rel", "0.05"], "is one network; an EMA length and a time are for a run's folder"),
        ([*gen, *file, "--gnet", larger, "--guidance", 2], "the guide makes images of another shape"),
        ([*gen, *file, "--guidance", 2], "--guidance needs a guiding network"),
        ([*gen, *file, "--gnet-kimg", 8], "for each --gnet that is a folder: got 1"),
        ([*gen, *file, "--class", 10], "class 10 does not exist"),
        ([*gen, *file, "--seeds", "x"], "expected numbers and ranges"),
        ([*gen, *file, "--sigma-min", 100], "0 < sigma_min < sigma_max"),
        ([*gen, "--net", larger], "the images are 16x16, those of"),
        ([*gen, *file, "--seeds", "0"], "at least 2 images, got 1"),
        ([*gen, *file, "--seeds", "0-2"], "3 generated images are too few"),
    ]:
        result = run(*args) if "--device" in args else run(*args, *CPU)
        assert result.exit_code == 1, args
        assert words in " ".join(result.output.split()), result.output
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken.json").read_text() == "precious"


def test_overwriting_when_told(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("old")
    result = run(
        "calc", work / "images", "--ref", work / "digits.ref", "--out", out, "--overwrite", "--bootstrap", 0, *CPU
    )
    assert result.exit_code == 0, result.output
    assert read(out)["images"] == 60


@pytest.mark.parametrize("command", ["ref", "calc", "gen"])
def test_help_explains_every_option(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for param in main.commands[command].params:
        assert param.opts[0].lower() in result.output.lower()
        assert isinstance(param, click.Argument) or param.help
    assert "FD-EffLite0, KID-EffLite0" in result.output
