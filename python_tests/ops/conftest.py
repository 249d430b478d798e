"""Every test of an op runs on the reference and on the C++ kernels."""

from __future__ import annotations

import pytest
from backends import backend, isa  # noqa: F401


@pytest.fixture(autouse=True)
def _on_every_backend(backend):  # noqa: F811
    pass
