"""Convert values, such as the text of --set, to the types of dataclass fields."""

from __future__ import annotations

import ast
import typing
from typing import Any

from utils.errors import UserError


def convert(key: str, value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint`: int, float, bool, str, or tuples of these.

    Strings are parsed. Raises UserError, which names `key`, if the value cannot be converted without loss.
    """
    try:
        if typing.get_origin(hint) is tuple:
            return _convert_tuple(key, value, hint)
        if hint is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if isinstance(value, bool) != (hint is bool):
            raise ValueError
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        if hint is str and not isinstance(value, str):
            raise ValueError
        return hint(value)
    except (ValueError, TypeError, KeyError, SyntaxError, OverflowError, RecursionError, MemoryError):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
        shown = " ".join(repr(value).split())  # on one line
        shown = shown if len(shown) < 80 else f"{shown[:77]}..."
        raise UserError(f"configuration key {key!r}: {shown} is not a value of type {wanted}") from None


def _convert_tuple(key: str, value: Any, hint: Any) -> tuple[Any, ...]:
    item, *rest = typing.get_args(hint)
    if isinstance(value, str):  # "(16,), (32,)" or "person, dog"
        nested = value.lstrip()[:1] in ("(", "[")
        parts = [part.strip() for part in value.split(",") if part.strip()]
        value = ast.literal_eval(value) if nested else parts
    if not isinstance(value, (tuple, list)):
        raise ValueError
    value = tuple(convert(key, part, item) for part in value)
    if rest and rest[0] is not Ellipsis and len(value) != 1 + len(rest):
        raise ValueError
    return value
