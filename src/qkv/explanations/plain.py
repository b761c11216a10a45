"""Explanations as plain values and back: dicts, lists, numbers and texts, for JSON and for other programs.

An object is its fields by name, as `explanation.py` documents them; an array is nested lists. Numbers are
written with as many digits as their precision needs, so that what comes back is what went, to the bit.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from qkv.errors import InputError
from qkv.explanations.explanation import Explanation


def to_json(explanation: Explanation) -> str:
    """All values of an explanation as JSON."""
    return json.dumps(to_plain(explanation), ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Explanation:
    """What `to_json` wrote. Raises InputError if the text is anything else."""
    try:
        made = _read(Explanation, json.loads(text), "")
    except ValueError as error:
        raise InputError(f"this is not an explanation in JSON: {error}") from None
    assert isinstance(made, Explanation)
    return made


def to_plain(value: Any) -> Any:
    """Any part of an explanation as plain values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return [to_plain(part) for part in value]  # as decimals a number takes a hundred bytes for a moment
    if isinstance(value, np.ndarray):
        # The shortest decimals that give the same float16 or float32, not their digits as float64.
        exact = value.astype(str).astype(np.float64) if value.dtype.kind == "f" else value
        return exact.tolist()
    if isinstance(value, Mapping):
        return {name: to_plain(one) for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if isinstance(value, (tuple, list)):
        return [to_plain(one) for one in value]
    return value


def _read(kind: Any, value: Any, place: str) -> Any:
    """A value of the annotated kind. Raises ValueError that names the place of what does not fit."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (only,) = [one for one in inner if one is not type(None)]
        return None if value is None else _read(only, value, place)
    if origin is Literal:
        return _checked(value, value in inner, place, f"one of {', '.join(inner)}")
    if origin is np.ndarray:
        return _array(get_args(inner[1])[0], value, place)
    if origin is tuple:
        _checked(value, isinstance(value, list), place, "a list")
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        _checked(value, len(kinds) == len(value), place, f"a list of {len(kinds)}")
        return tuple(_read(k, v, f"{place}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None:  # a mapping from texts
        _checked(value, isinstance(value, dict), place, "an object")
        return {name: _read(inner[1], one, f"{place}.{name}") for name, one in value.items()}
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        _checked(value, isinstance(value, dict), place, "an object")
        hints = get_type_hints(kind)
        names = [one.name for one in fields(kind)] if is_dataclass(kind) else list(kind._fields)
        _checked(value, value.keys() == set(names), place, f"an object of {', '.join(names)}")
        return kind(**{n: _read(hints[n], value[n], f"{place}.{n}".lstrip(".")) for n in names})
    if kind is float and type(value) is int:
        return float(value)
    return _checked(value, type(value) is kind, place, kind.__name__)


def _array(dtype: type[np.generic], value: Any, place: str) -> np.ndarray:
    try:
        array = np.array(value)
        fits = array.dtype.kind in "iuf" or array.size == 0
    except ValueError:  # rows of different lengths
        array, fits = np.empty(0), False
    numbers: np.ndarray = _checked(array, fits, place, "lists of numbers of one shape")
    return numbers.astype(dtype)


def _checked(value: Any, fits: bool, place: str, expected: str) -> Any:
    if not fits:
        raise ValueError(f"{place or 'it'} should be {expected}")
    return value
