"""Command line of post-hoc EMA: ``python -m python_train.reconstruct`` and its commands ``plan`` and ``search``."""

from __future__ import annotations

import sys

from python_train.reconstruct import command

_NAME = "python -m python_train.reconstruct"


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names, or the reconstruction itself."""
    if arguments[:1] == ["plan"]:
        from python_train.reconstruct import plan

        plan.main(arguments[1:], prog_name=f"{_NAME} plan")
    elif arguments[:1] == ["search"]:
        from python_train.reconstruct import search

        search.main(arguments[1:], prog_name=f"{_NAME} search")
    else:
        command.main(arguments, prog_name=_NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
