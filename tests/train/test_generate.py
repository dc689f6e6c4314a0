"""Drawing images from a snapshot: the command, its files and its errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edm2ext.nn import Layer
from python_train import UserError, generate, image_job
from python_train.checkpoint import load_snapshot, save_snapshot
from python_train.data import open_encoder
from python_train.data.latents import decode as decode_latents
from python_train.generate import generate_batch, main, parse_seeds, seed_batches
from python_train.guidance import Guide
from python_train.image_job import is_whole, save_image
from python_train.network import Precond
from python_train.sample import SOLVERS

PIXELS = {"kind": "pixel"}


def make_network(resolution: int = 8, channels: int = 3, label_dim: int = 4) -> Precond:
    """A random network whose every path is live."""
    net = Precond(
        img_resolution=resolution, img_channels=channels, label_dim=label_dim, use_fp16=False, model_channels=8,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], channels_per_head=8, logvar_channels=8,
    )  # fmt: skip
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.7)
    return net.eval().requires_grad_(False)


def save(path: Path, net: Precond, encoder: dict = PIXELS) -> Path:
    save_snapshot(path, net, nimg=1024, sigma_rel=0.05, ema_kind="power", dataset={}, encoder=encoder)
    return path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save(tmp_path_factory.mktemp("nets") / "network-snapshot-0000001-0.050.safetensors", make_network())


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["--device", "cpu", "--steps", "3", *(str(arg) for arg in args)])


def read(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_one_image_per_seed_whatever_the_batch(snapshot: Path, tmp_path: Path, backend: str) -> None:
    assert run("--net", snapshot, "--outdir", tmp_path / "a", "--seeds", "0-6,100").exit_code == 0
    assert run("--net", snapshot, "--outdir", tmp_path / "b", "--seeds", "100,0-6", "--batch", 3).exit_code == 0
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert list(a) == [f"{seed:06d}.png" for seed in (*range(7), 100)] == list(b)
    assert all(image.shape == (8, 8, 3) and image.dtype == np.uint8 for image in a.values())
    assert all(np.abs(a[name].astype(int) - b[name]).max() <= 1 for name in a)  # truncation of equal values
    assert len({image.tobytes() for image in a.values()}) == 8
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".png", ".json"}, "temporary files are left"


def test_the_class_is_chosen_without_changing_the_noise() -> None:
    net, encoder = make_network(), open_encoder(PIXELS)
    drawn = generate_batch(net, encoder, range(6), num_steps=3)
    classes = [int(torch.randint(4, (), generator=_after_noise(seed))) for seed in range(6)]
    assert len(set(classes)) > 1
    assert torch.equal(drawn, generate_batch(net, encoder, range(6), classes, num_steps=3))
    fixed = generate_batch(net, encoder, range(6), 2, num_steps=3)
    same = [index for index, idx in enumerate(classes) if idx == 2]
    assert all(torch.equal(drawn[index], fixed[index]) == (index in same) for index in range(6))


def _after_noise(seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.randn(3, 8, 8, generator=generator)
    return generator


def test_churn_noise_belongs_to_the_seed() -> None:
    net, encoder = make_network(), open_encoder(PIXELS)
    together = generate_batch(net, encoder, [5, 6], num_steps=4, S_churn=2)
    alone = generate_batch(net, encoder, [6], num_steps=4, S_churn=2)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(alone, generate_batch(net, encoder, [6], num_steps=4))


def test_class_option_and_subfolders(snapshot: Path, tmp_path: Path) -> None:
    result = run("--net", snapshot, "--outdir", tmp_path, "--seeds", "999-1000", "--class", 1, "--subdirs")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "000000/000999.png").is_file()
    assert (tmp_path / "001000/001000.png").is_file()
    assert f"2 images in {tmp_path}" in result.output


def test_guidance_uses_the_guide_and_weight_one_does_not_load_it(snapshot: Path, tmp_path: Path) -> None:
    guide = save(tmp_path / "guide.safetensors", make_network(label_dim=0))
    runs = {
        "plain": [],
        "guided": ["--gnet", guide, "--guidance", 2],
        "unloaded": ["--gnet", tmp_path / "missing.safetensors", "--guidance", 1],
    }
    for name, args in runs.items():
        result = run("--net", snapshot, "--outdir", tmp_path / name, "--seeds", "0-1", *args)
        assert result.exit_code == 0, result.output
    plain, guided, unloaded = (read(tmp_path / name) for name in runs)
    assert all(np.array_equal(plain[name], unloaded[name]) for name in plain)
    assert not any(np.array_equal(plain[name], guided[name]) for name in plain)


def test_processes_share_the_seeds(snapshot: Path, tmp_path: Path) -> None:
    """Two gloo processes fill in what is missing of what one would draw, then one draws the grid."""
    args = ["--net", snapshot, "--batch", 2, "--S-churn", 1]
    assert run(*args, "--seeds", "0-9", "--outdir", tmp_path / "one").exit_code == 0
    assert run(*args, "--seeds", "1,8", "--outdir", tmp_path / "two").exit_code == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args += ["--seeds", "0-9", "--outdir", tmp_path / "two", "--grid", tmp_path / "grid.png"]
    command = [*launch, "-m", "python_train.generate", "--device", "cpu", "--steps", "3", *(str(arg) for arg in args)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("10 images in") == 1
    shared, one = read(tmp_path / "two"), read(tmp_path / "one")
    assert shared.keys() == one.keys()
    # Equal but for the last bits of sums, which matter where a value is truncated.
    assert all(np.abs(shared[name].astype(int) - one[name]).max() <= 1 for name in one)
    assert np.mean([np.mean(shared[name] == one[name]) for name in one]) > 0.99
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 4 * 64


def test_drawing_again_draws_only_what_is_missing(snapshot: Path, tmp_path: Path) -> None:
    args = ["--net", snapshot, "--outdir", tmp_path, "--seeds"]
    assert run(*args, "0-4").exit_code == 0
    before = {name: (tmp_path / name).read_bytes() for name in read(tmp_path)}
    damaged, missing = tmp_path / "000001.png", tmp_path / "000003.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    missing.unlink()
    (tmp_path / ".000003.png.123.tmp").touch()  # of a killed process
    (tmp_path / ".000099.png.123.tmp").touch()  # of a process that draws other seeds
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in before if name not in (damaged.name, missing.name)}
    assert run(*args, "0-6").exit_code == 0
    assert list(read(tmp_path)) == [f"{seed:06d}.png" for seed in range(7)]
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in times.items())
    assert all(np.abs(decode(before[name]) - decode((tmp_path / name).read_bytes())).max() <= 1 for name in before)
    assert [path.name for path in tmp_path.glob(".*")] == [".000099.png.123.tmp"]


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_nothing_to_draw_loads_no_network(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--net", snapshot, "--outdir", tmp_path, "--seeds", "0-2"]
    assert run(*args).exit_code == 0
    monkeypatch.setattr(image_job, "load_snapshot", None)
    assert run(*args).exit_code == 0


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 16, 16)])
def test_every_truncated_or_changed_file_is_noticed(shape: tuple[int, int, int], tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "000000.png"
    save_image(path, image)
    assert is_whole(path, shape)
    assert not is_whole(path, (shape[0], 8, 9))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not is_whole(path, shape), length
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert not is_whole(path, shape), index


def test_other_options_are_refused_with_the_differences(snapshot: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.safetensors", make_network())
    out = tmp_path / "out"
    assert run("--net", snapshot, "--outdir", out, "--seeds", "0-1").exit_code == 0
    before = read(out)
    for args, words in [
        (["--net", snapshot, "--solver", "euler"], "solver: heun -> euler"),
        (["--net", snapshot, "--class", 2], "class: None -> 2"),
        (["--net", snapshot, "--gnet", other, "--guidance", 2], "guides: [] -> [{'file': 'other.safetensors'"),
        (["--net", other], "net: {'file': 'network-snapshot-0000001-0.050.safetensors'"),
    ]:
        result = run(*args, "--outdir", out, "--seeds", "0-3")
        assert result.exit_code == 1
        assert words in " ".join(result.output.split()), result.output
        assert "choose another --outdir, or --overwrite" in " ".join(result.output.split())
    assert all(np.array_equal(before[name], image) for name, image in read(out).items())
    result = run("--net", other, "--outdir", out, "--seeds", "0-1", "--overwrite")
    assert result.exit_code == 0
    assert not any(np.array_equal(before[name], image) for name, image in read(out).items())
    assert json.loads((out / "options.json").read_text())["net"]["file"] == "other.safetensors"
    (out / "options.json").write_text("{")
    result = run("--net", other, "--outdir", out, "--seeds", "0-1")
    assert result.exit_code == 1
    assert "options.json is damaged" in " ".join(result.output.split())


def test_overwriting_leaves_no_images_of_other_options(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interruption leaves of a folder that was being overwritten is not taken for what the options say now."""
    other = save(tmp_path / "other.safetensors", make_network())
    out = tmp_path / "out"
    assert run("--net", snapshot, "--outdir", out, "--seeds", "0-4").exit_code == 0
    before = read(out)
    result = run("--net", other, "--outdir", out, "--seeds", "0-2", "--overwrite")
    assert result.exit_code == 1
    assert f"{out} holds 2 more images, such as {out / '000003.png'}, that" in " ".join(result.output.split())
    assert all(np.array_equal(before[name], image) for name, image in read(out).items())
    assert json.loads((out / "options.json").read_text())["net"]["file"] == snapshot.name

    class Killed(BaseException):
        pass

    def killed(path: Path, image: np.ndarray) -> None:
        if path.name == "000002.png":
            raise Killed
        save_image(path, image)

    monkeypatch.setattr(generate, "save_image", killed)
    with pytest.raises(Killed):
        CliRunner().invoke(main, ["--net", str(other), "--outdir", str(out), "--seeds", "0-4", "--steps", "3",
                                  "--device", "cpu", "--overwrite"], catch_exceptions=False)  # fmt: skip
    monkeypatch.undo()
    assert run("--net", other, "--outdir", out, "--seeds", "0-4").exit_code == 0
    assert run("--net", other, "--outdir", tmp_path / "anew", "--seeds", "0-4").exit_code == 0
    anew = read(tmp_path / "anew")
    assert all(np.abs(image.astype(int) - anew[name]).max() <= 1 for name, image in read(out).items())
    assert run("--net", other, "--outdir", out, "--seeds", "0-1", "--overwrite").exit_code == 0, "the same options"


def test_a_grid_may_lie_among_the_images(snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = run("--net", snapshot, "--outdir", out, "--seeds", "0-2", "--grid", out / "grid.png")
    assert result.exit_code == 0, result.output
    assert (out / "grid.png").is_file()


def test_several_networks_and_a_grid(snapshot: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.safetensors", make_network())
    grid = tmp_path / "grid.png"
    args = ["--net", snapshot, "--net", other, "--outdir", tmp_path / "both", "--seeds", "0-4", "--grid", grid]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "10 images in" in result.output
    names = ["network-snapshot-0000001-0.050", "other"]
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == names
    assert run("--net", other, "--outdir", tmp_path / "one", "--seeds", "0-4").exit_code == 0
    alone, together = read(tmp_path / "one"), read(tmp_path / "both/other")
    assert all(np.array_equal(alone[name], together[name]) for name in alone)
    with Image.open(grid) as picture:
        assert picture.width > 5 * 64
        assert picture.height < 3 * 70 + 64
    result = run(*args)
    assert result.exit_code == 1
    assert f"the grid {grid} exists already" in " ".join(result.output.split())
    clash = tmp_path / "folder" / other.name
    clash.parent.mkdir()
    save(clash, make_network())
    result = run("--net", other, "--net", clash, "--outdir", tmp_path / "clash", "--seeds", "0")
    assert result.exit_code == 1
    assert "two networks are called other" in result.output


def test_guidance_options_reach_the_sampler(snapshot: Path, tmp_path: Path) -> None:
    """Images of the command against those of the function with guides made by hand."""
    bad, uncond = make_network(), make_network(label_dim=0)
    paths = [save(tmp_path / "uncond.safetensors", uncond), save(tmp_path / "bad.safetensors", bad)]
    net, uncond, bad = (load_snapshot(path)[0] for path in (snapshot, *paths))
    options = ["--gnet", paths[0], "--gnet", paths[1]]
    cases = {
        "two": ([*options, "--guidance", 2, "--guidance", 1.5], [Guide(uncond, 2), Guide(bad, 1.5)]),
        "blend": ([*options, "--guidance", 3, "--guidance-blend", 0.25], [Guide(uncond, 2.5), Guide(bad, 1.5)]),
        "steps": ([*options[:2], "--guidance", 3, "--guidance-interval", "1-1"], [Guide(uncond, 3, range(1, 2))]),
        "levels": ([*options[:2], "--guidance", 3, "--guidance-interval", "0.002,8"], [Guide(uncond, [1, 3, 1])]),
        "schedule": ([*options[2:], "--guidance", "1,1.5,3"], [Guide(bad, [1, 1.5, 3])]),
    }
    drawn = {}
    for name, (args, guides) in cases.items():
        result = run("--net", snapshot, "--outdir", tmp_path / name, "--seeds", "0-3", *args)
        assert result.exit_code == 0, result.output
        expected = generate_batch(net, open_encoder(PIXELS), range(4), guides=guides, num_steps=3)
        drawn[name] = np.stack([image.transpose(2, 0, 1) for image in read(tmp_path / name).values()])
        assert np.array_equal(drawn[name], expected.numpy()), name
    assert len({image.tobytes() for image in drawn.values()}) == 4  # "steps" and "levels" mean the same
    described = json.loads((tmp_path / "steps/options.json").read_text())
    assert described["guides"][0]["interval"] == {"first_step": 1, "last_step": 1}
    assert described["solver"] == "heun"


def test_baked_weights_give_identical_images(backend: str) -> None:
    net, guide, encoder = make_network(), make_network(label_dim=0), open_encoder(PIXELS)
    plain = generate_batch(net, encoder, range(4), guides=[Guide(guide, 1.5)], num_steps=3)
    with net.baked(), guide.baked():
        assert all(layer.prepared.effective is not None for layer in net.modules() if isinstance(layer, Layer))
        baked = generate_batch(net, encoder, range(4), guides=[Guide(guide, 1.5)], num_steps=3)
    assert torch.equal(plain, baked)
    assert all(layer.prepared is None for layer in net.modules() if isinstance(layer, Layer))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_draws(solver: str, snapshot: Path, tmp_path: Path) -> None:
    args = ["--net", snapshot, "--seeds", "0-2", "--solver", solver, "--dtype", "float64"]
    assert run(*args, "--outdir", tmp_path / "a").exit_code == 0
    assert run(*args, "--outdir", tmp_path / "b", "--batch", 1).exit_code == 0
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert all(np.abs(a[name].astype(int) - b[name]).max() <= 1 for name in a)


@given(seeds=st.lists(st.integers(0, 9999), max_size=60, unique=True), batch=st.integers(1, 9), world=st.integers(1, 5))
def test_seed_batches_partition_the_seeds(seeds: list[int], batch: int, world: int) -> None:
    shares = [seed_batches(seeds, batch, rank, world) for rank in range(world)]
    chunks = [chunk for share in shares for chunk in share]
    assert sorted(seed for chunk in chunks for seed in chunk) == sorted(seeds)
    assert all(0 < len(chunk) <= batch for chunk in chunks)
    if chunks:
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


def test_parse_seeds() -> None:
    assert parse_seeds("3,0-2, 7 ,2") == [3, 0, 1, 2, 7]
    for text in ("", "a", "1-", "-1", "1,,2", "1-2-3", "0x1"):
        with pytest.raises(UserError, match="expected numbers and ranges"):
            parse_seeds(text)
    with pytest.raises(UserError, match="'5-3' is empty"):
        parse_seeds("5-3")
    assert parse_seeds("4294967295") == [2**32 - 1]
    for text, words in (("4294967296", "the largest is 4294967295"), ("9" * 30, "the largest"), ("0-10000000", "most")):
        with pytest.raises(UserError, match=words):
            parse_seeds(text)


def test_existing_images_are_kept_unless_told(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "000001.png").write_bytes(b"precious")
    result = run("--net", snapshot, "--outdir", tmp_path, "--seeds", "0-2")
    assert result.exit_code == 1
    assert "1 of the images exist already" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]
    assert (tmp_path / "000001.png").read_bytes() == b"precious"
    assert run("--net", snapshot, "--outdir", tmp_path, "--seeds", "0-2", "--overwrite").exit_code == 0
    assert len(read(tmp_path)) == 3


def test_latents_are_written_as_arrays(tmp_path: Path) -> None:
    encoder = {"kind": "latent", "mean": [1.0, 2.0, 3.0, 4.0], "std": [0.5, 0.5, 1.0, 1.0]}
    net = save(tmp_path / "latent.safetensors", make_network(channels=4, label_dim=0), encoder)
    assert run("--net", net, "--outdir", tmp_path / "out", "--seeds", "0", "--latents").exit_code == 0
    latent = np.load(tmp_path / "out/000000.npy")
    assert latent.shape == (4, 8, 8)
    assert latent.dtype == np.float32


def test_images_of_many_channels_are_written_as_arrays(tmp_path: Path) -> None:
    net = save(tmp_path / "five.safetensors", make_network(channels=5))
    arguments = ("--net", net, "--outdir", tmp_path / "out", "--seeds", "0-2")
    result = run(*arguments, "--grid", tmp_path / "grid.png")
    assert result.exit_code == 1
    assert f"a grid shows images of 1 to 4 channels, and {net} makes 5: leave --grid out" in result.output
    assert os.listdir(tmp_path) == ["five.safetensors"]
    assert run(*arguments).exit_code == 0
    paths = [tmp_path / f"out/00000{seed}.npy" for seed in range(3)]
    before = [np.load(path) for path in paths]
    assert {(image.shape, image.dtype) for image in before} == {((5, 8, 8), np.dtype(np.uint8))}
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    assert run(*arguments).exit_code == 0
    assert all(np.array_equal(np.load(path), image) for path, image in zip(paths, before, strict=True))


def test_latents_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class VAE(torch.nn.Module):
        def decode(self, z: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=2) / 10)

    opened: list[str] = []
    monkeypatch.setattr(image_job, "open_vae", lambda name: opened.append(name) or VAE())
    encoder = {"kind": "latent", "mean": [1.0, 2.0, 3.0, 4.0], "std": [0.5, 0.5, 1.0, 1.0]}
    net = save(tmp_path / "latent.safetensors", make_network(channels=4, label_dim=0), encoder)
    args = ["--net", net, "--outdir", tmp_path / "out", "--seeds", "0-4", "--vae", "of/mine"]
    result = run(*args, "--grid", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    latents = generate_batch(load_snapshot(net)[0], open_encoder(encoder), range(5), num_steps=3)
    expected = decode_latents(VAE(), latents).permute(0, 2, 3, 1).numpy()
    for image, want in zip(read(tmp_path / "out").values(), expected, strict=True):
        assert np.abs(image.astype(int) - want).max() <= 1
    assert opened == ["of/mine"]
    (tmp_path / "out/000003.png").write_bytes(b"cut off")
    assert run(*args).exit_code == 0
    assert run(*args).exit_code == 0
    assert opened == ["of/mine"] * 2, "the VAE was opened for nothing"
    assert len(read(tmp_path / "out")) == 5
    result = run("--net", net, "--outdir", tmp_path / "out", "--seeds", "0-4", "--vae", "another")
    assert "vae: of/mine -> another" in " ".join(result.output.split())
    result = run("--net", net, "--outdir", tmp_path / "b", "--seeds", "0", "--latents", "--grid", tmp_path / "b.png")
    assert "leave --latents out" in result.output
    monkeypatch.undo()
    result = run("--net", net, "--outdir", tmp_path / "b", "--seeds", "0", "--vae", str(tmp_path / "nowhere"))
    assert "--latents keeps the latents as they are" in " ".join(result.output.split())
    assert not (tmp_path / "b").exists()


def test_errors_name_what_is_wrong(snapshot: Path, tmp_path: Path) -> None:
    unconditional = save(tmp_path / "uncond.safetensors", make_network(label_dim=0))
    larger = save(tmp_path / "larger.safetensors", make_network(resolution=16))
    latent = save(tmp_path / "latent.safetensors", make_network(), {"kind": "latent"})
    other_classes = save(tmp_path / "classes.safetensors", make_network(label_dim=7))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(snapshot.read_bytes()[:-100])
    (tmp_path / "file").write_text("")
    net = ["--net", snapshot, "--seeds", "0"]
    cases = [
        (["--net", tmp_path / "no.safetensors", "--seeds", "0"], "no such snapshot"),
        (["--net", truncated, "--seeds", "0"], "truncated.safetensors is damaged"),
        ([*net, "--class", 4], "class 4 does not exist"),
        ([*net, "--class", -1], "class -1 does not exist"),
        (["--net", unconditional, "--seeds", "0", "--class", 0], "unconditional"),
        ([*net, "--guidance", 1.5], "name its snapshot with --gnet"),
        ([*net, "--guidance-interval", "1-2"], "name its snapshot with --gnet"),
        ([*net, "--gnet", snapshot], "each --gnet needs its own --guidance: got 1 and 0"),
        ([*net, "--gnet", snapshot, "--guidance", "2,x"], "expected a number, or one for each step"),
        ([*net, "--gnet", snapshot, "--guidance", "1,2"], "expected one weight or 3"),
        ([*net, "--gnet", snapshot, "--guidance", 2, "--guidance-interval", "2-3"], "steps must be within 0 to 2"),
        ([*net, "--gnet", snapshot, "--guidance", 2, "--guidance-interval", "x"], "expected steps as 15-21 or two"),
        ([*net, "--gnet", snapshot, "--guidance", 2, "--guidance-blend", 0.5], "between two --gnet"),
        ([*net, *["--guidance-interval", "1-1"] * 2, "--gnet", snapshot, "--guidance", 2], "one --guidance-interval"),
        ([*net, "--solver", "dpm++2m", "--S-churn", 1], "S_churn is for heun and euler"),
        ([*net, "--grid", tmp_path / "no/grid.png"], "the folder of the grid"),
        (["--net", snapshot, "--seeds", "0-1024", "--grid", tmp_path / "grid.png"], "a grid of 1025 images"),
        ([*net, "--guidance", 1.5, "--gnet", larger], "[3, 16], the main network's [3, 8]"),
        ([*net, "--guidance", 1.5, "--gnet", other_classes], "the guide knows 7 classes, the main network 4"),
        ([*net, "--guidance", 1.5, "--gnet", latent], "trained on other data (latent) than the main network (pixel)"),
        ([*net, "--guidance", 1.5, "--gnet", truncated], "truncated.safetensors is damaged"),
        ([*net, "--sigma-min", 100], "0 < sigma_min < sigma_max"),
        (["--net", snapshot, "--seeds", "0..9"], "expected numbers and ranges"),
        ([*net, "--device", "toaster"], "device 'toaster' cannot be used"),
    ]
    for args, words in cases:
        result = run("--outdir", tmp_path / "out", *args)
        assert result.exit_code == 1, args
        assert words in " ".join(result.output.split()), result.output
        assert not list(tmp_path.glob("out/*")), args
    result = run("--outdir", tmp_path / "file", *net)
    assert result.exit_code == 1
    assert f"Error: {tmp_path / 'file'}: File exists" in " ".join(result.output.split())
    result = run("--outdir", tmp_path / "out", "--net", tmp_path, "--seeds", "0")
    assert f"{tmp_path} is a folder: name a snapshot in it" in " ".join(result.output.split())


def test_wrong_classes_in_the_library_function() -> None:
    with pytest.raises(ValueError, match=r"classes must be in 0\.\.3, got 4"):
        generate_batch(make_network(), open_encoder(PIXELS), [0], 4)
    with pytest.raises(ValueError, match="unconditional"):
        generate_batch(make_network(label_dim=0), open_encoder(PIXELS), [0], 0)


def test_help_explains_every_option() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for param in main.params:
        assert param.opts[0] in result.output
        assert param.help
