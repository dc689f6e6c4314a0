"""The network against the specification's conformance vectors (12.1 - 12.3), sizes (3.5) and layout (9.5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edm2ext import ops
from edm2ext.nn import MPConv, MPFourier, MPLinear
from python_train.config import PRESETS, make_options
from python_train.loss import EDM2Loss
from python_train.network import Block, Precond

# spec 3.5: preset -> (parameters with 1000 classes, without labels)
SIZES = {
    "img512-xxs": (31_309_029, 31_053_029),
    "img512-xs": (124_713_253, 124_201_253),
    "img512-s": (280_212_837, 279_444_837),
    "img512-m": (497_807_781, 496_783_781),
    "img512-l": (777_498_085, 776_218_085),
    "img512-xl": (1_119_283_749, 1_117_747_749),
    "img512-xxl": (1_523_164_773, 1_521_372_773),
    "img64-xs": (124_710_949, 124_198_949),
    "img64-s": (280_209_381, 279_441_381),
    "img64-m": (497_803_173, 496_779_173),
    "img64-l": (777_492_325, 776_212_325),
    "img64-xl": (1_119_276_837, 1_117_740_837),
}

# spec 12.2, eval mode: mean, rms, first two elements, last two elements
ACTIVATIONS = {
    "unet": (0.019525, 0.120011, -0.012890, 0.045047, -0.187444, -0.037245),
    "unet.emb_fourier": (-0.044254, 0.960950, 1.397713, 0.506650, -1.048522, -1.261147),
    "unet.emb_noise": (0.110834, 1.011145, 0.029133, 0.513604, 0.029320, -0.151334),
    "unet.emb_label": (0.066776, 1.005507, -1.040536, 0.650862, 0.723939, 0.070431),
    "unet.enc.16x16_conv": (0.039640, 0.946201, -1.219980, -0.374072, -0.095561, 0.868488),
    "unet.enc.16x16_block0": (-0.000614, 1.072532, -1.493793, -0.685632, -0.079282, 1.219687),
    "unet.enc.8x8_down": (0.020339, 1.057047, -1.547150, -0.060874, 1.168906, 1.102019),
    "unet.enc.8x8_block0": (-0.006732, 0.964950, -0.053950, 1.039510, 1.084814, 0.439490),
    "unet.dec.8x8_in0": (-0.017263, 1.101556, 0.239608, 1.317848, 0.674710, 0.015441),
    "unet.dec.8x8_in1": (-0.031927, 1.102551, 0.743654, 1.728886, 0.099240, -0.071549),
    "unet.dec.8x8_block0": (-0.023857, 1.037953, 0.979405, 0.366192, -0.082077, -0.720489),
    "unet.dec.8x8_block1": (-0.022297, 0.983994, 1.453675, 1.329704, 0.710750, 1.220053),
    "unet.dec.16x16_up": (-0.036586, 0.996699, 1.370147, 0.988914, 1.102987, 0.993990),
    "unet.dec.16x16_block0": (0.031100, 1.040084, -1.101429, -1.449627, 0.265737, -0.116657),
    "unet.dec.16x16_block1": (0.071778, 0.987249, 1.048740, 1.056282, 0.285739, 0.677091),
    "": (0.000058, 0.317831, 0.289932, 0.214590, -0.101150, -0.007053),
}

# spec 12.2, training mode: gradient rms, first element; parameter after the forward: rms, first element
GRADIENTS = {
    "unet.out_gain": (1325.43, 1325.43, None, 0.12915),
    "unet.emb_noise.weight": (0.170936, 0.0167129, 0.99989891, 1.1598946),
    "unet.emb_label.weight": (0.414566, 0.00541409, 0.99989551, 0.3365860),
    "unet.enc.16x16_conv.weight": (0.854649, 0.158022, 0.99990141, -0.0721379),
    "unet.enc.8x8_block0.emb_gain": (4.24426, 4.24426, None, None),
    "unet.enc.8x8_block0.conv_res0.weight": (0.0196784, -0.0367955, 0.99990004, -1.3563209),
    "unet.enc.8x8_block0.emb_linear.weight": (0.0229312, 0.00232008, 0.99989945, -0.7585061),
    "unet.enc.8x8_block0.conv_res1.weight": (0.0196532, -0.0107376, 0.99989986, -1.3765807),
    "unet.enc.8x8_block0.conv_skip.weight": (0.228146, 0.16125, 0.99989927, 1.3802147),
    "unet.enc.8x8_block0.attn_qkv.weight": (0.0320888, 0.00407687, 0.99989998, -0.1098507),
    "unet.enc.8x8_block0.attn_proj.weight": (0.05404, -0.0477969, 0.99990022, -1.5649155),
    "unet.dec.8x8_in0.emb_gain": (4.20539, 4.20539, None, None),
    "unet.dec.8x8_block0.conv_res0.weight": (0.0149787, -0.00887062, 0.99989986, 1.5874979),
    "unet.dec.8x8_block0.conv_skip.weight": (0.105489, 0.362384, 0.99989986, -1.5402800),
    "unet.dec.8x8_block0.attn_qkv.weight": (0.0255345, -0.00351767, 0.99989998, -1.3135955),
    "unet.dec.16x16_up.emb_gain": (15.1207, -15.1207, None, None),
    "unet.dec.16x16_up.conv_res0.weight": (0.0370491, -0.035505, 0.99989986, -0.1469106),
    "unet.out_conv.weight": (1.03807, -0.911267, 0.99990070, 1.4624432),
    "logvar_linear.weight": (460.752, -638.838, 0.99990332, -0.1694160),
}


def fill(p: int, shape: tuple[int, ...]) -> Tensor:
    """The deterministic fill v(p, j) of spec 12.1, in fp64."""
    with np.errstate(over="ignore"):
        h = np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(2654435761)
        h = h + np.uint32((p * 40503 + 12345) % 2**32)
        h ^= h >> np.uint32(15)
        h *= np.uint32(2246822519)
        h ^= h >> np.uint32(13)
    return torch.from_numpy(h.astype(np.float64) / 2**31 - 1).reshape(shape)


def tiny(**overrides: object) -> Precond:
    """The network of spec 12.2."""
    config = {
        "img_resolution": 16,
        "img_channels": 4,
        "label_dim": 10,
        "use_fp16": False,
        "model_channels": 64,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    }
    return Precond(**{**config, **overrides})


@pytest.fixture
def filled() -> Precond:
    net = tiny()
    state = net.state_dict()
    assert len(state) == 63
    assert sum(param.numel() for param in net.parameters()) == 2_890_187
    for p, (name, value) in enumerate(state.items()):
        v = fill(p, tuple(value.shape))
        scaled = np.pi * v if name.endswith(("freqs", "phases")) else 0.5 * v + 0.6 if value.ndim == 0 else 3**0.5 * v
        value.copy_(scaled)
    return net


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    images, noise = 0.5 * 3**0.5 * fill(1000, (2, 4, 16, 16)), 3**0.5 * fill(1001, (2, 4, 16, 16))
    return {
        "images": images.float(),
        "noise": noise.float(),
        "sigma": torch.tensor([0.3, 2.0]).reshape(2, 1, 1, 1),
        "labels": torch.eye(10)[[3, 7]],
    }


def statistics(value: Tensor) -> list[float]:
    flat = value.detach().flatten().double()
    return [flat.mean().item(), flat.square().mean().sqrt().item(), *flat[:2].tolist(), *flat[-2:].tolist()]


def test_fill(filled: Precond, inputs: dict[str, Tensor]) -> None:
    state = filled.state_dict()
    expected = {
        "unet.out_gain": [0.12915],
        "unet.emb_fourier.freqs": [2.209598, 1.517307],
        "unet.emb_noise.weight": [1.159051, -1.601354],
        "unet.enc.16x16_conv.weight": [-0.07149978, -0.4871697],
        "logvar_linear.weight": [-0.1752194, -1.319404],
    }
    for name, values in expected.items():
        assert state[name].flatten()[: len(values)].tolist() == pytest.approx(values, rel=1e-5)
    assert list(state).index("unet.enc.16x16_conv.weight") == 5
    assert inputs["images"].flatten()[:3].tolist() == pytest.approx([0.5076708, -0.2179349, 0.0639944], abs=1e-7)
    assert inputs["noise"].flatten()[:3].tolist() == pytest.approx([-0.3628452, 1.6467247, -0.9331450], abs=1e-7)


def test_activations(filled: Precond, inputs: dict[str, Tensor], backend: str) -> None:
    filled.eval()
    seen: dict[str, Tensor] = {}
    for name, module in filled.named_modules():
        if name in ACTIVATIONS:
            module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out}))
    x = inputs["images"] + inputs["noise"] * inputs["sigma"]
    with torch.no_grad():
        filled(x, inputs["sigma"], inputs["labels"])
        for name, expected in ACTIVATIONS.items():
            assert statistics(seen[name]) == pytest.approx(expected, abs=2e-5), name
        without = statistics(filled(x, inputs["sigma"]))
        assert without == pytest.approx((-0.007352, 0.317261, 0.282486, 0.207706, -0.105082, -0.005703), abs=2e-5)
        _, logvar = filled(x, inputs["sigma"], inputs["labels"], return_logvar=True)
    assert logvar.shape == (2, 1, 1, 1)
    assert logvar.flatten().tolist() == pytest.approx([-1.1935567, -2.2342622], abs=2e-5)


def test_gradients(filled: Precond, inputs: dict[str, Tensor], backend: str) -> None:
    filled.train()
    loss = EDM2Loss().at(filled, inputs["images"], inputs["labels"], inputs["sigma"], inputs["noise"])
    assert loss.mean().item() == pytest.approx(4.742172, rel=1e-5)
    assert loss.sum().item() == pytest.approx(9711.969, rel=1e-5)
    (loss.sum() / 2).backward()
    params = dict(filled.named_parameters())
    for name, (grad_rms, grad_first, rms, first) in GRADIENTS.items():
        grad = statistics(params[name].grad)
        assert grad[1] == pytest.approx(grad_rms, rel=1e-4), name
        assert grad[2] == pytest.approx(grad_first, rel=1e-3), name
        value = statistics(params[name])
        assert rms is None or value[1] == pytest.approx(rms, abs=5e-7), name
        assert first is None or value[2] == pytest.approx(first, abs=1e-6), name


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in", "c_noise"),
    [
        (0.002, 0.999984, 0.001999984, 1.999984, -1.553652),
        (0.5, 0.5, 0.35355339, 1.4142136, -0.1732868),
        (1, 0.2, 0.4472136, 0.89442719, 0),
        (80, 3.9060974e-5, 0.49999023, 0.012499756, 1.0955067),
    ],
)
def test_preconditioning(sigma: float, c_skip: float, c_out: float, c_in: float, c_noise: float) -> None:
    """Spec 12.3, seen from outside: D(x) = c_skip x + c_out F(c_in x, c_noise) with a stand-in for F."""
    net = tiny()

    class Raw(torch.nn.Module):
        stride, out_conv = net.unet.stride, net.unet.out_conv

        def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
            self.seen = x, noise_labels, class_labels
            return torch.full_like(x[:, :4], 3.0)

    net.unet = Raw()
    x = torch.randn(2, 4, 16, 16)
    D = net(x, sigma)
    seen, noise_labels, labels = net.unet.seen
    torch.testing.assert_close(D, c_skip * x + c_out * 3.0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[:, :4], c_in * x, rtol=1e-6, atol=0)
    assert torch.equal(seen[:, 4:], torch.ones(2, 1, 16, 16))
    assert noise_labels.tolist() == pytest.approx([c_noise], abs=1e-6)
    assert labels is None


@pytest.mark.parametrize("label_dim", [1000, 0])
@pytest.mark.parametrize("preset", SIZES)
def test_preset_sizes(preset: str, label_dim: int) -> None:
    channels = 4 if preset.startswith("img512") else 3
    with torch.device("meta"):
        net = Precond(**make_options(preset).network_config(64, channels, label_dim))
    params = list(net.parameters())
    assert all(param.is_meta for param in params)
    assert sum(param.numel() for param in params) == SIZES[preset][label_dim == 0]
    assert len(params) == (199 if label_dim else 198)
    assert sum(param.ndim == 0 for param in params) == 37
    assert len(list(net.buffers())) == 4
    assert sum(buffer.numel() for buffer in net.buffers()) == 2 * net.config["model_channels"] + 256
    modules = list(net.modules())
    assert len(modules) == (204 if label_dim else 203)
    assert sum(isinstance(module, MPConv | MPLinear) for module in modules) == (162 if label_dim else 161)
    assert sum(isinstance(module, MPFourier) for module in modules) == 2
    blocks = [module for module in modules if isinstance(module, Block)]
    assert len(blocks) == 36
    assert sum(block.num_heads > 0 for block in blocks) == 15


def test_all_presets_have_a_size() -> None:
    assert SIZES.keys() == PRESETS.keys() - {"digits"}


def test_state_dict_layout() -> None:
    names = list(tiny().state_dict())
    assert names[:7] == [
        "unet.out_gain",
        "unet.emb_fourier.freqs",
        "unet.emb_fourier.phases",
        "unet.emb_noise.weight",
        "unet.emb_label.weight",
        "unet.enc.16x16_conv.weight",
        "unet.enc.16x16_block0.emb_gain",
    ]
    prefix = "unet.enc.8x8_block0."
    assert [name.removeprefix(prefix) for name in names if name.startswith(prefix)] == [
        "emb_gain",
        "conv_res0.weight",
        "emb_linear.weight",
        "conv_res1.weight",
        "conv_skip.weight",
        "attn_qkv.weight",
        "attn_proj.weight",
    ]
    assert names[-4:] == [
        "unet.out_conv.weight",
        "logvar_fourier.freqs",
        "logvar_fourier.phases",
        "logvar_linear.weight",
    ]
    assert "unet.emb_label.weight" not in tiny(label_dim=0).state_dict()


def test_initialisation_draws_in_definition_order() -> None:
    torch.manual_seed(7)
    net = tiny()
    torch.manual_seed(7)
    for name, value in net.state_dict().items():
        if value.ndim == 0:
            assert value == 0
        elif name.endswith("freqs"):
            torch.testing.assert_close(value, 2 * np.pi * torch.randn(value.shape))
        elif name.endswith("phases"):
            torch.testing.assert_close(value, 2 * np.pi * torch.rand(value.shape))
        else:
            assert torch.equal(value, torch.randn(value.shape)), name
    x = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(net.eval()(x, 0.5), 0.5 * x)  # out_gain = 0 leaves D = c_skip x (spec 13.4)


def test_config_rebuilds_the_network() -> None:
    net = tiny(dropout=0.1, clip_act=None, resample_filter=[1, 3, 3, 1])
    again = Precond(**net.config)
    assert again.config == net.config
    again.load_state_dict(net.state_dict())


def test_broadcasting_and_labels(filled: Precond, inputs: dict[str, Tensor], backend: str) -> None:
    filled.eval().requires_grad_(False)
    x, labels = inputs["images"], inputs["labels"]
    same = [filled(x, sigma, labels) for sigma in (0.7, torch.tensor(0.7), torch.full([1], 0.7), torch.full([2], 0.7))]
    for other in same[1:]:
        torch.testing.assert_close(other, same[0])
    torch.testing.assert_close(filled(x, 0.7, labels[:1]), filled(x, 0.7, labels[:1].repeat(2, 1)))
    torch.testing.assert_close(filled(x, 0.7), filled(x, 0.7, torch.zeros(2, 10)))
    unconditional = tiny(label_dim=0).eval().requires_grad_(False)
    unconditional.unet.out_gain.fill_(1)
    assert torch.equal(unconditional(x, 0.7, labels), unconditional(x, 0.7))


def test_non_square_and_memory_formats(filled: Precond, backend: str) -> None:
    filled.eval().requires_grad_(False)
    x = torch.randn(2, 4, 12, 20)
    last = filled(x, 0.7)
    filled.memory_format = torch.contiguous_format
    contiguous = filled(x, 0.7)
    assert last.is_contiguous()
    assert contiguous.is_contiguous()
    torch.testing.assert_close(last, contiguous, rtol=1e-4, atol=1e-5)


def test_dropout_only_in_training() -> None:
    net = tiny(dropout=0.5)
    net.unet.out_gain.data.fill_(1)
    x = torch.randn(2, 4, 16, 16)
    assert not torch.equal(net.train()(x, 0.7), net(x, 0.7))
    assert torch.equal(net.eval()(x, 0.7), net(x, 0.7))


def test_dropout_differs_between_blocks_and_repeats_with_the_generator(backend: str) -> None:
    net = tiny(dropout=0.5).train()
    net.unet.out_gain.data.fill_(1)
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    assert sorted(block.dropout_index for block in blocks) == list(range(len(blocks)))
    x = torch.randn(2, 4, 16, 16)
    state = torch.get_rng_state()
    first = net(x, 0.7)
    assert (net(x, 0.7) - first).abs().max() > 0.1
    torch.set_rng_state(state)
    torch.testing.assert_close(net(x, 0.7), first)  # but for the rounding of one more forced normalisation


def test_half_precision_falls_back_on_the_cpu(filled: Precond) -> None:
    x = torch.randn(2, 4, 16, 16)
    filled.eval().requires_grad_(False)
    exact = filled(x, 0.7)
    filled.compute_dtype = torch.float16
    assert torch.equal(filled(x, 0.7), exact)
    filled.compute_dtype = torch.bfloat16
    rounded = filled(x, 0.7)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    assert torch.equal(filled(x, 0.7, force_fp32=True), exact)


@pytest.mark.parametrize(
    ("x", "sigma", "labels", "message"),
    [
        ([2, 3, 16, 16], [2], None, r"x must be \[N, 4, H, W\], got \[2, 3, 16, 16\]"),
        ([4, 16, 16], [2], None, "x must be"),
        ([2, 4, 15, 16], [2], None, r"divisible by 2, got \[15, 16\]"),
        ([2, 4, 16, 16], [3], None, "sigma must have 1 or 2 elements, got 3"),
        ([2, 4, 16, 16], [2], [2, 9], r"class_labels must be \[2 or 1, 10\], got \[2, 9\]"),
        ([2, 4, 16, 16], [2], [3, 10], "class_labels must be"),
    ],
)
def test_bad_input(x: list[int], sigma: list[int], labels: list[int] | None, message: str) -> None:
    net = tiny(model_channels=8)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(x), torch.ones(sigma), None if labels is None else torch.zeros(labels))


def test_bad_architecture() -> None:
    with pytest.raises(ValueError, match="not divisible by 8"):
        Precond(20, 3, 0)
    with pytest.raises(ValueError, match="flavor"):
        Block(8, 8, 8, flavor="middle")
    with pytest.raises(ValueError, match="resample_mode"):
        Block(8, 8, 8, resample_mode="sideways")
    with pytest.raises(ValueError, match="96 channels"):
        Block(96, 96, 8, attention=True, channels_per_head=19)


@pytest.mark.parametrize("out_channels", [16, 24])
def test_a_decoder_block_concatenates_by_itself(backend: str, out_channels: int) -> None:
    block = Block(24, out_channels, 8, "dec").train()  # of as many channels, it has no convolution on the skip path
    a, b, c = torch.randn(2, 16, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(2, out_channels)
    torch.testing.assert_close(block(a, c, ops.CatWith(b, 0.3)), block(ops.mp_cat(a, b, 0.3), c))


@pytest.mark.parametrize("other", [{"flavor": "enc"}, {"flavor": "dec", "resample_mode": "up"}])
def test_other_blocks_do_not_concatenate(other: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="Block: cat is for decoder blocks that keep the resolution"):
        Block(24, 16, 8, **other)(torch.randn(2, 16, 4, 4), torch.randn(2, 16), ops.CatWith(torch.randn(2, 8, 4, 4)))
