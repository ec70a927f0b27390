"""Dataclass fields with limits, and the conversion of values to the types of fields."""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
from dataclasses import field
from typing import Any

from utils.errors import UserError, nearest

# Maximum of sizes and counts: far above any useful value, and small enough to avoid overflow.
LARGEST = 10**6


def limited(
    default: Any,
    *,
    minimum: float = 0,
    above: float | None = None,
    maximum: float = math.inf,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field with limits, which `check_field` applies to every number in the value.

    Args:
        default: the field's default value.
        minimum: inclusive lower limit, used unless `above` is given.
        above: exclusive lower limit.
        maximum: inclusive upper limit.
        below: exclusive upper limit.
        choices: the allowed strings; () allows any.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below, "choices": choices}
    return field(default=default, metadata=limits)


def check_field(item: dataclasses.Field[Any], value: Any) -> None:
    """Raise UserError unless every number in `value` is within the field's limits and strings are among its choices."""
    limits = item.metadata
    if not limits:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"unknown {item.name} {value!r}{nearest(str(value), limits['choices'])}")
    for number in _numbers(value):
        low = limits["minimum"] if limits["above"] is None else limits["above"]
        strict_low, below = limits["above"] is not None, limits["below"]
        too_low = number <= low if strict_low else number < low
        too_high = number > limits["maximum"] or (below is not None and number >= below)
        if math.isnan(number) or too_low or too_high:
            high = f" and less than {below:g}" if below is not None else f" and at most {limits['maximum']:g}"
            low_words = f"more than {low:g}" if strict_low else f"at least {low:g}"
            raise UserError(f"{item.name}: {number:g} is out of range; it must be {low_words}{high}")


def _numbers(value: Any) -> list[float]:
    """Return all numbers in a value, including those in nested tuples."""
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


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
