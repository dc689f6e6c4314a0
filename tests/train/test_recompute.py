"""Activations that the backward pass computes again are the same bits, dropout included."""

import pytest
import torch
from torch import Tensor

import edm2ext
from edm2ext.nn import MPConv
from python_train.network import Block, Precond


def network() -> Precond:
    torch.manual_seed(0)
    net = Precond(
        16,
        3,
        4,
        use_fp16=False,
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=2,
        dropout=0.3,
        channels_per_head=16,
    )
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net.train()


def run(prepared: bool, recompute: bool, net: Precond) -> tuple[list[Tensor], int]:
    """Loss and gradients; and how many convolutions ran."""
    net.unet.recompute = recompute
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handles = [layer.register_forward_hook(count) for layer in net.modules() if isinstance(layer, MPConv)]
    torch.manual_seed(1)
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.4, 2.0]), torch.eye(4)[:2]
    if prepared:
        weights = net.prepared_weights("effective")
        weights.refresh(force=True)
        with weights:
            loss = net(x, sigma, labels).square().mean()
            loss.backward()
    else:
        loss = net(x, sigma, labels).square().mean()
        loss.backward()
    for handle in handles:
        handle.remove()
    gradients = [param.grad for param in net.parameters() if param.grad is not None]
    net.zero_grad(set_to_none=True)
    return [loss.detach(), *gradients, *(param.detach().clone() for param in net.parameters())], calls


@pytest.mark.parametrize("prepared", [True, False])
def test_same_bits(backend: str, prepared: bool) -> None:
    """Loss, gradients, and weights that were normalised once."""
    (kept, calls), (recomputed, more_calls) = (run(prepared, recompute, network()) for recompute in (False, True))
    assert len(kept) == len(recomputed) > 30
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    blocks = [block for block in network().modules() if isinstance(block, Block)]
    assert more_calls - calls == sum(isinstance(layer, MPConv) for block in blocks for layer in block.modules())


def test_only_in_training() -> None:
    net = network()
    net.unet.recompute = True
    with edm2ext.set_backend("reference"), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        net.eval()
        net(torch.randn(1, 3, 16, 16), torch.ones(1), torch.eye(4)[:1]).sum().backward()
    assert net.unet.out_gain.grad is not None
