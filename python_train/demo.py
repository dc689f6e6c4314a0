"""What the no-argument run does after training: pick an EMA length, draw digits, check that they are good and new."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from python_train import UserError
from python_train.checkpoint import snapshot_name, write_text
from python_train.config import PRESETS
from python_train.data import DIGITS, Encoder, open_dataset, open_encoder
from python_train.generate import generate_batch
from python_train.guidance import Guide
from python_train.loss import EDM2Loss
from python_train.metrics import estimate_kid
from python_train.network import Precond
from python_train.pictures import SweepPoint, image_grid, plot_ema_sweep, plot_loss, read_stats, save_png
from python_train.reconstruct import Reconstruction, Snapshot, find_snapshots, reconstruct

SIGMA_RELS = (0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
NEEDED_ACCURACY, AIMED_ACCURACY = 0.95, 0.97
SWEEP_SEED, FINAL_SEED = 100_000, 0
BATCH = 250
# Autoguidance by the same network at a tenth of its training, averaged over a longer time: it costs no training.
GUIDE_TIME, GUIDE_SIGMA_REL, GUIDANCE = 0.1, 0.10, 1.5
KID_COMPONENTS = 50
PICTURES = ("grid-samples.png", "grid-pixels.png", "grid-nearest.png", "grid-guided.png", "ema-sweep.png", "loss.png")


def to_features(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Rows of pixel values 0..16, scikit-learn's own scale of the digits, from uint8 images [N,1,8,8]."""
    return images.reshape(len(images), -1) * (16 / 255)


class DigitJudge:
    """A support vector machine trained on all real digits; ``held_out_accuracy`` is from 5-fold cross-validation."""

    def __init__(self, features: NDArray[np.float64], classes: NDArray[np.int64]) -> None:
        self.held_out_accuracy = float(cross_val_score(SVC(gamma=0.001), features, classes, cv=5).mean())
        self.machine = SVC(gamma=0.001).fit(features, classes)

    def accuracy(self, features: NDArray[np.float64], classes: NDArray[np.int64]) -> float:
        """Fraction of the images that it takes for the class given."""
        return float((self.machine.predict(features) == classes).mean())


def distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> Tensor:
    """Euclidean distances [rows of a, rows of b]; exactly 0 between equal rows, as a matrix product would not give."""
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist")


def nearest(features: NDArray[np.float64], real: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to, and index of, the nearest row of ``real`` for each row of ``features``."""
    values, indices = distances(features, real).min(dim=1)
    return values.numpy(), indices.numpy()


def nearest_other(real: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance from each row to the nearest other row."""
    return distances(real, real).fill_diagonal_(torch.inf).min(dim=1).values.numpy()


def generate_classes(
    net: Precond,
    encoder: Encoder,
    per_class: int,
    first_seed: int,
    num_steps: int,
    progress: tqdm,
    guide: Guide | None = None,
    seeds_per_class: int | None = None,
) -> NDArray[np.uint8]:
    """``per_class`` images of every class, class by class: uint8 [classes * per_class, C, H, W].

    Each class has ``seeds_per_class`` seeds (None = as many as images), of which it takes the first ones.
    """
    classes = np.repeat(np.arange(net.label_dim), per_class)
    seeds = first_seed + classes * (seeds_per_class or per_class) + np.tile(np.arange(per_class), net.label_dim)
    guides = [] if guide is None else [guide]
    images = []
    with net.baked():
        for start in range(0, len(classes), BATCH):
            chunk = slice(start, start + BATCH)
            drawn = generate_batch(
                net, encoder, seeds[chunk].tolist(), classes[chunk].tolist(), guides=guides, num_steps=num_steps
            )
            images.append(drawn.cpu().numpy())
            progress.update(len(drawn))
    return np.concatenate(images)


def early_guide(snapshots: Sequence[Snapshot]) -> Reconstruction:
    """The network that guides: the run's own, near `GUIDE_TIME` of its training, with the EMA length
    `GUIDE_SIGMA_REL`."""
    times = sorted({snapshot.nimg for snapshot in snapshots if snapshot.nimg > 0})
    nimg = min(times, key=lambda time: abs(time - GUIDE_TIME * times[-1]))
    (result,) = reconstruct(snapshots, [GUIDE_SIGMA_REL], nimg)
    return result


def objective(net: Precond, loss: EDM2Loss, images: Tensor, labels: Tensor) -> float:
    """Mean training loss of images [N,C,H,W] with the same noise for every network."""
    generator = torch.Generator().manual_seed(0)
    sigma = loss.sigma(torch.randn(len(images), 1, 1, 1, generator=generator)).to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    with torch.no_grad():
        return float(loss.at(net, images, labels, sigma, noise).mean())


@dataclass(frozen=True)
class Verdict:
    """How good and how new the generated images are; distances are between vectors of pixel values 0..16."""

    sigma_rel: float
    images: int
    accuracy: float  # taken for the class asked for by the judge
    judge_held_out_accuracy: float  # the judge's own, on real digits that it was not trained on
    nearest_median: float  # generated to nearest real
    nearest_minimum: float
    real_nearest_median: float  # real to nearest other real
    close_threshold: float  # 1 % of the real digits have another one closer than this
    close_fraction: float  # of the generated: nearest real one closer than that
    copies: int  # generated images equal to a real one


@dataclass(frozen=True)
class Comparison:
    """Images with autoguidance beside those of the same noise and classes without."""

    guide_nimg: int
    weight: float
    images: int
    accuracy: float
    unguided_accuracy: float
    nearest_median: float
    unguided_nearest_median: float


def judge_images(
    sigma_rel: float,
    generated: NDArray[np.float64],
    classes: NDArray[np.int64],
    real: NDArray[np.float64],
    judge: DigitJudge,
) -> Verdict:
    """Classify generated rows of pixel values; compare their distances to the real ones with those among the real."""
    to_real = nearest(generated, real)[0]
    among_real = nearest_other(real)
    threshold = float(np.quantile(among_real, 0.01))
    return Verdict(
        sigma_rel=sigma_rel,
        images=len(generated),
        accuracy=judge.accuracy(generated, classes),
        judge_held_out_accuracy=judge.held_out_accuracy,
        nearest_median=float(np.median(to_real)),
        nearest_minimum=float(to_real.min()),
        real_nearest_median=float(np.median(among_real)),
        close_threshold=threshold,
        close_fraction=float((to_real < threshold).mean()),
        copies=int((to_real == 0).sum()),
    )


def describe(verdict: Verdict) -> list[str]:
    """The figures in words, one line each."""
    return [
        f"class accuracy of {verdict.images} generated digits: {100 * verdict.accuracy:.1f} % "
        f"(needs {100 * NEEDED_ACCURACY:g} %, aim {100 * AIMED_ACCURACY:g} %; "
        f"the classifier's own on held-out real digits: {100 * verdict.judge_held_out_accuracy:.1f} %)",
        f"nearest real digit, median distance: {verdict.nearest_median:.1f} from a generated digit, "
        f"{verdict.real_nearest_median:.1f} from another real digit",
        f"closer than {verdict.close_threshold:.1f}, as 1 % of the real digits are to another: "
        f"{100 * verdict.close_fraction:.1f} % of the generated; exact copies: {verdict.copies}",
    ]


def describe_guided(comparison: Comparison) -> str:
    """The same for autoguidance."""
    return (
        f"autoguided by itself at {comparison.guide_nimg // 1000}k images, weight {comparison.weight:g}: "
        f"{comparison.images} digits, class accuracy {100 * comparison.accuracy:.1f} % "
        f"({100 * comparison.unguided_accuracy:.1f} % of the same noise without), median distance to the nearest real "
        f"digit {comparison.nearest_median:.1f} ({comparison.unguided_nearest_median:.1f})"
    )


def rows_of_classes(images: NDArray[np.uint8], num_classes: int, columns: int) -> NDArray[np.uint8]:
    """The first ``columns`` images of each class as [classes, columns, C, H, W], from images ordered by class."""
    return images.reshape(num_classes, -1, *images.shape[1:])[:, :columns]


def finish(
    run_dir: Path,
    device: str | torch.device = "cpu",
    *,
    sigma_rels: Sequence[float] = SIGMA_RELS,
    sweep_per_class: int = 20,
    sweep_steps: int = 12,
    final_per_class: int = 50,
    final_steps: int = 32,
    guided_per_class: int = 8,
    log: Callable[[str], None] = click.echo,
) -> Verdict:
    """Turn a finished training run on the digits into pictures and figures, in run_dir.

    Reconstructs the EMA lengths ``sigma_rels``, generates ``sweep_per_class`` digits a class with each, and keeps the
    one with the lowest loss as a snapshot (accuracies and KID differ by less than so few images can tell). Draws
    ``final_per_class`` digits a class from it with other seeds, judges them, and draws ``guided_per_class`` of them
    again with autoguidance. Writes `PICTURES` and ``report.json``.

    Raises UserError if the run has no snapshots, or, after writing everything, if fewer than 95 % of the generated
    digits are taken for the class asked for.
    """
    run_dir = Path(run_dir)
    snapshots = find_snapshots(run_dir)
    encoder = open_encoder(snapshots[-1].header["encoder"])
    images, labels = open_dataset(DIGITS).load_all()
    real, real_classes = to_features(images.numpy()), labels.argmax(dim=1).numpy()
    judge = DigitJudge(real, real_classes)
    clean, labels = encoder.encode(images).to(device), labels.to(device)
    loss = EDM2Loss(PRESETS[DIGITS]["P_mean"], PRESETS[DIGITS]["P_std"])
    num_classes = labels.shape[1]
    # Whitened principal components: in pixels, where the few large ones rule, all lengths look as good as real digits.
    components = PCA(KID_COMPONENTS, whiten=True).fit(real)
    real_components = torch.from_numpy(components.transform(real))

    sweep: list[SweepPoint] = []
    per_network = sweep_per_class * num_classes
    with tqdm(total=len(sigma_rels) * per_network, desc="EMA lengths", unit="image") as progress:
        for candidate in reconstruct(snapshots, sigma_rels):
            net = candidate.net.to(device)
            drawn = generate_classes(net, encoder, sweep_per_class, SWEEP_SEED, sweep_steps, progress)
            features = to_features(drawn)
            accuracy = judge.accuracy(features, np.repeat(np.arange(num_classes), sweep_per_class))
            distance = float(np.median(nearest(features, real)[0]))
            value = objective(net, loss, clean, labels)
            kid = estimate_kid(torch.from_numpy(components.transform(features)), real_components)
            point = SweepPoint(candidate.sigma_rel, value, accuracy, len(drawn), distance, kid.value, kid.std or 0.0)
            sweep.append(point)
            if value <= min(point.loss for point in sweep):
                chosen = candidate
    snapshot_path = run_dir / snapshot_name(chosen.nimg, chosen.sigma_rel, "phema")
    chosen.save(snapshot_path)

    with tqdm(total=final_per_class * num_classes, desc="final digits", unit="image") as progress:
        generated = generate_classes(chosen.net, encoder, final_per_class, FINAL_SEED, final_steps, progress)
    features = to_features(generated)
    classes = np.repeat(np.arange(num_classes), final_per_class)
    verdict = judge_images(chosen.sigma_rel, features, classes, real, judge)

    guide = early_guide(snapshots)
    with (
        tqdm(total=guided_per_class * num_classes, desc="autoguided digits", unit="image") as progress,
        guide.net.to(device).baked(),
    ):
        guided = generate_classes(
            chosen.net, encoder, guided_per_class, FINAL_SEED, final_steps, progress, Guide(guide.net, GUIDANCE),
            seeds_per_class=final_per_class,
        )  # fmt: skip
    same_noise = rows_of_classes(generated, num_classes, guided_per_class)
    unguided_features, guided_features = (to_features(x.reshape(-1, *guided.shape[1:])) for x in (same_noise, guided))
    guided_classes = np.repeat(np.arange(num_classes), guided_per_class)
    comparison = Comparison(
        guide_nimg=guide.nimg,
        weight=GUIDANCE,
        images=len(guided),
        accuracy=judge.accuracy(guided_features, guided_classes),
        unguided_accuracy=judge.accuracy(unguided_features, guided_classes),
        nearest_median=float(np.median(nearest(guided_features, real)[0])),
        unguided_nearest_median=float(np.median(nearest(unguided_features, real)[0])),
    )

    names = [str(digit) for digit in range(num_classes)]
    title = f"Generated digits after {chosen.nimg // 1000}k images, EMA length {chosen.sigma_rel:g}"
    samples = rows_of_classes(generated, num_classes, 10)
    save_png(run_dir / "grid-samples.png", image_grid(samples, names, f"{title} (smoothed)", smooth=True))
    save_png(run_dir / "grid-pixels.png", image_grid(samples, names, title))
    neighbours = images.numpy()[nearest(features, real)[1]]
    pairs = np.stack([generated, neighbours], axis=1)
    pairs = rows_of_classes(pairs, num_classes, 5).reshape(num_classes, -1, *generated.shape[1:])
    grid = image_grid(pairs, names, "Generated (left) and nearest real digit (right)", columns_per_group=2)
    save_png(run_dir / "grid-nearest.png", grid)
    both = np.concatenate([same_noise, rows_of_classes(guided, num_classes, guided_per_class)], axis=1)
    title = f"Without guidance (left), autoguided by itself at {guide.nimg // 1000}k images (right)"
    grid = image_grid(both, names, title, columns_per_group=guided_per_class, smooth=True)
    save_png(run_dir / "grid-guided.png", grid)
    plot_ema_sweep(run_dir / "ema-sweep.png", sweep, chosen.sigma_rel, NEEDED_ACCURACY, verdict.real_nearest_median)
    plot_loss(run_dir / "loss.png", read_stats(run_dir / "stats.jsonl"))
    figures = {
        "verdict": asdict(verdict),
        "autoguidance": asdict(comparison),
        "sweep": [asdict(point) for point in sweep],
        "snapshot": snapshot_path.name,
    }
    write_text(run_dir / "report.json", json.dumps(figures, indent=2) + "\n")

    for line in [*describe(verdict), describe_guided(comparison)]:
        log(line)
    log("pictures:")
    for name in PICTURES:
        log(f"  {run_dir / name}")
    if verdict.accuracy < NEEDED_ACCURACY:
        raise UserError(
            f"only {100 * verdict.accuracy:.1f} % of the generated digits are taken for the class asked for; "
            f"{100 * NEEDED_ACCURACY:g} % are needed"
        )
    return verdict
