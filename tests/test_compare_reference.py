"""The comparison with a reference: the plain network is EDM2's, and launches what its formulae say."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import compare_reference, plain_network, plain_sampling
from edm2ext.traffic import counting
from python_train.config import make_options
from python_train.guidance import Guide, GuidedDenoiser
from python_train.network import Precond
from python_train.solvers import heun, noise_levels

ARGUMENTS = [
    "--preset",
    "digits",
    "--batch",
    "4",
    "--rounds",
    "2",
    "--warm-up",
    "1",
    "--threads",
    "1",
    "--device",
    "cpu",
]


def test_the_plain_network_is_the_network() -> None:
    options = make_options("digits", num_blocks=1, model_channels=64)
    nets = [compare_reference.network(options, (8, 2, 10), torch.device("cpu")).train() for _ in range(2)]
    torch.manual_seed(1)
    x, sigma, labels = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 20.0]), torch.eye(10)[:3]
    results = []
    for net, call in ((nets[0], nets[0]), (nets[1], plain_network.PlainNetwork(nets[1]))):
        denoised, logvar = call(x, sigma, labels, return_logvar=True)
        (denoised.square().sum() + logvar.sum()).backward()
        results.append([denoised, logvar, *(p.grad for p in net.parameters()), *net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_launches_of_the_plain_network() -> None:
    """Those of the official op sequence, within 0.1 %; our `reference` backend groups some ops otherwise."""
    with torch.device("meta"), counting() as counter:
        net = Precond(**make_options("img512-s").network_config(64, 4, 1000)).train()
    with torch.device("meta"), counting() as counter:
        x, labels = torch.empty(32, 4, 64, 64, dtype=torch.float16), torch.empty(32, 1000)
        plain_network.unet(net, x, torch.empty(32), labels).sum().backward()
    found = counter.total()
    assert found.launches == compare_reference.LAUNCHES == pytest.approx(6_108, rel=0.001)
    assert found.bytes / 1e9 == pytest.approx(133, rel=0.01)
    assert counter.total(kind="product").bytes / 1e9 == pytest.approx(19, rel=0.01)


def test_command_line(tmp_path: Path) -> None:
    file = tmp_path / "result.csv"
    for _ in range(2):
        result = CliRunner().invoke(compare_reference.main, [*ARGUMENTS, "--csv", str(file)])
        assert result.exit_code == 0, result.output
    assert "plain torch, official op sequence" in result.output
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2
    assert float(rows[0]["largest relative difference"]) < 1e-4


def test_sampling() -> None:
    """The same images as the sampler that the papers write down."""
    result = CliRunner().invoke(compare_reference.main, [*ARGUMENTS, "--sampling", "--evaluations", "5"])
    assert result.exit_code == 0, result.output
    assert "guided by one with half the channels" in result.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("more", [[], ["--sampling", "--evaluations", "5"]], ids=["step", "sampling"])
def test_tuned(more: list[str]) -> None:
    result = CliRunner().invoke(compare_reference.main, [*ARGUMENTS, "--variant", "tuned", *more])
    assert result.exit_code == 0, result.output
    assert "frames compiled" in result.output


class Recorded:
    """Stands in for a CUDA graph on the CPU."""

    def __init__(self, launches: Callable[[], None]) -> None:
        self.replay = launches


@torch.no_grad()
def test_networks_in_one_graph() -> None:
    """A solver gets from the replayed networks what it gets from calling them."""
    options = make_options("digits", num_blocks=1, model_channels=32)
    device = torch.device("cpu")
    main, guide = (compare_reference.network(options, (8, 1, 10), device).eval() for _ in range(2))
    guide.unet.out_gain.fill_(0.3)
    noise, labels = torch.randn(2, 1, 8, 8), torch.eye(10)[:2]
    levels = noise_levels(4)
    eager = GuidedDenoiser(main, [Guide(guide, 2.0)], labels, levels.tolist(), torch.float32, device)
    captured = plain_sampling.CapturedDenoiser(eager, noise, Recorded)
    expected = heun(eager, noise * levels[0], levels)
    for _ in range(2):
        assert torch.equal(heun(captured, noise * levels[0], levels), expected)
    published = plain_sampling.published(main, guide, 2.0, noise, labels, steps=4)
    torch.testing.assert_close(published, expected, rtol=1e-4, atol=1e-4)


# What a reference folder has to offer, in a few lines of our own: the plain network under the names of the authors.
_NETWORK = """
import torch
from benchmarks.plain_network import PlainNetwork
from python_train.network import Precond as Ours


class Precond(Ours):
    def forward(self, x, sigma, class_labels=None, return_logvar=False):
        return PlainNetwork(self)(x, sigma, class_labels, return_logvar)
"""
_LOOP = """
from python_train.loss import EDM2Loss as Ours


class EDM2Loss(Ours):
    def __call__(self, net, images, labels=None):
        return FACTOR * super().__call__(net, images, labels)
"""


@pytest.mark.parametrize("factor", ["1", "1.01"])
def test_a_reference_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: str) -> None:
    """Its network and loss are compared with, and a difference is an error."""
    package = tmp_path / "training"
    package.mkdir()
    (package / "networks_edm2.py").write_text(_NETWORK)
    (package / "training_loop.py").write_text(_LOOP.replace("FACTOR", factor))
    for name in ("training", "training.networks_edm2", "training.training_loop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    result = CliRunner().invoke(compare_reference.main, [*ARGUMENTS, "--reference", str(tmp_path)])
    assert "authors' program" in result.output
    assert result.exit_code == (factor != "1"), result.output


def test_a_folder_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("training", "training.networks_edm2", "training.training_loop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    result = CliRunner().invoke(compare_reference.main, [*ARGUMENTS, "--reference", str(tmp_path)])
    assert result.exit_code == 1
    assert "does not hold the authors' program" in result.output
