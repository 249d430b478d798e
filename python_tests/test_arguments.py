"""Checks of paths: what cannot be read or written is told before the work, and nothing is left behind or replaced."""

import os
import stat
from contextlib import suppress

import numpy as np
import pytest

from guardspace_kernels import arguments
from guardspace_kernels.guard.atomic import write_text


def test_a_path_is_tried_and_nothing_is_left_behind(tmp_path):
    for target in (tmp_path / "x", tmp_path / "a" / "b" / "x"):
        assert arguments.writable_file("out", target) == str(target)
        assert arguments.writable_folder("out", target) == str(target)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").write_text("kept")
    arguments.writable_file("out", tmp_path / "x")
    assert (tmp_path / "x").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_told_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    for target, words in (
        (tmp_path, "is a folder; give the name of a file in it"),
        (f"{tmp_path}/new/", "is a folder; give the name of a file in it"),
        (tmp_path / "file" / "x", "cannot be written: Not a directory"),
        (tmp_path / ("n" * 250), "cannot be written: File name too long"),
    ):
        with pytest.raises(ValueError, match=f"out: {target} {words}"):
            arguments.writable_file("out", target)
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        arguments.writable_folder("out", tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        arguments.writable_file("out", tmp_path / "x")


def test_devices_and_pipes_are_not_replaced(tmp_path):
    """Root may rename a file over a device: of /dev/null, for instance, a file would be left for everybody."""
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", "/dev/null", "/dev/stdout", "/dev/new"):
        with pytest.raises(ValueError, match=f"out: {target} is a device or a pipe"):
            arguments.writable_file("out", target)
        with pytest.raises(ValueError, match=f"path: {target} is a device or a pipe"):
            write_text(target, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_values_are_shown_and_never_all_of_a_tensor():
    for value, text in (
        (np.ones((2, 3)), "ndarray of shape (2, 3) and float64"),
        (int, "the class int"),
        (len, "builtin_function_or_method"),
        ("x" * 200, "'" + "x" * 79 + "... (str)"),
        (None, "None"),
        (object(), "object"),
    ):
        assert arguments.shown(value) == text


def test_a_name_that_can_be_written_is_written(tmp_path):
    """The temporary file beside it has a longer name."""
    lengths = []
    for length in range(225, 250):
        target = tmp_path / ("x" * length)
        with suppress(ValueError):
            arguments.writable_file("out", target)
            lengths.append(length)
            write_text(target, "content")
    assert lengths and lengths[-1] < 249 and len(os.listdir(tmp_path)) == len(lengths)
