"""The README's example runs as printed, and its commands take the options it names."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

README = Path(__file__).parents[1] / "README.md"


def _commands() -> list[str]:
    """Every command line of the README that runs one of our modules, with its continuations, without comments."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"-m ((?:python_train|edm2ext)\.[^`\n#]*)", text)


def test_there_are_commands() -> None:
    assert len(_commands()) > 25


@pytest.mark.parametrize("line", _commands())
def test_commands_have_the_options_that_are_named(line: str) -> None:
    module, *words = shlex.split(line.rstrip("'"))
    if module == "python_train.reconstruct":  # its three commands are files
        command = importlib.import_module(f"{module}.{words[0] if words[0] in ('plan', 'search') else 'command'}").main
    else:
        name = f"{module}.__main__" if importlib.util.find_spec(module).submodule_search_locations else module
        command = importlib.import_module(name).main
    if isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words[0]]
    assert isinstance(command, click.Command)
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    given = {word for word in words if re.fullmatch(r"--?[A-Za-z][\w-]*", word)}
    assert given <= known


def test_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
