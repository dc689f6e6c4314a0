"""Encoding by a VAE: the format of spec 8.4 with a stand-in that has the interface of diffusers' VAEs, and with one of
diffusers itself where that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from python_train import UserError
from python_train.data import VAE_MEAN, VAE_STD, latents, open_dataset
from python_train.data.__main__ import main
from python_train.data.latents import encode, open_vae


class StandIn(torch.nn.Module):
    """Mean: 2x2 patches' averages of each colour and of all; standard deviation: their brightness and a constant."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.mix = torch.nn.Parameter(torch.linspace(-1, 1, 3 * channels).reshape(channels, 3))

    def encode(self, pixels: Tensor) -> types.SimpleNamespace:
        assert pixels.dtype == torch.float32
        assert 0 <= pixels.min() <= pixels.max() <= 1
        small = torch.nn.functional.avg_pool2d(pixels, 2)
        mean = torch.einsum("kc,nchw->nkhw", self.mix, small)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=0.1 + mean.abs()))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    for i in range(7):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, [8, 12, 3], dtype=np.uint8)
        PIL.Image.fromarray(values).save(path)
    return folder


def expected(dataset_path: Path, vae: StandIn) -> list[np.ndarray]:
    pixels, _ = open_dataset(dataset_path).load_all()
    with torch.no_grad():
        posterior = vae.encode(pixels / 255).latent_dist
    return list(torch.cat([posterior.mean, posterior.std], dim=1).numpy())


@pytest.mark.parametrize("dest_name", ["out.zip", "out"])
def test_format(images: Path, tmp_path: Path, dest_name: str) -> None:
    vae, dest = StandIn(), tmp_path / dest_name
    result = encode(images, dest, vae, "stand-in", batch=3, workers=0)
    assert (result.written, result.shape, result.remark) == (7, (8, 4, 6), "")
    dataset = open_dataset(dest)
    assert (dataset.shape, dataset.dtype, dataset.class_names) == ((8, 4, 6), np.float32, ["a", "b"])
    assert dataset.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    want = expected(images, vae)
    for i in range(7):
        np.testing.assert_allclose(dataset[i][0], want[i], rtol=1e-6, atol=1e-6)
    assert dataset.names == [f"00000/img-mean-std-{i:08d}.npy" for i in range(7)]
    assert dataset.source.read(dataset.names[0])[:8] == b"\x93NUMPY\x01\x00"
    stored, _ = dataset.load_all()
    mean, std = stored.double().chunk(2, dim=1)
    assert result.statistics.mean == pytest.approx(mean.mean(dim=(0, 2, 3)).tolist())
    variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))
    assert result.statistics.std == pytest.approx(variance.sqrt().tolist())
    assert dataset.encoder().facts() == {"kind": "latent", **result.statistics.to_json()}
    assert not list(tmp_path.glob(".*"))


def test_published_statistics(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "a.zip", StandIn(), "stand-in", workers=0, imagenet_statistics=True)
    facts = open_dataset(tmp_path / "a.zip").encoder().facts()
    assert facts == {"kind": "latent", "mean": list(VAE_MEAN), "std": list(VAE_STD)}
    with pytest.raises(UserError, match="ImageNet's statistics are for 4 channels, but the VAE x has 3"):
        encode(images, tmp_path / "b.zip", StandIn(3), "x", workers=0, imagenet_statistics=True)


def test_any_number_of_channels_trains(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "a.zip", StandIn(16), "stand-in", batch=2, workers=1)
    dataset = open_dataset(tmp_path / "a.zip")
    z = dataset.encoder().encode(dataset.load_all()[0])
    assert z.shape == (7, 16, 4, 6)
    with pytest.raises(UserError, match="has 17 channels; at most 16"):
        encode(images, tmp_path / "b.zip", StandIn(17), "x", workers=0)


def test_resuming(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "CHUNK", 2)
    vae, seen = StandIn(), []

    def failing(pixels: Tensor) -> types.SimpleNamespace:
        seen.append(len(pixels))
        if len(seen) == 4:
            raise RuntimeError("power cut")
        return StandIn.encode(vae, pixels)

    monkeypatch.setattr(vae, "encode", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        encode(images, tmp_path / "a.zip", vae, "stand-in", batch=2, workers=0)
    assert not (tmp_path / "a.zip").exists()
    encode(images, tmp_path / "a.zip", vae, "stand-in", batch=2, workers=0)
    assert seen == [1, 2, 2, 2, 1, 2, 1]  # the shape; two chunks and the cut; the shape; what was missing
    encode(images, tmp_path / "b.zip", StandIn(), "stand-in", batch=2, workers=0)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


class Nothing(torch.nn.Module):
    def encode(self, pixels: Tensor) -> Tensor:
        return pixels


class Holes(StandIn):
    def encode(self, pixels: Tensor) -> types.SimpleNamespace:
        result = super().encode(pixels)
        if len(pixels) > 1:
            result.latent_dist.mean[1] = torch.nan
        return result


def test_what_does_not_fit(images: Path, tmp_path: Path) -> None:
    dest = tmp_path / "a.zip"
    with pytest.raises(UserError, match="Nothing gives no Gaussian posterior"):
        encode(images, dest, Nothing(), "x", workers=0)
    with pytest.raises(UserError, match=r"latents of a/2\.png are not finite"):
        encode(images, dest, Holes(), "x", workers=0)
    PIL.Image.new("RGB", (13, 9)).save(tmp_path / "odd.png")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd.png").rename(tmp_path / "odd" / "0.png")
    with pytest.raises(UserError, match="images of 9x13 are not divisible by the factor of the VAE x: it makes 4x6"):
        encode(tmp_path / "odd", dest, StandIn(), "x", workers=0)
    PIL.Image.new("L", (8, 8)).save(tmp_path / "odd" / "0.png")
    with pytest.raises(UserError, match="a VAE takes RGB"):
        encode(tmp_path / "odd", dest, StandIn(), "x", workers=0)
    assert not dest.exists()


def test_without_diffusers(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    arguments = ["encode", str(images), str(tmp_path / "a.zip"), "--device", "cpu"]
    result = click.testing.CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "diffusers, which is missing: pip install 'edm2ext[vae]'" in result.output
    (tmp_path / "diffusers.py").write_text("import something_it_needs")
    monkeypatch.delitem(sys.modules, "diffusers")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"diffusers, which cannot be imported .*something_it_needs"):
        open_vae("any")


@pytest.mark.filterwarnings("default")  # diffusers' own
def test_with_a_vae_of_diffusers(images: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    arguments = ["encode", images, tmp_path / "a.zip", "--vae", tmp_path / "vae", "--device", "cpu", "--workers", 0]
    result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "7 items of [8, 4, 6] float32" in result.output
    dataset = open_dataset(tmp_path / "a.zip")
    pixels, _ = open_dataset(images).load_all()
    with torch.no_grad():
        posterior = vae.eval().encode(pixels[:1] / 255).latent_dist
    want = torch.cat([posterior.mean, posterior.std], dim=1)[0].numpy()
    np.testing.assert_allclose(dataset[0][0], want, rtol=1e-4, atol=1e-5)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(json.loads(archive.read("dataset.json"))["statistics"]["std"]) == 4
    with pytest.raises(UserError, match=r"the VAE .*nowhere cannot be loaded"):
        open_vae(str(tmp_path / "nowhere"))


_TWO_PROCESSES = """
import subprocess
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_data_encode import StandIn
from python_train import world
from python_train.data import latents
latents.CHUNK = 2
with world.open_world("cpu") as world:
    result = latents.encode(Path(sys.argv[2]), Path(sys.argv[3]), StandIn(), "x", batch=2, workers=0, world=world)
    assert (result is None) == (world.rank == 1)
"""


@pytest.mark.slow
def test_two_processes_share_the_work(images: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [tmp_path / "script.py", Path(__file__).parent, images, tmp_path / "a.zip"]
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    encode(images, tmp_path / "b.zip", StandIn(), "x", batch=2, workers=0)
    one, two = open_dataset(tmp_path / "b.zip"), open_dataset(tmp_path / "a.zip")
    assert two.names == one.names
    assert two.labels.tolist() == one.labels.tolist()
    # Chunks of another size sum the statistics in another order.
    assert two.statistics.mean == pytest.approx(one.statistics.mean, rel=1e-12)
    assert two.statistics.std == pytest.approx(one.statistics.std, rel=1e-12)
    np.testing.assert_array_equal(two.load_all()[0].numpy(), one.load_all()[0].numpy())
