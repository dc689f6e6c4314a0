"""Where a run's statistics and pictures go besides its log: TensorBoard, and Weights & Biases if asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from python_train import UserError
from python_train.config import TrainOptions


class Sink(Protocol):
    """Takes what is known after ``nimg`` images."""

    def write(self, nimg: int, stats: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``folder``. What an earlier process wrote after ``start`` images, or ever if that is 0, is hidden,
    and written again."""

    def __init__(self, folder: Path, start: int) -> None:
        logging.getLogger("tensorflow").setLevel(logging.ERROR)  # tensorboard's stand-in for it speaks of itself
        from torch.utils.tensorboard import SummaryWriter  # whose imports take a second

        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def write(self, nimg: int, stats: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        for name, value in stats.items():
            self.writer.add_scalar(name, value, nimg)
        for name, picture in pictures.items():
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), nimg, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the W&B ``project``, named after the run's directory and continued with it."""

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        wandb = import_wandb()
        self.image = wandb.Image
        name = run_dir.resolve().name
        self.run = wandb.init(project=project, name=name, id=name, resume="allow", dir=run_dir, config=dict(settings))

    def write(self, nimg: int, stats: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        finite = {name: value for name, value in stats.items() if math.isfinite(value)}
        self.run.log({**finite, **{name: self.image(picture) for name, picture in pictures.items()}}, step=nimg)

    def close(self) -> None:
        self.run.finish()


def import_wandb() -> Any:
    """The package wandb. Raises UserError where it is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package wandb: pip install 'edm2ext[wandb]'") from error
    return wandb


def open_sinks(options: TrainOptions, run_dir: Path, start: int) -> Sequence[Sink]:
    """The sinks that the options ask for, for a run that continues after ``start`` images."""
    sinks: list[Sink] = []
    if options.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", start))
    if options.wandb is not None:
        sinks.append(WeightsAndBiases(options.wandb, run_dir, options.to_json()))
    return sinks
