"""What the commands share: errors as messages, and options that several of them have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import torch

Decorator = Callable[[Any], Any]


def in_words(error: Exception) -> str:
    """The message of an error; of one that the system reports of a file, the file and why."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


@contextmanager
def reported(when_interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors that a person can act on into a message without a traceback."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"not enough GPU memory; try a smaller --batch ({error})") from error
    except (ValueError, OSError) as error:
        raise click.ClickException(in_words(error)) from error
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
