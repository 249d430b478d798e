import copy
import hashlib
import json
import os

import pytest
import safetensors
import torch
from guard_helpers import rewrite

from guardspace_kernels.guard import files
from guardspace_kernels.guard.files import check_shapes, load_tensors, open_tensors, save_tensors


def test_tensors_round_trip_with_their_header(tmp_path):
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(5).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2, dtype=torch.float64)),
    }
    header = {"version": 2, "numbers": [1, 0.1, None], "words": {"a": "é"}}
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
    monkeypatch.setitem(files._VERSIONS, "guard plan", (3, 2))
    files.save_tensors(path, "guard plan", {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"later\.safetensors has format version 3, this library reads 2; write it again"
    ):
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


def parts(path):
    """(header, data) of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def put(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_hashes_are_those_of_the_content(tmp_path):
    path = tmp_path / "t"
    tensors = {"a": torch.randn(7), "b": torch.randn(3).double(), "empty": torch.empty(0, 2)}
    save_tensors(path, "test", tensors, {"x": 1})
    header, data = parts(path)
    hashes = header["__metadata__"]["sha256"]
    entries = [name for name in header if name != "__metadata__"]
    assert len(hashes) == 64 * 4 and path.read_bytes()[8:].startswith(b'{"__metadata__":{"sha256":"' + hashes.encode())
    for i, name in enumerate(entries, 1):
        begin, end = header[name]["data_offsets"]
        assert hashes[64 * i : 64 * (i + 1)] == hashlib.sha256(data[begin:end]).hexdigest()
        assert data[begin:end] == tensors[name].numpy().tobytes()
    text = path.read_bytes()[8 : -len(data)]
    assert hashes[:64] == hashlib.sha256(text.replace(hashes[:64].encode(), b"0" * 64)).hexdigest()


def test_every_changed_byte_is_noticed_and_named(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, "test", {"first": torch.randn(5), "second": torch.randn(3)}, {"x": [1, 2]})
    whole = path.read_bytes()
    data = len(whole) - 4 * 8
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"{path}") as raised:
            load_tensors(path, "test")
        if place >= data:
            name = "first" if place < data + 20 else "second"
            assert str(raised.value) == (
                f"{path}: tensor {name!r} does not match its hash; the file was altered or damaged. Make it again, or "
                "restore it from a copy"
            )


def test_a_tensor_is_checked_each_time_it_is_read(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, "test", {"a": torch.zeros(1000), "b": torch.zeros(1000).double()}, {})
    stored, _ = open_tensors(path, "test")
    stored["a"].read()
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1")
    stored["b"].read()
    with pytest.raises(ValueError, match="tensor 'a' does not match its hash"):
        stored["a"].read()
    with pytest.raises(ValueError, match="tensor 'a' does not match its hash"):  # and is not copied into another file
        save_tensors(tmp_path / "copy", "test", stored, {})
    assert os.listdir(tmp_path) == ["t"]


def test_files_of_earlier_versions_are_read_with_a_warning(tmp_path):
    path = tmp_path / "t"
    save_tensors(path, "test", {"a": torch.ones(3)}, {"x": 1})
    rewrite(path, lambda *_: None, earlier=True)
    with pytest.warns(UserWarning, match=r"/t was written by an earlier version and holds no hashes: .* Save it again"):
        tensors, header = load_tensors(path, "test")
    assert torch.equal(tensors["a"], torch.ones(3)) and header["x"] == 1
    header, data = parts(path)
    header["__metadata__"]["guardspace"] = header["__metadata__"]["guardspace"].replace('"version": 1', '"version": 2')
    put(path, header, data)
    with pytest.raises(ValueError, match="the header, which lacks its hashes, does not match its hash"):
        load_tensors(path, "test")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "not JSON": (b"{a}", "the header is not JSON"),
    "not UTF-8": (b'{"\xff":1}', "the header is not JSON"),
    "a list": (b"[]", "the header is not a JSON object"),
    "a name twice": (b'{"a":1,"a":1}', "a name is there twice"),
    "NaN": (b'{"a":NaN}', "NaN is not JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, r"__metadata__\.a must be a text, got 1"),
    "metadata that is a list": ({"__metadata__": []}, r"__metadata__ must be an object, got \[\]"),
    "an entry that is a text": ({"a": "b"}, r"tensors\.a must be an object, got 'b'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, r"tensors\.a lacks dtype"),
    "more than an entry": ({"a": {**ENTRY, "b": 1}}, r"tensors\.a has an unknown entry 'b'"),
    "another dtype": ({"a": {**ENTRY, "dtype": "I32"}}, "dtype must be one of F64, F32, F16, BF16, I64, got 'I32'"),
    "a dtype that is a list": ({"a": {**ENTRY, "dtype": ["F32"]}}, "dtype must be one of"),
    "negative": ({"a": {**ENTRY, "shape": [-2]}}, r"shape\[0\] must be a whole number of 0 or more, got -2"),
    "a fraction": ({"a": {**ENTRY, "shape": [2.0]}}, r"shape\[0\] must be a whole number of 0 or more, got 2.0"),
    "true": ({"a": {**ENTRY, "shape": [True]}}, "must be a whole number of 0 or more, got True"),
    "huge": ({"a": {**ENTRY, "shape": [10**30]}}, "must be a whole number of 0 or more, got 1000"),
    "hugely empty": ({"a": {**ENTRY, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}, "is said to be at bytes"),
    "many dimensions": ({"a": {**ENTRY, "shape": [1] * 9}}, "shape must be a list"),
    "three offsets": ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, "data_offsets must be a list of 2 entries"),
    "more than there is": ({"a": {**ENTRY, "shape": [2**40], "data_offsets": [0, 2**42]}}, "its header describes"),
    "other bytes": ({"a": {**ENTRY, "shape": [3]}}, "is said to be at bytes 0 to 8"),
    "backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "is said to be at bytes 8 to 0"),
    "overlapping": ({"a": ENTRY, "b": ENTRY}, "the one before it ends at 8"),
    "a gap": ({"a": {**ENTRY, "data_offsets": [4, 12]}}, "the one before it ends at 0"),
    "less than there is": ({}, "its header describes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_refused_by_name(tmp_path, case):
    path = tmp_path / "t.safetensors"
    header, match = BROKEN[case]
    put(path, header, bytes(8))
    with pytest.raises(ValueError, match=rf"t\.safetensors is not a readable safetensors file: .*{match}"):
        open_tensors(path, "test")


def test_a_folder_in_its_place_is_said(tmp_path):
    with pytest.raises(IsADirectoryError, match=rf"^{tmp_path} is a folder \(a plan file was expected\)"):
        open_tensors(tmp_path, "plan")


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "t"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header is to take 1152921504606846976 of 10 bytes"):
        open_tensors(path, "test")


def test_what_files_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tensor 'a' has dtype torch\.int32; files hold torch\.float64"):
        save_tensors(tmp_path / "t", "test", {"a": torch.ones(2).int()}, {})
    assert os.listdir(tmp_path) == []


def test_shapes_that_a_header_implies():
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    single, other = (torch.float32,), (torch.float64, torch.float16)
    expected = {"a": ((2, None), single), "b": ((4,), single)}
    check_shapes("x", tensors, expected)
    for wanted, match in (
        ({**expected, "c": ((), single)}, "x lacks the tensor 'c'"),
        ({"a": ((2, 3), single)}, "x has a tensor 'b', which belongs to nothing in its header"),
        (
            {**expected, "a": ((3, None), single)},
            r"x: tensor 'a' is torch\.float32 of shape \(2, 3\), expected torch\.f",
        ),
        ({**expected, "a": ((None,), single)}, r"of shape \(any\)"),
        ({**expected, "a": ((2, None), other)}, r"expected torch\.float64 or torch\.float16 of shape \(2, any\)"),
    ):
        with pytest.raises(ValueError, match=match):
            check_shapes("x", tensors, wanted)
