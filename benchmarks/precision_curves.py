"""The same training run in each precision: ``python -m benchmarks.precision_curves DATA OUT.png [IMAGES] [CHANNELS]``.

Draws loss curves of fp32, bf16, fp16 with fixed loss scales and with a dynamic one, all of one seed, and the range of
fp32 runs of other seeds, and prints a table. On a CPU, where the program takes fp32 for fp16, float16 is forced here,
in plain torch.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from python_train import data, rng
from python_train.config import TrainOptions, make_options
from python_train.loop import build_network, network_channels
from python_train.network import Precond
from python_train.trainer import Trainer
from python_train.world import open_world

RUNS = {
    "fp32": ("fp32", 1.0),
    "bf16": ("bf16", 1.0),
    "fp16": ("fp16", 1.0),
    "fp16, loss scale 4": ("fp16", 4.0),
    "fp16, loss scale 1/4": ("fp16", 0.25),
    "fp16, dynamic loss scale": ("fp16", "dynamic"),
}
OTHER_SEEDS = (1, 2)
POINTS = 16


def losses(options: TrainOptions, dataset: data.Dataset, device: torch.device) -> list[float]:
    """Mean loss of each of POINTS equal parts of a run."""
    rng.reseed(options.seed, 0)
    channels = network_channels(dataset, dataset.encoder())
    net = build_network(options, dataset.resolution, channels, dataset.label_dim).to(device)
    trainer = Trainer(net, options, dataset.encoder())
    batches = data.batches(dataset, options.batch, data.IndexStream(dataset.num_images, options.seed), device)
    steps = options.duration // options.batch
    curve = []
    for point in range(POINTS):
        for _ in range(steps * point // POINTS, steps * (point + 1) // POINTS):
            trainer.step(batches)
        curve.append(trainer.mean_loss())
    return curve


def main() -> None:
    source, out = sys.argv[1], Path(sys.argv[2])
    images, channels = (
        int(sys.argv[3]) if len(sys.argv) > 3 else 24 * 1024,
        int(sys.argv[4]) if len(sys.argv) > 4 else 16,
    )
    with open_world() as world:
        device = world.device
    if device.type == "cpu":
        Precond._dtype_on = lambda self, device: self.compute_dtype
    dataset = data.open_dataset(source)
    dataset.preload()
    options = make_options("digits", data=source, model_channels=channels, batch=64, duration=images, decay=0,
                           rampup=images // 4)  # fmt: skip
    if dataset.resolution > 8:
        deeper = {"batch": 16, "channel_mult": (1, 2, 2), "attn_resolutions": (16,)}
        options = make_options("digits", **{**vars(options), **deeper})
    curves = {name: losses(make_options("digits", **{**vars(options), "precision": precision, "loss_scaling": scaling}),
                           dataset, device) for name, (precision, scaling) in RUNS.items()}  # fmt: skip
    seeds = [losses(make_options("digits", **{**vars(options), "seed": seed}), dataset, device) for seed in OTHER_SEEDS]
    fp32 = torch.tensor(curves["fp32"])
    noise = (torch.tensor(seeds) - fp32).square().mean().sqrt()
    about = f"{images:,} images in batches of {options.batch}, {channels} channels"
    print(f"{source}: {about}, on {device}, torch {torch.__version__}")
    print(f"two other seeds in fp32 differ from the first by {noise:.4f} (root mean square over {POINTS} points)")
    print("| run | last loss | RMS difference from fp32 | largest |\n|---|---|---|---|")
    for name, curve in curves.items():
        away = torch.tensor(curve) - fp32
        print(f"| {name} | {curve[-1]:.4f} | {away.square().mean().sqrt():.2g} | {away.abs().max():.2g} |")
    draw(out, curves, seeds, images, Path(source).stem)


def draw(out: Path, curves: dict[str, list[float]], seeds: list[list[float]], images: int, title: str) -> None:
    matplotlib.use("Agg")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    at = [images * (point + 0.5) / POINTS / 1000 for point in range(POINTS)]
    band = [[fold(*values) for values in zip(curves["fp32"], *seeds, strict=True)] for fold in (min, max)]
    axes.fill_between(at, *band, color="#cbd5e0", label="fp32, three seeds")
    for (name, curve), style in zip(curves.items(), ("-", "--", "-.", ":", (0, (3, 2)), (0, (1, 3))), strict=True):
        axes.plot(at, curve, linestyle=style, linewidth=1.2, label=name)
    lowest = min(value for curve in (*curves.values(), *seeds) for value in curve if math.isfinite(value))
    axes.set_ylim(top=max(curves["fp32"][1:]), bottom=lowest - 0.05 * abs(lowest))
    axes.set(title=title, xlabel="images seen (thousands)", ylabel="loss (mean per pixel)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
