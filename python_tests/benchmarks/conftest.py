"""The benchmarks are not installed: they are imported from the repository. Nothing is compiled or timed for long."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import baselines, bench_null_projection, bench_projected_lora


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """torch.compile takes 20 seconds to say what the eager form says."""
    monkeypatch.setattr(bench_projected_lora, "_compiled", baselines.folded)
    monkeypatch.setattr(bench_null_projection, "_compiled", baselines.project_addmm_)
