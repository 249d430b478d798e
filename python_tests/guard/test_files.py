import copy
import os

import pytest
import safetensors
import torch

from guardspace_kernels.guard import files
from guardspace_kernels.guard.files import load_tensors, open_tensors, save_tensors, write_atomic, write_text


def test_a_write_that_raises_midway_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(temporary):
        temporary.write_bytes(b"half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomic(tmp_path / "new.bin", write)
    assert os.listdir(tmp_path) == ["file.bin"]


def test_the_target_never_holds_a_part(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(temporary):
        assert temporary.parent == tmp_path  # os.replace is atomic within one file system
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"

    write_atomic(target, write)
    assert target.read_bytes() == b"new"


def test_bare_names_and_missing_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("bare.txt", "Σ")
    write_text(tmp_path / "a" / "b" / "c.txt", "x")
    assert (tmp_path / "bare.txt").read_text(encoding="utf-8") == "Σ"
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"
    save_tensors("bare.safetensors", "thing", {"t": torch.ones(2)}, {})
    assert torch.equal(load_tensors("bare.safetensors", "thing")[0]["t"], torch.ones(2))


def test_tensors_round_trip_with_their_header(tmp_path):
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(5).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, dtype=torch.float64)),
    }
    header = {"version": 1, "numbers": [1, 0.1, None], "words": {"a": "é"}}
    save_tensors(tmp_path / "x", "thing", tensors, header)
    loaded, read = load_tensors(tmp_path / "x", "thing")
    assert read == {"kind": "thing", **header}
    assert set(loaded) == set(tensors)
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype and torch.equal(loaded[name], t)


def test_what_is_not_ours_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors does not exist \(a plan file was expected\)"):
        load_tensors(path, "plan")
    save_tensors(path, "statistics", {"t": torch.randn(100)}, {})
    with pytest.raises(ValueError, match="not a plan file of this library but a statistics file"):
        load_tensors(path, "plan")
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_tensors(path, "statistics")
    save_file({"t": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"not a plan file of this library$"):
        load_tensors(path, "plan")


def test_a_file_of_a_later_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "later.safetensors"
    monkeypatch.setitem(files._VERSIONS, "guard plan", 2)
    files.save_tensors(path, "guard plan", {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format version 2, this library reads 1"):
        files.load_tensors(path, "guard plan")


def test_tensors_are_read_when_asked_for_even_if_the_file_is_gone(tmp_path):
    path = tmp_path / "t"
    tensors = {
        "bytes": torch.randn(3).bfloat16(), "empty": torch.empty(0, 4), "long": torch.randn(5, 2, dtype=torch.float64),
        "half": torch.randn(2, 3).half().T,
    }  # fmt: skip
    save_tensors(path, "test", tensors, {"a": 1})
    with safetensors.safe_open(path, framework="pt") as file:  # the format's own reader agrees
        assert all(torch.equal(file.get_tensor(name), t) for name, t in tensors.items())
    stored, header = open_tensors(path, "test")
    save_tensors(path, "test", {"bytes": torch.zeros(3)}, {"a": 2})
    path.unlink()
    assert header["a"] == 1
    for name, t in tensors.items():
        assert stored[name].shape == t.shape and stored[name].dtype == t.dtype
        assert torch.equal(stored[name].read(), t) and torch.equal(copy.deepcopy(stored)[name].read(), t)
    save_tensors(path, "test", stored, {})
    assert all(torch.equal(t, tensors[name]) for name, t in load_tensors(path, "test")[0].items())


def test_a_file_cut_short_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, "test", {"a": torch.randn(1000)}, {})
    stored, _ = open_tensors(path, "test")
    os.truncate(path, 2000)
    with pytest.raises(OSError, match=r"/t was cut short after it was opened"):
        stored["a"].read()
