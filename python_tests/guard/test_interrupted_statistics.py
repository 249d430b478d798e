"""Collections that are interrupted, killed, merged, and spread over processes."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from guard_helpers import PROMPTS, PlainModel, assert_same_bits, batch_of, tiny_llama

import guardspace_kernels as gk
from guardspace_kernels.guard.files import load_tensors

HERE = Path(__file__).parent
BATCHES = [batch_of(PROMPTS[i : i + 2], side) for i in range(4) for side in ("left", "right")]


def collect(batches=BATCHES, model=None, **options):
    return gk.collect_statistics(model or tiny_llama(), batches, progress=False, **options)


class Stop(Exception):
    pass


def interrupted(after):
    yield from BATCHES[:after]
    raise Stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"answer_tokens": 2}, {"separate_sink": False}], ids=str)
def test_an_interrupted_collection_goes_on_to_the_same_bits(tmp_path, options, dtype):
    options = {**options, "dtype": dtype}
    whole = collect(**options)
    for after in (0, 1, 5, len(BATCHES)):
        path = tmp_path / f"{after}.checkpoint"
        with pytest.raises(Stop):
            collect(interrupted(after), checkpoint=path, **options)
        ran = []
        model = tiny_llama()
        model.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        assert_same_bits(collect(model=model, checkpoint=path, **options), whole)
        if not options.get("answer_tokens"):
            tried = 4 if after < len(BATCHES) else 0  # a prompt padded on each side, alone and in its row
            assert len(ran) == len(BATCHES) - after + tried
        assert_same_bits(collect(checkpoint=path, **options), whole)  # nothing is left to do
        assert os.listdir(tmp_path).count(path.name) == 1 and len(os.listdir(tmp_path)) == 1
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("every, kept", [(1, 5), (2, 4), (3, 3), (100, 0)])
def test_how_often_the_state_is_written(tmp_path, every, kept):
    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        collect(interrupted(5), checkpoint=path, checkpoint_every=every)
    assert path.exists() == bool(kept)
    if kept:
        assert len(load_tensors(path, "statistics checkpoint")[1]["batches"]) == kept
    assert_same_bits(collect(checkpoint=path, checkpoint_every=every), collect())
    assert len(load_tensors(path, "statistics checkpoint")[1]["batches"]) == len(BATCHES)


def test_a_checkpoint_is_of_one_call(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        collect(interrupted(3), checkpoint=path)
    for batches, options, match in (
        (BATCHES[::-1], {}, "batch 0 is not the one that the checkpoint .* was made from"),
        (BATCHES[:2], {}, "there are 2 batches, but the checkpoint .* was made from 3"),
        (BATCHES, {"answer_tokens": 1}, "was made with .*'answer_tokens': 0.* this call has .*'answer_tokens': 1"),
        (BATCHES, {"dtype": torch.float64}, "was made with .*float32"),
        (
            BATCHES,
            {"target_modules": ["q_proj"]},
            "'layers': '14 from .* has .*'layers': '2 from ",
        ),
        (BATCHES, {"model": tiny_llama(seed=1)}, "the statistics in the checkpoint .* belong to another model"),
    ):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=match):
            collect(batches, checkpoint=path, **options)
        assert path.read_bytes() == before
    collect().save(path)
    with pytest.raises(
        ValueError, match="is not a statistics checkpoint file of this library but a calibration statistics file"
    ):
        collect(checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint_every must be 1 or more, got 0"):
        collect(checkpoint=path, checkpoint_every=0)


KILLED = """
import sys, torch
torch.set_num_threads(1)
from guard_helpers import tiny_llama
import guardspace_kernels as gk
from test_interrupted_statistics import BATCHES
print("ready", flush=True)
gk.collect_statistics(tiny_llama(), 20 * BATCHES, progress=False, checkpoint=sys.argv[1]).save(sys.argv[2])
"""


def test_a_killed_run_leaves_a_whole_file_and_goes_on(tmp_path):
    checkpoint, result = tmp_path / "checkpoint", tmp_path / "result"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
    pick, done = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(checkpoint), str(result)], env=environment, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(pick.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if checkpoint.exists():
            batches = load_tensors(checkpoint, "statistics checkpoint")[1]["batches"]
            assert len(batches) >= done
            done = len(batches)
        assert not result.exists() or gk.CalibrationStatistics.load(result)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same_bits(collect(20 * BATCHES, checkpoint=checkpoint), collect(20 * BATCHES))
    finally:
        torch.set_num_threads(threads)


def parts(dtype=torch.float32):
    return [collect([batch_of(PROMPTS[i : i + 2])], dtype=dtype) for i in range(0, 5, 2)]


def test_merging_is_commutative_bit_for_bit_and_associative_to_rounding():
    a, b, c = parts(torch.float64)
    assert_same_bits(a.merge(b), b.merge(a))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert repr(left) == repr(right)
    for x, y in zip(left.inputs, right.inputs, strict=True):
        assert (x.covariance - y.covariance).norm() <= 1e-12 * x.covariance.norm()
        assert x.sinks.shape == y.sinks.shape


@pytest.mark.parametrize("d", [1, 2, 33])
def test_files_hold_triangles(tmp_path, d):
    model = PlainModel(d=d)
    stats = gk.collect_statistics(model, [batch_of()], progress=False)
    stats.save(tmp_path / "s")
    tensors, _ = load_tensors(tmp_path / "s", "calibration statistics")
    sizes = [entry.covariance.shape[0] for entry in stats.inputs]
    assert [tensors[f"{i}.covariance"].shape for i in range(len(sizes))] == [(n * (n + 1) // 2,) for n in sizes]
    assert_same_bits(gk.CalibrationStatistics.load(tmp_path / "s"), stats)


RANK = """
import os, pathlib, sys, torch
import torch.distributed as dist
from guard_helpers import tiny_llama, PlainModel
import guardspace_kernels as gk
from test_interrupted_statistics import BATCHES
dist.init_process_group("gloo")
rank = dist.get_rank()
stats = gk.collect_statistics(tiny_llama(), BATCHES[rank::2], progress=False, dtype=torch.float64)
stats.all_reduce().save(f"{sys.argv[1]}/rank{rank}")
other = stats if rank == 0 else gk.collect_statistics(PlainModel(), BATCHES, progress=False)
try:
    other.all_reduce()
except ValueError as error:
    pathlib.Path(f"{sys.argv[1]}/refused{rank}").write_text(str(error))
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes outlive the group, and end the process with SIGABRT at the interpreter's exit
"""


def test_two_processes_agree_with_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        refusal = (tmp_path / f"refused{rank}").read_text()
        assert refusal == "the statistics of ranks 0 and 1 are of other models, layers, weights or dtypes"
    first, second = (gk.CalibrationStatistics.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert_same_bits(first, second)
    whole = collect(dtype=torch.float64)
    assert repr(first) == repr(whole)
    for x, y in zip(first.inputs, whole.inputs, strict=True):
        assert (x.covariance - y.covariance).norm() <= 1e-12 * y.covariance.norm()
        assert x.sinks.shape == y.sinks.shape and torch.cdist(x.sinks, y.sinks).min(dim=1).values.max() < 1e-6


def test_statistics_are_not_changed_by_merging():
    a, b, _ = parts()
    before = copy.deepcopy(a)
    a.merge(b)
    assert_same_bits(a, before)
