"""The list of convolutions and the model of their time."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import conv, conv_fusions, conv_problems
from benchmarks.conv_problems import GPUS, Problem, predict, problems_of
from edm2ext.nn import MPConv
from python_train.config import make_options
from python_train.network import Precond


def test_every_convolution_of_the_network_is_in_the_list():
    found = problems_of("img512-s")
    with torch.device("meta"):
        net: nn.Module = Precond(**make_options("img512-s").network_config(64, 4, 1000))
    assert sum(found.values()) == sum(isinstance(module, MPConv) for module in net.modules())
    assert found[Problem(64, 64, 192, 192, 3)] == 10
    assert Problem(64, 64, 5, 192, 3) in found
    # Karras et al., table 2: 102 billion products an image for EDM2-S, attention's included.
    products = sum(count * problem.products(1) for problem, count in found.items())
    assert 0.97 * 102e9 < products < 102e9


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("direction", range(3))
def test_predictions_keep_the_bound(direction: int, wgmma: bool):
    for problem in problems_of("img512-l"):
        made = predict(problem, 32, direction, GPUS["H200"], wgmma)
        assert made.time > made.bound
        of_block = made.plan.rows * made.plan.columns * made.plan.steps * made.plan.depth
        assert made.plan.blocks * of_block >= problem.products(32)


def test_padding_is_predicted():
    gpu = GPUS["H200"]
    narrow, wide = Problem(64, 64, 5, 192, 3), Problem(64, 64, 8, 192, 3)
    assert narrow.padded() == wide == wide.padded()
    made, whole = (predict(problem, 32, 0, gpu) for problem in (narrow, wide))
    copied = 2 * 32 * 64 * 64 * (5 + 8) / gpu.bandwidth
    assert made.time - whole.time == pytest.approx(copied + conv_problems.LAUNCH)
    assert made.bound < whole.bound


def test_fusions():
    """What is moved less is saved, and MP-SiLU on load cannot be free."""
    gpu = GPUS["H200"]
    blocks = conv_fusions.places("img512-xs")
    wide = [place.problem(b.conv_skip) for place in blocks if (b := place.block).flavor == "dec" and b.conv_skip]
    assert len(wide) == 16
    cat = conv_fusions.cat_halves("img512-xs", 8, gpu, False)
    assert cat.without - cat.with_it == pytest.approx(
        sum(2 * 8 * p.height * p.width * p.channels for p in wide) / gpu.bandwidth
    )
    attention = conv_fusions.heads("img512-xs", 32, gpu, False)
    assert attention.with_it < attention.without
    up = conv_fusions.upsampling("img512-xs", 8, gpu, False)
    assert up.with_it < up.without
    hidden, additional = (conv_fusions.silu_on_load("img512-xs", 8, gpu, False, hidden) for hidden in (True, False))
    assert hidden.without == additional.without
    assert hidden.with_it < additional.with_it
    result = CliRunner().invoke(conv_fusions.main, ["--preset", "img512-xs", "--batch", "8"])
    assert result.exit_code == 0, result.output
    assert "| img512-xs | 8 |" in result.output


def test_command_line(tmp_path: Path):
    file = tmp_path / "conv.csv"
    arguments = ["--preset", "img512-xs", "--batch", "8", "--gpu", "A100", "--csv", str(file)]
    result = CliRunner().invoke(conv_problems.main, arguments)
    assert result.exit_code == 0, result.output
    assert "| img512-xs | 8 | 39 | 123 |" in result.output
    assert len(file.read_text().splitlines()) == 1 + 3 * 39


def test_wgmma_is_for_hopper():
    result = CliRunner().invoke(conv_problems.main, ["--gpu", "A100", "--wgmma"])
    assert result.exit_code == 2
    assert "--wgmma is for Hopper, got --gpu A100" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_benchmark_asks_for_a_gpu():
    result = CliRunner().invoke(conv.main, [])
    assert result.exit_code == 1
    assert "needs a GPU" in result.output
