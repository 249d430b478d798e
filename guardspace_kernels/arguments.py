"""Checks of arguments that all public functions share: each names the argument, what it takes and what it got.

A check returns the value as plain Python, so that what NumPy computed is saved and hashed as what a user types.
"""

from __future__ import annotations

import math
import numbers
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_LONGEST = 80  # of a value in a message


def shown(value: Any) -> str:
    """A value in a message: what it is, never all of a tensor."""
    name = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape):
        return f"{name} of shape {tuple(value.shape)} and {value.dtype}"
    if callable(value) or type(value).__repr__ is object.__repr__:
        return name
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({name})"


def integer(name: str, value: Any, least: int | None = None) -> int:
    """TypeError unless it is a whole number, bool apart; ValueError below ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        wanted = "an integer" if least is None else f"an integer of {least} or more"
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return int(value)


def number(name: str, value: Any, wanted: str, valid: Callable[[Any], bool]) -> Any:
    """TypeError unless it is a real number, bool apart; ValueError unless it is finite and ``valid``."""
    plain = type(value) in (int, float)  # an optimiser asks at every step, and an abstract class answers slowly
    if not plain and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    if not (-math.inf < value < math.inf and valid(value)):
        raise ValueError(f"{name} must be {wanted}, got {value}")
    if plain:
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def boolean(name: str, value: Any) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's own is no bool
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def choice(name: str, value: Any, options: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}, got {shown(value)}")
    return value


def instance(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """TypeError unless it is one; ``wanted`` says what is, with its article."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")


def iterable(name: str, value: Any, wanted: str) -> None:
    """TypeError unless it can be gone through and is no text."""
    if isinstance(value, (str, bytes, type)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")


def path(name: str, value: Any) -> str:
    """TypeError unless it is a text or ``os.PathLike``; ValueError if it is empty."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path, a text or pathlib.Path, got {shown(value)}")
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a path, got {text!r}")
    return text


def readable_file(name: str, value: Any, kind: str) -> str:
    """The path of a file; FileNotFoundError or ValueError that says what of ``kind`` was expected."""
    text = path(name, value)
    if os.path.isdir(text):
        raise ValueError(f"{name}: {text} is a folder; give a file: {kind}")
    if not os.path.exists(text):
        raise FileNotFoundError(f"{name}: {text} does not exist; expected a file: {kind}")
    return text


def writable_file(name: str, value: Any) -> str:
    """The path of a file that can be written, its folders made where they are missing; tried, before hours of work."""
    text = path(name, value)
    if os.path.isdir(text) or text.endswith(os.sep):
        raise ValueError(f"{name}: {text} is a folder; give the name of a file in it")
    check_replaceable(name, text)
    _try_to_write(name, text, Path(text))
    return text


def check_replaceable(name: str, text: str) -> None:
    """ValueError for what a file of that name would replace: a device, a pipe, a link such as stdout's."""
    special = os.path.exists(text) and not os.path.isfile(text)
    if special or os.path.realpath(os.path.dirname(text)) == "/dev":
        raise ValueError(f"{name}: {text} is a device or a pipe, which a file would replace; give the name of a file")


def writable_folder(name: str, value: Any) -> str:
    """The same of a folder that files are written into."""
    text = path(name, value)
    if os.path.lexists(text) and not os.path.isdir(text):
        raise ValueError(f"{name}: {text} is a file; give a folder")
    _try_to_write(name, text, Path(text) / "file")
    return text


def _try_to_write(name: str, text: str, target: Path) -> None:
    """By a temporary file in the nearest folder that exists: permissions do not tell of what is mounted read-only."""
    folder = target.parent
    try:
        while not os.path.lexists(folder):
            folder = folder.parent
        # As long a name as a temporary file beside it gets, at least.
        with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", suffix=".can-be-written", dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name}: {text} cannot be written: {error.strerror or error} ({folder})") from error
