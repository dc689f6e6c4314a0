"""Drawing images from a snapshot: the command, its files and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from python_train import UserError
from python_train.checkpoint import save_snapshot
from python_train.data import open_encoder
from python_train.generate import generate_batch, main, parse_seeds, seed_batches
from python_train.network import Precond

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
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".png"}, "temporary files are left"


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
        "unloaded": ["--gnet", tmp_path / "missing.safetensors"],
    }
    for name, args in runs.items():
        result = run("--net", snapshot, "--outdir", tmp_path / name, "--seeds", "0-1", *args)
        assert result.exit_code == 0, result.output
    plain, guided, unloaded = (read(tmp_path / name) for name in runs)
    assert all(np.array_equal(plain[name], unloaded[name]) for name in plain)
    assert not any(np.array_equal(plain[name], guided[name]) for name in plain)


def test_processes_share_the_seeds(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert run("--net", snapshot, "--outdir", tmp_path / "out", "--seeds", "0-9", "--batch", 2).exit_code == 0
        counts.append(len(read(tmp_path / "out")))
    assert counts == [4, 7, 10]
    monkeypatch.undo()
    assert run("--net", snapshot, "--outdir", tmp_path / "one", "--seeds", "0-9", "--batch", 2).exit_code == 0
    shared, one = read(tmp_path / "out"), read(tmp_path / "one")
    assert shared.keys() == one.keys()
    assert all(np.abs(shared[name].astype(int) - one[name]).max() <= 1 for name in one)


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
    assert run("--net", net, "--outdir", tmp_path / "out", "--seeds", "0").exit_code == 0
    latent = np.load(tmp_path / "out/000000.npy")
    assert latent.shape == (4, 8, 8)
    assert latent.dtype == np.float32


def test_errors_name_what_is_wrong(snapshot: Path, tmp_path: Path) -> None:
    unconditional = save(tmp_path / "uncond.safetensors", make_network(label_dim=0))
    larger = save(tmp_path / "larger.safetensors", make_network(resolution=16))
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
        ([*net, "--guidance", 1.5, "--gnet", larger], "[3, 16], the main network's [3, 8]"),
        ([*net, "--guidance", 1.5, "--gnet", other_classes], "the guide knows 7 classes, the main network 4"),
        ([*net, "--guidance", 1.5, "--gnet", truncated], "truncated.safetensors is damaged"),
        ([*net, "--sigma-min", 100], "0 < sigma_min < sigma_max"),
        (["--net", snapshot, "--seeds", "0..9"], "expected numbers and ranges"),
        ([*net, "--device", "toaster"], "the device 'toaster' cannot be used"),
    ]
    for args, words in cases:
        result = run("--outdir", tmp_path / "out", *args)
        assert result.exit_code == 1, args
        assert words in " ".join(result.output.split()), result.output
        assert not list(tmp_path.glob("out/*")), args
    result = run("--outdir", tmp_path / "file", *net)
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.output


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
