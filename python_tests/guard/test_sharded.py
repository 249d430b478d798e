"""Models that are wrapped, sharded over processes, or offloaded: the statistics and plans of the plain model."""

import os
import shutil
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from guard_helpers import PROMPTS, PlainModel, assert_same_bits, batch_of, collect, plan_for, tiny_llama
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard import collection, layers, weights
from guardspace_kernels.guard.collection import plan_collection
from guardspace_kernels.guard.estimate import estimate_preparation
from guardspace_kernels.guard.fingerprint import ModelFingerprint

HERE = Path(__file__).parent
BATCHES = [batch_of(PROMPTS[i : i + 2], side) for i in range(4) for side in ("left", "right")]
HALVES = BATCHES[:4], BATCHES[4:]
FLOAT64 = {"dtype": torch.float64}
BUDGET = 50_000  # bytes in float64: several passes
RANK = """
import datetime, os, pathlib, sys
import torch.distributed as dist
import test_sharded
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
getattr(test_sharded, sys.argv[1])(pathlib.Path(sys.argv[2]), dist.get_rank())
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads sometimes outlive the group, and end the process with SIGABRT at the interpreter's exit
"""


def on_two_ranks(program, folder):
    """Runs a function of this file under torchrun, which ends both ranks when one fails or when it is ended."""
    (folder / "rank.py").write_text(RANK)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, str(folder / "rank.py"), program.__name__, str(folder)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"the ranks hung:\n{output[-3000:]}")
    assert process.returncode == 0, output[-6000:]


def model64(**config):
    return tiny_llama(dtype=torch.float64, **config)


def sharded(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def check_reduced(folder, model, batches=BATCHES):
    first, second = (gk.CalibrationStatistics.load(folder / f"rank{rank}") for rank in range(2))
    assert_same_bits(first, second)
    whole = collect(model, batches, **FLOAT64)
    assert repr(first) == repr(whole) and first.fingerprint == whole.fingerprint
    for x, y in zip(first.inputs, whole.inputs, strict=True):
        assert (x.covariance - y.covariance).norm() <= 1e-12 * y.covariance.norm()
        assert x.sinks.shape == y.sinks.shape and torch.cdist(x.sinks, y.sinks).min(dim=1).values.max() < 1e-12
    return first


def wrapped_ranks(folder, rank):
    model = nn.parallel.DistributedDataParallel(model64())
    mine = BATCHES[:5] if rank == 0 else BATCHES[5:]
    stats = collect(model, mine, **FLOAT64)
    assert_same_bits(stats, collect(model64(), mine, **FLOAT64))
    assert_same_bits(stats, collect(model, mine, max_memory=BUDGET, **FLOAT64))
    assert len(plan_collection(model, mine, max_memory=BUDGET, **FLOAT64).passes) > 1
    answered = collect(model, mine, answer_tokens=2, **FLOAT64)
    assert_same_bits(answered, collect(model64(), mine, answer_tokens=2, **FLOAT64))
    stats.all_reduce().save(folder / f"rank{rank}")
    assert plan_for(model, stats).fingerprint == plan_for(model64(), stats).fingerprint
    with pytest.raises(ValueError, match="statistics of ranks 0 and 1 are of other models, layers, weights or dtypes"):
        collect(model, mine, dtype=(torch.float32, torch.float64)[rank]).all_reduce()


def test_distributed_data_parallel_is_unwrapped(tmp_path):
    on_two_ranks(wrapped_ranks, tmp_path)
    check_reduced(tmp_path, model64())


def sharded_ranks(folder, rank):
    mine = HALVES[rank]
    model = sharded(model64(tied=True))
    stats = collect(model, mine, **FLOAT64)
    assert_same_bits(stats, collect(model64(tied=True), mine, **FLOAT64))
    stats.all_reduce().save(folder / f"rank{rank}")
    plan = plan_collection(model, mine, max_memory=BUDGET, **FLOAT64)
    assert len(plan.passes) > 1 and not plan.replay
    ended = []
    model.register_forward_hook(lambda *_: ended.append(1))
    assert_same_bits(stats, collect(model, mine, max_memory=BUDGET, **FLOAT64))
    # No forward is left early; four are of one prompt, padded on either side.
    assert len(ended) == 4 + 1 + len(plan.passes) * len(mine)
    with pytest.raises(
        TypeError, match=r"model is sharded \(fully_shard\).* plan in one process with an unsharded copy"
    ):
        plan_for(model, stats)


def test_a_sharded_model_gives_the_statistics_of_the_whole(tmp_path):
    on_two_ranks(sharded_ranks, tmp_path)
    plan_for(model64(tied=True), check_reduced(tmp_path, model64(tied=True)))


def answering_ranks(folder, rank):
    model = model64()
    mine = [batch_of([PROMPTS[rank]]), batch_of([PROMPTS[rank + 2]], "left", 12)]
    answers = [
        model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS
    ]
    lengths = {token: [(a + [token]).index(token) for a in answers] for token in range(60)}
    eos = max(lengths, key=lambda token: abs(lengths[token][0] - lengths[token][1]))
    assert lengths[eos][0] != lengths[eos][1], "one rank must wait for the other for this test to test anything"
    model.generation_config.eos_token_id = eos
    wanted = collect(model, mine, answer_tokens=6, **FLOAT64)
    assert_same_bits(collect(sharded(model), mine, answer_tokens=6, **FLOAT64), wanted)


def test_answers_of_a_sharded_model_may_end_at_different_times(tmp_path):
    on_two_ranks(answering_ranks, tmp_path)


def fingerprint_ranks(folder, rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

    model = tiny_llama(tied=True)
    names = list(layers.find_layers(model))
    wanted = ModelFingerprint.of(model, names)
    model = sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    gathered, most = weakref.WeakSet(), []
    values = weights.parameter_values

    def counted(*args):
        whole = values(*args)
        gathered.add(whole)
        most.append(len(gathered))
        return whole

    weights.parameter_values = counted
    assert ModelFingerprint.of(model, names) == wanted
    assert len(most) == 20 and max(most) == 1  # one parameter at a time
    collect(model, HALVES[rank])  # leaves the root's parameters gathered, in bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert ModelFingerprint.of(model, names) == wanted
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel \(module ''\) hides .*fully_shard, or give it unsh"):
        collect(FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu")))


def test_the_fingerprint_of_a_sharded_model_gathers_one_parameter_at_a_time(tmp_path):
    on_two_ranks(fingerprint_ranks, tmp_path)


def refusing_ranks(folder, rank):
    def refused(batches, mine, theirs, failing=1, **options):
        error, match = (ValueError, mine) if rank == failing else (RuntimeError, theirs)
        with pytest.raises(error, match=match):
            collect(model, batches, **options)

    model, mine = sharded(tiny_llama()), HALVES[rank]
    for options in ({}, {"max_memory": BUDGET // 2}):
        with pytest.raises(
            ValueError, match=r"the ranks have 4, 3 batches, but .* as many batches on every rank; their si"
        ):
            collect(model, mine[rank:], **options)
        unknown = [*mine[:3], {"input_ids": torch.tensor([[5, 60 * rank]])}]
        refused(
            unknown, "^batch 3: prompt 0 holds token 60", "^rank 1 ended, .*: ValueError: batch 3: prompt 0", **options
        )
        refused(
            mine[: 4 * (1 - rank)], "^batches is empty", "^rank 1 ended, .*: ValueError: batches is empty", **options
        )
    extra = [{**batch, "token_type_ids": batch["input_ids"]} if rank else batch for batch in mine]
    refused(extra, "answer_tokens needs batches of", "rank 1 ended, .* answer_tokens needs", answer_tokens=2)

    def broken(module, args, result):
        return result * float("nan") if rank == 0 and torch.equal(args[0], mine[2]["input_ids"]) else None

    handle = model.model.embed_tokens.register_forward_hook(broken)
    refused(mine, "^batch 2: .* non-finite", "^rank 0 ended, .*: ValueError: batch 2: .* non-finite", failing=0)
    handle.remove()

    path = folder / f"checkpoint{rank}"
    collect(tiny_llama(), mine[: 2 - rank], checkpoint=path)
    with pytest.raises(
        ValueError, match=r"the ranks have 2, 1 batches in their checkpoints, .* delete the checkpoints"
    ):
        collect(model, mine, checkpoint=path)
    path.unlink()
    collect(tiny_llama(), mine[:2], checkpoint=path)
    other = mine[::-1] if rank else mine
    refused(other, "^batch 0 is not the one", "^rank 1 ended, .*: ValueError: batch 0 is not", checkpoint=path)
    assert_same_bits(collect(model, mine, checkpoint=path), collect(tiny_llama(), mine))


def test_what_one_rank_of_a_sharded_model_cannot_do_all_refuse(tmp_path):
    on_two_ranks(refusing_ranks, tmp_path)


def test_a_checkpoint_that_another_process_wrote_is_refused(tmp_path, monkeypatch):
    path, budget = tmp_path / "mine", BUDGET // 2
    collect(tiny_llama(), HALVES[1], checkpoint=tmp_path / "theirs", max_memory=budget)
    end = collection.Checkpoint.end

    def overwritten(state, seen):
        end(state, seen)
        shutil.copy(tmp_path / "theirs.0", tmp_path / "mine.0")

    monkeypatch.setattr(collection.Checkpoint, "end", overwritten)
    with pytest.raises(
        ValueError, match=r"another process wrote the checkpoint .*mine\.0; give each process a file of i"
    ):
        collect(tiny_llama(), HALVES[0], checkpoint=path, max_memory=budget)


OFFLOADED = {
    "all": {"model": "disk", "lm_head": "disk"},
    "some": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk",
             "model.rotary_emb": "cpu", "lm_head": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize("which", OFFLOADED)
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_gives_the_statistics_and_the_plan_of_the_loaded_one(tied, which, tmp_path):
    plain = model64(tied=tied)
    model = accelerate.dispatch_model(model64(tied=tied), OFFLOADED[which], offload_dir=tmp_path / "offloaded")
    assert next(model.parameters()).is_meta == (which == "all")
    stats = collect(plain, BATCHES, **FLOAT64)
    for _ in range(2):  # a forward leaves tied weights apart
        assert_same_bits(collect(model, BATCHES, **FLOAT64), stats)
    assert len(plan_collection(model, BATCHES, max_memory=BUDGET, **FLOAT64).passes) > 1
    assert_same_bits(collect(model, BATCHES, max_memory=BUDGET, **FLOAT64), stats)
    collect(plain, BATCHES[:3], checkpoint=tmp_path / "checkpoint", **FLOAT64)
    assert_same_bits(collect(model, BATCHES, checkpoint=tmp_path / "checkpoint", **FLOAT64), stats)
    answered = collect(plain, BATCHES, answer_tokens=2, **FLOAT64)
    assert_same_bits(collect(model, BATCHES, answer_tokens=2, **FLOAT64), answered)
    assert plan_for(model, stats).fingerprint == plan_for(plain, stats).fingerprint
    shape = {"prompts": 8, "tokens_per_prompt": 6, "rank": 3}
    assert estimate_preparation(model, **shape).collection == estimate_preparation(plain, **shape).collection
    assert next(model.parameters()).is_meta == (which == "all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_a_model_that_stays_on_the_disk(dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().save_pretrained(tmp_path / "model")
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path / "model", dtype=dtype)
    plain, model = load(), load(device_map=OFFLOADED["all"], offload_folder=tmp_path / "offloaded")
    assert all(p.is_meta for p in model.parameters())
    stats = collect(plain)
    assert_same_bits(collect(model), stats)
    assert plan_for(model, stats).fingerprint == plan_for(plain, stats).fingerprint


@pytest.mark.parametrize("block", ["LlamaMLP", "LlamaDecoderLayer"])
def test_weights_that_accelerate_loads_with_their_block(block, tmp_path):
    model = accelerate.dispatch_model(
        tiny_llama(), OFFLOADED["all"], offload_dir=tmp_path, preload_module_classes=[block]
    )
    stats = collect(model, max_memory=BUDGET // 2)
    assert_same_bits(stats, collect(tiny_llama()))
    assert plan_for(model, stats).fingerprint == plan_for(tiny_llama(), stats).fingerprint


def test_offloaded_weights_take_the_dtype_that_the_model_was_given_since(tmp_path):
    model = accelerate.dispatch_model(tiny_llama(), OFFLOADED["all"], offload_dir=tmp_path).bfloat16()
    plain = tiny_llama(dtype=torch.bfloat16)
    stats = collect(model)
    assert_same_bits(stats, collect(plain))
    assert plan_for(model, stats).fingerprint == plan_for(plain, stats).fingerprint


def test_another_model_offloaded_is_refused(tmp_path):
    stats = collect(tiny_llama())
    model = accelerate.dispatch_model(tiny_llama(seed=1), OFFLOADED["all"], offload_dir=tmp_path)
    with pytest.raises(ValueError, match=r"the statistics belong to another model: layer model\.layers\.0"):
        plan_for(model, stats)


def test_a_model_that_is_nowhere_names_its_parameter():
    with torch.device("meta"):
        model = PlainModel()
    with pytest.raises(
        ValueError, match=r"parameter embed\.weight is on the meta device and offloaded nowhere: load the"
    ):
        collect(model)
