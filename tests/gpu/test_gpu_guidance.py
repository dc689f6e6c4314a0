"""Guides on streams of their own: the images are those of networks that run one after the other, bit for bit."""

import pytest
import torch

import edm2ext
from python_train import guidance
from python_train.config import make_options
from python_train.guidance import Guide
from python_train.loop import build_network
from python_train.network import Precond
from python_train.sample import sample

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)


def make(seed: int, **overrides: object) -> Precond:
    torch.manual_seed(seed)
    net = build_network(make_options("digits", **overrides), 8, 1, 10)
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net.eval().requires_grad_(False).cuda()


@pytest.mark.parametrize("batch", [1, 64])
def test_streams_change_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, small, smaller = make(0), make(1, model_channels=16), make(2, model_channels=8)
    noise, labels = torch.randn(batch, 1, 8, 8, device="cuda"), torch.eye(10, device="cuda")[torch.arange(batch) % 10]
    guides = [Guide(small, 2.0, range(2, 7)), Guide(smaller, 1.5)]
    with torch.no_grad(), net.baked(), small.baked(), smaller.baked():
        beside = [sample(net, noise, labels, guides, num_steps=8) for _ in range(5)]
        monkeypatch.setattr(guidance, "_side_stream", lambda device: None)
        in_turn = sample(net, noise, labels, guides, num_steps=8)
    assert all(torch.equal(images, in_turn) for images in beside)
