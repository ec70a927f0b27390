"""A person's mistake, told in one line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something only the person at the keyboard can mend: a wrong path, an unknown name, a broken file.

    The message names the thing, says what is wrong with it and what to do. Scripts print it on one line and exit
    with code 2; every other exception is a bug and keeps its traceback.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" if one of the known names is close to `name`, otherwise the known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def run_main(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with what it returns or 0, with 2 after a UserError, with 130 after Ctrl-C."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
