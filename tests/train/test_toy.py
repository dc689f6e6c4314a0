"""The toy system: its ground truth against the numbers of spec 11.1, its model and training, and the whole (slow)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from python_train import UserError
from python_train.toy import __main__ as toy_main
from python_train.toy.__main__ import main, run, trained_model
from python_train.toy.distribution import TreeMixture
from python_train.toy.evaluate import Row, draw, exact_denoiser, measure, outline_level, scaled_scores
from python_train.toy.figure import thinned
from python_train.toy.model import RECIPES, Recipe, ToyModel, learning_rate, noisy_batch, score_matching_loss, train

SHORT = {
    "main": Recipe("A", 16, 4),
    "autoguide": Recipe("A", 8, 2),
    "cfg-guide": Recipe("AB", 8, 2),
}


@pytest.fixture(scope="module")
def truth() -> TreeMixture:
    return TreeMixture("A")


def moments(truth: TreeMixture) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation [2] of a mixture, from its components."""
    weights = truth.weights.double()[:, None, None]
    mean = (weights * truth.means.double()).sum((0, 1))
    squares = truth.means.double() ** 2 + truth.covariances.double().diagonal(dim1=1, dim2=2)[:, None]
    return mean, ((weights * squares).sum((0, 1)) - mean**2).sqrt()


@pytest.mark.parametrize(
    ("classes", "mean", "std"),
    [
        ("AB", (-0.00014, 0.00057), (0.49985, 0.49990)),
        ("A", (0.37185, 0.36461), (0.33306, 0.34149)),
    ],
)
def test_moments_of_the_specification(classes: str, mean: tuple[float, float], std: tuple[float, float]) -> None:
    for measured, expected in zip(moments(TreeMixture(classes)), (mean, std), strict=True):
        torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=6e-6)


def test_components_of_the_specification(truth: TreeMixture) -> None:
    assert truth.weights.numel() * 8 == 1016
    assert truth.weights.sum().item() * 8 == pytest.approx(1, abs=1e-6)
    assert truth.weights[0].item() == pytest.approx(0.03214953, abs=6e-9)
    assert truth.means[0, 0].tolist() == pytest.approx([0.0213441, 0.0633343], abs=6e-8)
    expected = [3.46760e-4, 1.03578e-4, 1.03578e-4, 3.85146e-4]
    assert truth.covariances[0].flatten().tolist() == pytest.approx(expected, abs=6e-10)
    assert truth.means[-1, -1].tolist() == pytest.approx([0.4817639, -0.5965598], abs=6e-8)
    assert TreeMixture("B").means[-1, -1].tolist() == pytest.approx([-0.4932548, 0.5585267], abs=6e-8)
    assert outline_level(truth) == pytest.approx(2.9010 - 4.4944, abs=2e-4)  # that maximum is of a grid
    with pytest.raises(UserError, match="must be 'A', 'B' or 'AB', got 'C'"):
        TreeMixture("C")


@pytest.mark.parametrize("classes", ["A", "AB"])
def test_density_and_score(classes: str) -> None:
    """Against torch's own Gaussians and autograd, in double precision."""
    truth = TreeMixture(classes)
    sigma = torch.tensor([0.0, 0.002, 0.01, 0.05, 0.2, 1, 5]).repeat(8)
    x = truth.sample(len(sigma), sigma)
    x[-7:] += 0.3  # off the mass as well
    weights, means, covariances = truth.weights.double(), truth.means.double(), truth.covariances.double()
    smoothed = covariances + sigma.double()[:, None, None, None] ** 2 * torch.eye(2, dtype=torch.float64)
    components = torch.distributions.MultivariateNormal(means, smoothed[:, :, None].expand(-1, -1, 8, -1, -1))
    points = x.double().requires_grad_()
    log_p = (components.log_prob(points[:, None, None]) + weights.log()[:, None]).flatten(1).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), points)
    # float32 at its points: relative to the scale of the score, 1 / (the smallest deviation around the point).
    scale = 1 / (sigma.double() ** 2 + covariances.diagonal(dim1=1, dim2=2).min()).sqrt()
    assert (truth.log_density(x, sigma) - log_p).abs().max() <= 1e-4 * log_p.abs().max().clamp(min=1)
    assert ((truth.score(x, sigma) - score).abs().amax(1) / scale).max() <= 1e-3 * (score.abs().amax(1) / scale).max()


def test_sampling_the_truth(truth: TreeMixture) -> None:
    points = truth.sample(200_000, 0.3)
    mean, std = moments(truth)
    torch.testing.assert_close(points.double().mean(0), mean, rtol=0, atol=0.006)
    torch.testing.assert_close(points.double().std(0), (std**2 + 0.3**2).sqrt(), rtol=0, atol=0.006)
    row = measure("direct", truth.sample(16384), truth)
    assert row.inside == pytest.approx(0.987, abs=0.004)
    assert row.median_log_p == pytest.approx(1.45, abs=0.04)


def test_exact_score_sampling_is_inside_the_outline(truth: TreeMixture) -> None:
    points = draw(truth, 1500, torch.Generator().manual_seed(0), exact_denoiser(truth))
    row = measure("exact", points, truth)
    assert row.inside == pytest.approx(0.988, abs=0.012)
    assert row.mean == pytest.approx((0.372, 0.369), abs=0.04)
    assert row.std == pytest.approx((0.333, 0.346), abs=0.03)


def test_naive_truncation_of_the_exact_score_collapses(truth: TreeMixture) -> None:
    denoise = scaled_scores(exact_denoiser(truth), 1.4)
    row = measure("truncated", draw(truth, 500, torch.Generator().manual_seed(0), denoise), truth)
    assert row.inside > 0.995
    assert max(row.std) < 0.34 / 2.5


def test_sizes_of_the_models() -> None:
    assert sum(param.numel() for param in ToyModel(RECIPES["main"].width).parameters()) == 16_641
    assert sum(param.numel() for param in ToyModel(RECIPES["autoguide"].width).parameters()) == 4_225
    assert [learning_rate(iteration) for iteration in (0, 512, 2048)] == pytest.approx([0.01, 0.01, 0.005])


def test_energy_model_by_hand(backend: str) -> None:
    """Eq. 14 of the autoguidance paper written out, its gradient by differences, its second-order gradients."""
    model = ToyModel(8).double().eval()
    model.gain.data.fill_(-0.5)
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    scaled = x / (sigma**2 + 0.25).sqrt()[:, None]
    h = torch.cat([scaled, sigma.log()[:, None] / 4, torch.ones(5, 1)], dim=1)
    for index, layer in enumerate(model.layers):
        h = torch.nn.functional.silu(h) / 0.596 if index else h
        rms = layer.weight.square().mean(1, keepdim=True).sqrt()
        h = h @ (layer.weight / (rms + 1e-4) / layer.weight.shape[1] ** 0.5).T
    expected = -0.5 * h.square().mean(1) / sigma - scaled.square().sum(1) / 2
    torch.testing.assert_close(model(x, sigma), expected, rtol=1e-6, atol=1e-6)

    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    numeric = torch.stack([(model(x + d, sigma) - model(x - d, sigma)) / 2e-5 for d in step], dim=1)
    torch.testing.assert_close(model.score(x, sigma), numeric, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.denoise(x, torch.tensor(0.3)), x + 0.09 * model.score(x, torch.tensor(0.3)))

    target = torch.randn(5, 2, dtype=torch.float64)
    weight = model.layers[1].weight
    score_matching_loss(model, x, sigma, target, training=True).backward()
    gradient = weight.grad[2, 3].item()
    changed = []
    for change in (1e-5, -1e-5):
        with torch.no_grad():
            weight[2, 3] += change
        changed.append(score_matching_loss(model, x, sigma, target).item())
        with torch.no_grad():
            weight[2, 3] -= change
    assert gradient == pytest.approx((changed[0] - changed[1]) / 2e-5, rel=1e-5)


def test_short_training_learns(truth: TreeMixture) -> None:
    generator = torch.Generator().manual_seed(5)
    batch = noisy_batch(truth, 2048, generator)
    untrained = float(score_matching_loss(ToyModel(32), *batch))
    model = train(Recipe("A", 32, 20), seed=4)  # from g = 0, this one would come to 0.1
    assert not model.training
    assert float(model.gain) < -0.03
    assert float(score_matching_loss(model, *batch)) < 0.85 * untrained
    rms = torch.stack([layer.weight.square().mean(1).sqrt().mean() for layer in model.layers])
    torch.testing.assert_close(rms, torch.ones(5), rtol=0, atol=0.05)


def test_thinned_points_keep_their_distance() -> None:
    points = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)).numpy()
    taken = torch.from_numpy(thinned(points, 0.1))
    assert (torch.cdist(taken, taken) + torch.eye(len(taken))).min() >= 0.1
    assert torch.cdist(torch.from_numpy(points).double(), taken).min(dim=1).values.max() < 0.1


def test_run_writes_everything_and_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    outdir = tmp_path / "toy"
    outdir.mkdir()
    (outdir / ".main.safetensors.123.tmp").touch()  # of a killed process
    monkeypatch.setattr(toy_main, "LOSS_BATCHES", 1)
    rows = run(outdir, samples=64, pixels=60, recipes=SHORT, log=lines.append)
    assert [row.name for row in rows][:4] == ["direct samples", "exact score", "no guidance", "autoguide alone"]
    assert sorted(path.name for path in outdir.glob("[!.]*")) == sorted(
        ["toy.png", "toy.md", *(f"{name}.safetensors" for name in SHORT)]
    )
    with Image.open(outdir / "toy.png") as figure:
        assert figure.width == 2000
    assert "| autoguidance w=3 |" in (outdir / "toy.md").read_text()
    assert "main: score-matching loss" in lines[0]

    path, recipe = outdir / "main.safetensors", SHORT["main"]
    monkeypatch.setattr(toy_main, "train", None)
    stored = trained_model(path, recipe, 0, "main")
    assert not stored.training
    with pytest.raises(UserError, match="holds another model"):
        trained_model(path, recipe, 1, "main")
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"main\.safetensors is damaged"):
        trained_model(path, recipe, 0, "main")


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    result = CliRunner().invoke(main, ["--outdir", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds something else (thesis.tex)" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_help() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert all(param.opts[0] in result.output for param in main.params)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Row]:
    rows = run(tmp_path_factory.mktemp("toy") / "out", log=lambda line: None)
    return {row.name: row for row in rows}


@pytest.mark.slow
def test_the_table_of_the_specification(table: Mapping[str, Row]) -> None:
    """Spec 11.5, with the full training: what guidance does, in figures."""
    direct, exact, plain = (table[name] for name in ("direct samples", "exact score", "no guidance"))
    assert direct.inside == pytest.approx(0.987, abs=0.004)
    assert exact.inside == pytest.approx(0.988, abs=0.005)
    assert exact.mean_log_p == pytest.approx(1.37, abs=0.05)
    assert 0.80 < plain.inside < exact.inside - 0.05
    assert table["autoguide alone"].inside < plain.inside - 0.05
    for name in ("autoguidance w=2", "autoguidance w=3"):
        assert table[name].inside > plain.inside + 0.015
        assert table[name].mean == pytest.approx(exact.mean, abs=0.06)
        assert table[name].std == pytest.approx(exact.std, abs=0.06)
    cfg, naive = table["CFG w=4"], table["scores × 1.40"]
    assert all(0.15 < guided - unguided < 0.45 for guided, unguided in zip(cfg.mean, exact.mean, strict=True))
    assert naive.inside > 0.99
    assert all(2.7 < wide / narrow < 4.7 for wide, narrow in zip(exact.std, naive.std, strict=True))
