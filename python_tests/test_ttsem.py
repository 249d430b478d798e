"""The Triton kernels as their compiler's front end understands them: ttsem_suite.py, where ttsem is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed; .ci/run installs it")
def test_the_suite_passes_under_ttsem():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    arguments = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-n", "0", "python_tests/ttsem_suite.py"]
    done = subprocess.run(
        [sys.executable, "-m", "ttsem.sanitize", "pytest", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
