"""How error messages show a value: on one line, short, and never truncated to something that reads as another value."""

from __future__ import annotations

import math
import operator
from collections.abc import Sized

from torch import Tensor

_LONGEST = 80  # characters


def shown(value: object) -> str:
    """The repr of `value`, or a description if that is too long: "an int of 5001 digits", "a list of 5000 elements"."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"{'a negative' if value < 0 else 'an'} int of {_digits(abs(value))} digits"
    if isinstance(value, Tensor) and value.is_nested:  # it has no shape
        return f"a nested {type(value).__name__}"
    if isinstance(value, Tensor) and value.dim():
        return f"{kind_of(value)} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if (isinstance(value, Sized) and _length(value) <= _LONGEST) or not isinstance(value, Sized):
        text = _repr(value)
        if text and len(text) <= _LONGEST and text.isprintable():
            return text
    if isinstance(value, (str, bytes)):
        return f"{kind_of(value)} of {len(value)} characters that begins with {value[:20]!r}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{kind_of(value)} of shape {value.shape} and dtype {value.dtype}"
    if not isinstance(value, Sized):
        return kind_of(value)
    return f"{kind_of(value)} of {_length(value)} element{'s' if _length(value) != 1 else ''}"


def kind_of(value: object) -> str:
    """The name of the type of `value` with its article: "an int", "a Tensor", "an ndarray"."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' or name == 'ndarray' else 'a'} {name}"


def to_int(value: object) -> str:
    """The end of a message: how to convert a value that should be an int, or "" if that is unclear."""
    if isinstance(value, float):
        return ": convert it with int()" if value.is_integer() else ""
    try:
        operator.index(value)  # type: ignore[arg-type]  # raises for non-integers
    except Exception:
        return ""
    return "" if isinstance(value, int) else ": convert it with int()"


def _repr(value: object) -> str | None:
    try:
        return repr(value)
    except Exception:  # for example an int with very many digits
        return None


def _length(value: Sized) -> int:
    try:
        return len(value)
    except Exception:  # for example a 0-dimensional array
        return 0


def _digits(value: int) -> int:
    digits = int(math.log10(value)) + 1  # may be off by one near a power of 10
    return digits + (value >= 10**digits) - (value < 10 ** (digits - 1))
