"""A structured fuzzer over the library's files: statistics, checkpoints, plans and folders of guarded adapters.

Short here; ``FUZZ=4000 python -m pytest python_tests/guard/test_fuzz_files.py`` runs that many mutations of each kind,
and ``FUZZ_SEED`` begins elsewhere.
"""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
import warnings

import pytest
import torch
from guard_helpers import PlainModel, batch_of, collect, perturb, plan_for

import guardspace_kernels as gk
from guardspace_kernels.guard.files import _START

MUTATIONS = int(os.environ.get("FUZZ", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
BATCHES = [batch_of([[5, 9, 3, 7], [5, 2, 6]]), batch_of([[8, 3, 9, 9, 10], [5, 13]])]


class Subject:
    """A kind of file: how to write one, and how to read it into something that is compared."""

    def __init__(self):
        self.model = PlainModel()
        self.stats = collect(self.model, BATCHES)

    def files(self, folder):
        return [folder / "x.safetensors"]


def content_of(stats):
    return repr(stats), [
        (e.layers, e.tokens, e.sink_tokens, e.routed, e.held_tokens)
        + tuple(None if t is None else t.tolist() for t in (e.triangle(), e.sinks, e.held_on("cpu")))
        + ((e.sample.keys.tolist(), e.sample.rows.tolist()) if e.sample else ())
        for e in stats.inputs
    ]


class Statistics(Subject):
    def write(self, folder):
        self.stats.save(folder / "x.safetensors")

    def read(self, folder):
        return content_of(gk.CalibrationStatistics.load(folder / "x.safetensors"))


class Checkpoint(Subject):
    def write(self, folder):
        collect(self.model, BATCHES, checkpoint=folder / "x.safetensors")

    def read(self, folder):
        return content_of(collect(self.model, BATCHES, checkpoint=folder / "x.safetensors"))


class Plan(Subject):
    def write(self, folder):
        plan_for(self.model, self.stats).save(folder / "x.safetensors")

    def read(self, folder):
        plan = gk.GuardPlan.load(folder / "x.safetensors")
        return plan.fingerprint, str(plan)


class Adapter(Subject):
    def __init__(self):
        super().__init__()
        self.plan = plan_for(self.model, self.stats)
        self.reader = gk.attach_guard(PlainModel(), self.plan)

    def files(self, folder):
        return [
            folder / name for name in ("guardspace.safetensors", "adapter_model.safetensors", "adapter_config.json")
        ]

    def write(self, folder):
        perturb(gk.attach_guard(PlainModel(), self.plan)).save_pretrained(folder)

    def read(self, folder):
        self.reader.load_adapter(folder)
        return {n: (x.A.tolist(), x.B.tolist()) for n, x in self.reader.guarded_layers().items()}


KINDS = {kind.__name__: kind for kind in (Statistics, Checkpoint, Plan, Adapter)}


# ---- mutations of bytes: what a disk, a copy or a hand does to a file


def flip_a_bit(raw, pick):
    place = pick.randrange(8 * len(raw))
    raw[place // 8] ^= 1 << place % 8


def flip_in_the_header(raw, pick):
    raw[pick.randrange(min(len(raw), 8 + header_length(raw)))] = pick.randrange(256)


def cut_short(raw, pick):
    del raw[pick.choice([0, 7, 8, len(raw) - 1, pick.randrange(len(raw))]) :]


def lengthen(raw, pick):
    raw += bytes(pick.randrange(1, 100))


def zero_a_part(raw, pick):
    begin, end = sorted(pick.randrange(len(raw)) for _ in range(2))
    raw[begin:end] = bytes(end - begin)


def repeat_a_part(raw, pick):
    begin, end = sorted(pick.randrange(len(raw)) for _ in range(2))
    raw[begin:begin] = raw[begin:end]


def move_a_part(raw, pick):
    size = pick.choice([1, 4, 64, 512])
    a, b = (pick.randrange(max(1, len(raw) - size)) for _ in range(2))
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]


def another_length(raw, pick):
    raw[:8] = struct.pack("<Q", pick.choice([0, 1, 2**63, 2**64 - 1, header_length(raw) + pick.choice([-8, -1, 1, 8])]))


def header_length(raw):
    return int.from_bytes(raw[:8], "little")


# ---- mutations of tensors and headers


def swap_tensors(header, data, pick):
    a, b = (pick.choice(tensors_of(header)) for _ in range(2))
    header[a], header[b] = header[b], header[a]


def repeat_a_tensor(header, data, pick):
    a, b = (header[pick.choice(tensors_of(header))]["data_offsets"] for _ in range(2))
    size = min(a[1] - a[0], b[1] - b[0])
    data[b[0] : b[0] + size] = data[a[0] : a[0] + size]


def rename_a_tensor(header, data, pick):
    name = pick.choice(tensors_of(header))
    header[name + pick.choice(["", "x", "\ud800"])] = header.pop(name)


def lose_a_tensor(header, data, pick):
    del header[pick.choice(tensors_of(header))]


def poke_a_value(header, data, pick):
    begin, end = header[pick.choice(tensors_of(header))]["data_offsets"]
    if end > begin:
        value = pick.choice([float("nan"), float("inf"), -1.0, 1e30, 0.0])
        place = pick.randrange(begin, end, 4)
        data[place : place + 4] = struct.pack("<f", value)


def change_a_dtype(header, data, pick):
    header[pick.choice(tensors_of(header))]["dtype"] = pick.choice(["I64", "F64", "F32", "F16", "BF16", "I8"])


def change_an_entry(header, data, pick):
    put_junk(header, pick)


def change_the_description(header, data, pick):
    about = json.loads(header.get("__metadata__", {}).get("guardspace", "null"))
    if about is not None:
        put_junk(about, pick)
        header["__metadata__"]["guardspace"] = json.dumps(about)


def nest(header, data, pick):
    about = '{"kind":' + pick.choice("[{") * pick.choice([100, 5000, 100_000])
    header.setdefault("__metadata__", {})["guardspace"] = about


JUNK = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**400,
    -0.5,
    1e308,
    "",
    "x",
    "-1",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    "\ud800",
]


def put_junk(value, pick):
    """Somewhere below ``value``: another type or number in place of what is there, or one entry less, or twice."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = pick.choice(keys)
        if isinstance(value[key], (dict, list)) and pick.random() < 0.8:
            value = value[key]
            continue
        action = pick.randrange(4)
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        elif action == 1:
            value[f"{key}x"] = copy.deepcopy(value[key])
        else:
            value[key] = pick.choice(JUNK)
        return


def tensors_of(header):
    return [name for name in header if name != "__metadata__"]


OF_BYTES = [
    flip_a_bit,
    flip_in_the_header,
    cut_short,
    lengthen,
    zero_a_part,
    repeat_a_part,
    move_a_part,
    another_length,
]
OF_TENSORS = [swap_tensors, repeat_a_tensor, rename_a_tensor, lose_a_tensor, poke_a_value, change_a_dtype]
OF_CONTENT = [*OF_TENSORS, change_the_description, nest, change_an_entry]  # in that order, where there are two


def mutate(path, pick):
    """Changes a file; (what was done, whether its hashes were made to fit, as a forger can or as there were none)."""
    raw = bytearray(path.read_bytes())
    if path.suffix == ".json" or pick.random() < 0.4:
        change = pick.choice(OF_BYTES[:-1] if path.suffix == ".json" else OF_BYTES)
        change(raw, pick)
        path.write_bytes(raw)
        return change.__name__, False
    end = 8 + header_length(raw)
    header, data = json.loads(raw[8:end]), raw[end:]
    changes = sorted([pick.choice(OF_CONTENT) for _ in range(pick.choice([1, 1, 2]))], key=OF_CONTENT.index)
    for change in changes:
        if tensors_of(header):
            change(header, data, pick)
    mode = pick.choice(["left", "forged", "earlier"])
    if mode == "earlier":
        remove_hashes(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    if pick.random() < 0.05:
        text = text.replace(b'"F32"', b'"F32","dtype":"F32"', 1)  # a name twice
    if mode == "forged":
        text = with_hashes(text, header, data)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return " and ".join(change.__name__ for change in changes) + f", hashes {mode}", mode != "left"


def remove_hashes(header):
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get("guardspace"), str):
        metadata.pop("sha256", None)
        for new, old in (("3", "2"), ("2", "1")):
            if f'"version": {new}' in metadata["guardspace"]:
                metadata["guardspace"] = metadata["guardspace"].replace(f'"version": {new}', f'"version": {old}')
                return


def with_hashes(text, header, data):
    """The header's text with hashes of what it describes, where it has a place for them."""
    if not text.startswith(_START):
        return text
    hashes = []
    for name in tensors_of(header):
        try:
            begin, end = header[name]["data_offsets"]
            hashes.append(hashlib.sha256(data[begin:end]).hexdigest())
        except (ValueError, TypeError, KeyError):
            hashes.append("0" * 64)
    begin = len(_START)
    end = text.index(b'"', begin)
    of_tensors = "".join(hashes).encode()
    unsigned = text[:begin] + b"0" * 64 + of_tensors + text[end:]
    return text[:begin] + hashlib.sha256(unsigned).hexdigest().encode() + of_tensors + text[end:]


def outcome(subject, folder):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return subject.read(folder), None
    except Exception as error:
        return None, error


@pytest.mark.parametrize("kind", KINDS)
def test_altered_files_are_refused_by_name_or_read_as_they_were(tmp_path, kind):
    """Never another error, and never another content unless the hashes were made to fit it."""
    subject = KINDS[kind]()
    original, folder = tmp_path / "original", tmp_path / "altered"
    original.mkdir()
    subject.write(original)
    truth, refused, forged = subject.read(original), 0, 0
    for number in range(MUTATIONS):
        pick = random.Random(f"{kind} {SEED + number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        path = pick.choice(subject.files(folder))
        what, fits = mutate(path, pick)
        found, error = outcome(subject, folder)
        about = f"{kind} {SEED + number}: {what} of {path.name}: {type(error).__name__}: {error}"
        assert error is None or (isinstance(error, (ValueError, OSError)) and str(folder) in str(error)), about
        assert error or fits or found == truth, about
        refused += error is not None
        forged += fits and error is None
    assert refused > MUTATIONS // 2 and forged < MUTATIONS // 2, (refused, forged)
    assert torch.get_default_dtype() == torch.float32
