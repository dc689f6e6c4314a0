"""Command ``python -m python_train.toy``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from python_train import UserError
from python_train.checkpoint import atomic_write, write_text
from python_train.command_line import reported
from python_train.toy.distribution import TreeMixture
from python_train.toy.evaluate import Row, draw_all, format_table, measure
from python_train.toy.figure import draw_figure
from python_train.toy.model import RECIPES, Recipe, ToyModel, noisy_batch, score_matching_loss, train

LOSS_SEED, LOSS_BATCHES = 1234, 8


def trained_model(path: Path, recipe: Recipe, seed: int, name: str) -> ToyModel:
    """The model of a recipe, from its file if there is one, else trained and stored there. UserError if the file holds
    something else."""
    facts = {"recipe": list(recipe), "seed": seed}
    if not path.exists():
        with tqdm(total=recipe.iterations, desc=f"training {name}", unit="it") as progress:
            model = train(recipe, seed, progress=progress.update)
        blob = safetensors.torch.save(model.state_dict(), metadata={"toy": json.dumps(facts)})
        with atomic_write(path) as temporary:
            temporary.write_bytes(blob)
        return model
    model = ToyModel(recipe.width)
    try:
        with safetensors.safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("toy", "null"))
        if stored != facts:
            raise UserError(f"{path} holds another model ({stored}, not {facts}); choose another --outdir")
        model.load_state_dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to train this model again") from error
    return model.eval().requires_grad_(False)


def mean_loss(model: ToyModel, recipe: Recipe) -> float:
    """The score-matching loss over `LOSS_BATCHES` batches of 4096 that are the same for every model of a class."""
    truth, generator = TreeMixture(recipe.classes), torch.Generator().manual_seed(LOSS_SEED)
    losses = [score_matching_loss(model, *noisy_batch(truth, 4096, generator)) for _ in range(LOSS_BATCHES)]
    return float(torch.stack(losses).mean())


def run(
    outdir: Path,
    *,
    seed: int = 0,
    samples: int = 16384,
    pixels: int = 300,
    recipes: Mapping[str, Recipe] = RECIPES,
    log: Callable[[str], None] = click.echo,
) -> list[Row]:
    """Train the three models or load them, sample in all ways, write the table and the figure to outdir.

    ``pixels`` is the resolution of the figure's densities. Returns the rows of the table.

    Raises UserError if outdir holds anything but an earlier run's files.
    """
    names = {"toy.png", "toy.md", *(f"{name}.safetensors" for name in recipes)}
    found = [path.name for path in outdir.iterdir()] if outdir.exists() else []
    others = sorted(name for name in found if name not in names and not name.startswith("."))
    if others:
        raise UserError(f"{outdir} holds something else ({others[0]}); choose another --outdir")
    outdir.mkdir(parents=True, exist_ok=True)
    models = {name: trained_model(outdir / f"{name}.safetensors", recipes[name], seed, name) for name in recipes}
    for name, model in models.items():
        loss, gain = mean_loss(model, recipes[name]), float(model.gain)
        log(f"{name}: score-matching loss {loss:.4f} after {recipes[name].iterations} iterations, g {gain:.3f}")
    truth = TreeMixture("A")
    drawn, rows = {}, []
    for name, points in tqdm(draw_all(truth, models, samples, seed), desc="sampling", total=8):
        drawn[name] = points
        rows.append(measure(name, points, truth))
    table = format_table(rows)
    log(table)
    write_text(outdir / "toy.md", table + "\n")
    draw_figure(outdir / "toy.png", drawn, models, pixels)
    log(f"figure: {outdir / 'toy.png'}")
    return rows


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("runs/toy"), help="Folder for models, table "
              "and figure; models that are there are not trained again.")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Of training and sampling.")
@click.option("--samples", type=click.IntRange(min=2), default=16384, help="Points of each method.")
def main(outdir: Path, seed: int, samples: int) -> None:
    """Guidance in two dimensions, where everything is known exactly.

    Trains three small energy models on a CPU by exact score matching: the main one and an autoguide (smaller, less
    trained) on one class, and a guide on both classes. Samples with each kind of guidance, prints a table of the
    figures and draws toy.png (autoguidance paper, Appendix C). An iteration takes about 0.15 s of one core; there are
    4096 and twice 512.
    """
    with reported("interrupted; the same command continues with the models that are complete"):
        run(outdir, seed=seed, samples=samples)


if __name__ == "__main__":
    main()
