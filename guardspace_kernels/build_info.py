"""What the compiled kernels of this installation were built with, or why there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("_build_info.json")  # written by setup.py


def build_config() -> dict[str, Any]:
    """``version``, ``compiler``, ``flags``, ``isas``, ``openmp`` and ``notes`` (what the compiler could not do).

    Where nothing could be built: ``not_built``, the reason and what to do about it. ``cuda`` tells the same of the CUDA
    kernels: ``nvcc`` and ``chips``, or ``not_built``.
    """
    try:
        return json.loads(_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"not_built": f"{_FILE.parent} was never installed, only copied or cloned; run pip install ."}
