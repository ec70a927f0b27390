"""Errors that the user can fix, which are reported in one line, and argparse types that raise them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """An error that the user can fix, such as a wrong path, an unknown name or a damaged file.

    The message states what is wrong, where, and how to fix it. Scripts print it on one line and exit with code 2. Every
    other exception is a bug and keeps its traceback.
    """


@contextlib.contextmanager
def require(*packages: str, install: str) -> Iterator[None]:
    """Import optional packages; a missing one becomes a UserError that says how to install it.

    Args:
        packages: names of modules, also of modules that the block imports.
        install: the requirements file that lists them.
    """
    try:
        for package in packages:
            importlib.import_module(package)
        yield
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; run: pip install -r {install}") from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" if a known name is close to `name`, otherwise the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def look_up(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return `known[name]`. Raises UserError for an unknown name, with the nearest or all known ones."""
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}{suggestion(name, known)}")
    return known[name]


def join_names(names: Sequence[str], limit: int = 5) -> str:
    """Join the first `limit` names, followed by the number of those omitted."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def count(number: int, noun: str) -> str:
    """Return for example "1 image" or "2 images". The names of classes get no "s" where one would be wrong."""
    takes_s = noun[-1:].isascii() and noun[-1:].isalpha() and not noun.endswith("s")
    ending = "es" if noun == "class" else "s" if takes_s else ""
    return f"{number} {noun}{ending if number != 1 else ''}"


def integer(minimum: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


def fraction(text: str) -> float:
    """Argparse type for numbers from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:  # false for NaN
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Parse "480x640" into (height, width), and "640" into a number. Raises UserError for any other text."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--size {text}: expected HxW or one number, for instance 480x640 or 640")
    return (int(sides[0]), int(sides[1])) if len(sides) == 2 else int(sides[0])


def fraction_or_best(text: str) -> float | str:
    """Argparse type for numbers from 0 to 1, and the word "best"."""
    return text if text == "best" else fraction(text)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises UserError for invalid arguments, instead of printing the usage and exiting."""

    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        hint = f"did you mean {close[0]}? " if close and message.startswith("unrecognized") else ""
        raise UserError(f"{message} ({hint}see --help)")


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its return value (None: 0), 2 after a UserError, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe with a narrow encoding, such as cp1252, gets escapes instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    # A reference cycle can keep Gloo's process group alive. If the interpreter ends first, Gloo's threads abort.
    gc.collect()
    sys.exit(code)
