"""Forms: what a value read from JSON must look like. A form returns the value, or raises ValueError that names it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

#: (value, its place in the file) -> the value.
Form = Callable[[Any, str], Any]

# Beyond it a number of JSON is not exact in other readers, nor does it fit an integer tensor much further on.
_LARGEST = 2**53


def _refused(value: Any, where: str, wanted: str) -> ValueError:
    return ValueError(f"{where} must be {wanted}, got {reprlib.repr(value)}")


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _refused(value, where, "a text")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _refused(value, where, "true or false")
    return value


def whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _LARGEST:
        raise _refused(value, where, "a whole number")
    return value


def count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise _refused(value, where, "a whole number of 0 or more")
    return value


def number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300 or math.isnan(value):
        raise _refused(value, where, "a finite number")
    return value


def one_of(values: Collection[Any]) -> Form:
    def form(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in values:
            raise _refused(value, where, f"one of {', '.join(values)}")
        return value

    return form


def maybe(form: Form) -> Form:
    """Or null."""
    return lambda value, where: None if value is None else form(value, where)


def several(form: Form, at_least: int = 0, at_most: int = _LARGEST) -> Form:
    """A list."""

    def checked(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not at_least <= len(value) <= at_most:
            raise _refused(value, where, "a list" if not at_least else f"a list of {at_least} or more entries")
        return [form(one, f"{where}[{i}]") for i, one in enumerate(value)]

    return checked


def exactly(*forms: Form) -> Form:
    """A list of that length, each entry of its own form."""

    def checked(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) != len(forms):
            raise _refused(value, where, f"a list of {len(forms)} entries")
        return [form(one, f"{where}[{i}]") for i, (form, one) in enumerate(zip(forms, value, strict=True))]

    return checked


def named(form: Form) -> Form:
    """An object with any names."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refused(value, where, "an object")
        return {name: form(one, f"{where}.{name}") for name, one in value.items()}

    return checked


def fields(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """An object with these names and no others."""
    optional = optional or {}

    def checked(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refused(value, where, "an object")
        for name in required:
            if name not in value:
                raise ValueError(f"{where} lacks {name}")
        for name in value:
            if name not in required and name not in optional:
                raise ValueError(f"{where} has an unknown entry {reprlib.repr(name)}")
        forms = {**required, **optional}
        return {name: forms[name](one, f"{where}.{name}") for name, one in value.items()}

    return checked
