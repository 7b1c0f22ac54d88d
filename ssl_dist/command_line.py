"""The command line: commands are functions that name their arguments, and imports that cost seconds wait for them."""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ssl_dist import __version__
from ssl_dist.errors import one_line

EXIT_CODES = (
    "exit codes: 0 done; 2 your mistake, one line says which; 75 stopped on request after a checkpoint, run the same "
    "command again; 1 a fault."
)
Action = Callable[[argparse.Namespace], int | None]  # returns the exit code; None: 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    parsed, unparsed = parser.parse_known_args(words)
    # argparse takes no positional arguments after an option; overrides and one that is optional may stand anywhere.
    if len(unparsed) == 1 and not unparsed[0].startswith("-") and not hasattr(parsed, "overrides"):
        words.remove(unparsed[0])
        first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        parsed, unparsed = parser.parse_known_args([*words[:first], *unparsed, *words[first:]])
    if unparsed:
        if any("=" not in word or word.startswith("-") for word in unparsed) or not hasattr(parsed, "overrides"):
            parser.error(f"unknown argument: {' '.join(unparsed)}")
        parsed.overrides += unparsed
    return parsed


Argument = tuple[str, dict[str, Any]]  # what `ArgumentParser.add_argument` is given
_COMMANDS: list[tuple[str, str, tuple[Argument, ...], Action]] = []  # in the order of --help


def home_path(text: str) -> Path:
    """Of `--out=~/x` no shell makes a home."""
    return Path(os.path.expanduser(text))


def argument(name: str, help: str | None = None, **options: Any) -> Argument:
    return name, {"help": help, **options}


def command(name: str, help: str, *arguments: Argument) -> Callable[[Action], Action]:
    """Make the function below it a command of the program; its docstring is the description."""

    def add(action: Action) -> Action:
        _COMMANDS.append((name, help, arguments, action))
        return action

    return add


def names() -> list[str]:
    """The commands, in the order of --help."""
    return [name for name, *_ in _COMMANDS]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "ssl-dist",
        description="Pre-train an image backbone without labels, on one process or many, and evaluate it.",
        epilog="A first run: ssl-dist quickstart. " + EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"ssl-dist {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, help, arguments, action in _COMMANDS:
        parser_of_command = commands.add_parser(name, help=help, description=action.__doc__, epilog=EXIT_CODES)
        parser_of_command.set_defaults(action=action)
        for word, options in arguments:
            parser_of_command.add_argument(word, **options)
    return parser


@contextmanager
def importing() -> Iterator[None]:
    """Import without the garbage collector, which would take a fifth of the time and find nothing. It leaves alone what
    was imported until the process ends, when some libraries want to be collected."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)
