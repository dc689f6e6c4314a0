"""What the commands share: errors as messages, and options that several of them have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import torch

Decorator = Callable[[Any], Any]


@contextmanager
def reported(when_interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors that a person can act on into a message without a traceback."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"not enough GPU memory; try a smaller --batch ({error})") from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException(when_interrupted) from None


def decorated(command: Any, options: Sequence[Decorator]) -> Any:
    """The command with these options, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def device_options(batch: int) -> Decorator:
    """--batch, by default so many images, and --device."""
    options = [
        click.option("--batch", type=click.IntRange(min=1), default=batch, help="Images at a time, in each process."),
        click.option("--device", help="Such as cpu, cuda, cuda:1.  [default: cuda if there is one, else cpu]"),
    ]
    return lambda command: decorated(command, options)
