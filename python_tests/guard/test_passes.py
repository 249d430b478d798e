"""Collection under a memory budget: the bits of a single pass, within the budget, each block run about once."""

import platform
import resource
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from guard_helpers import PROMPTS, PlainModel, assert_same_bits, batch_of, collect, planned, tiny_gpt2, tiny_llama
from test_interrupted_statistics import Stop
from test_statistics import LATE, LateReader

import guardspace_kernels as gk
from guardspace_kernels.guard import collection, passes, planning
from guardspace_kernels.guard.collecting import collector
from guardspace_kernels.guard.collection import plan_collection
from guardspace_kernels.guard.passes import LayerInput, parse_bytes, plan_passes

BATCHES = [batch_of(PROMPTS[i : i + 2], side) for side in ("right", "left") for i in range(0, 5, 2)]
BUDGET = {"llama": 40_000, "gpt2": 80_000, "plain": 650}  # two or more passes each


def deep_llama(**config):
    return tiny_llama(num_hidden_layers=4, **config)


MODELS = {"llama": deep_llama, "gpt2": tiny_gpt2, "plain": PlainModel}


@pytest.fixture
def live(monkeypatch):
    """The most bytes that accumulators have held at once."""
    alive, most = weakref.WeakSet(), [0]

    class Counted(collector.CovarianceAccumulator):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most[0] = max(most[0], sum(one.lower.nbytes for one in alive))

    monkeypatch.setattr(collector, "CovarianceAccumulator", Counted)
    return most


def attention_calls(model, run):
    """How often each block's attention ran."""
    calls = [0] * len(model.model.layers)

    def count(i):
        calls[i] += 1

    handles = [
        block.self_attn.register_forward_pre_hook(lambda *_, i=i: count(i))
        for i, block in enumerate(model.model.layers)
    ]
    run()
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}, {"separate_sink": False}])
def test_the_bits_of_a_single_pass_within_the_budget(kind, options, live, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    budget = BUDGET[kind] * (2 if "dtype" in options else 1)
    whole = collect(MODELS[kind](), BATCHES, **options)
    assert live[0] > budget
    live[0] = 0
    parts = collect(MODELS[kind](), iter(BATCHES), max_memory=budget, **options)
    assert 0 < live[0] <= budget
    assert_same_bits(parts, whole)
    assert parts.prompts == whole.prompts and parts.fingerprint == whole.fingerprint
    assert not list(tmp_path.glob("guardspace-*"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_generated_once(kind, monkeypatch):
    whole = collect(MODELS[kind](), BATCHES, answer_tokens=3)
    generated, generate = [], collection.with_answers
    monkeypatch.setattr(collection, "with_answers", lambda *args: generated.append(1) or generate(*args))
    assert_same_bits(collect(MODELS[kind](), BATCHES, answer_tokens=3, max_memory=BUDGET[kind]), whole)
    assert len(generated) == len(BATCHES)


def test_each_block_runs_once_where_the_model_is_a_chain():
    model = deep_llama()
    block = 3 * 32**2 + 48**2  # q/k/v, o, gate/up, down
    batches = BATCHES[:3]
    outputs = 4 * 32 * sum(batch["input_ids"].numel() for batch in batches)
    budget = 4 * (block + 48 * 49 // 2) + outputs
    plan = plan_collection(model, batches, max_memory=budget)
    assert [[one.after for one in part] for part in plan.passes] == [[i] * 4 for i in range(4)] and plan.replay
    n = len(batches)
    calls = attention_calls(model, lambda: collect(model, batches, max_memory=budget))
    # And forwards of the first batch that show the structure, after two of a prompt.
    assert calls == [n + 4, n + 4, n + 5, n + 5]
    assert "4 passes instead of" in str(plan) and "each block runs about once" in str(plan)
    # Without room for the outputs: from the beginning, but no further than needed.
    batches = 3 * BATCHES
    tight = plan_collection(model, batches, max_memory=budget)
    assert not tight.replay and len(tight.passes) == 4 and "from the model's first block" in str(tight)
    n = len(batches)
    calls = attention_calls(model, lambda: collect(model, batches, max_memory=budget))
    reach = [part[-1].after for part in tight.passes]
    assert calls == [n * sum(last >= i for last in reach) + (6 if i < 2 else 7) for i in range(4)]
    assert attention_calls(model, lambda: collect(model, batches)) == [n + 4] * 4


class Gossip(torch.nn.Module):
    """A block that also reads what the one before left in an attribute."""

    def __init__(self, before):
        super().__init__()
        self.before, self.linear, self.said = [before] if before else [], torch.nn.Linear(32, 32), None

    def forward(self, x):
        heard = self.before[0].said if self.before else 0
        self.said = torch.tanh(self.linear(x))
        return x + self.said + heard


class Sharing(torch.nn.Module):
    """A block that finds in a dictionary what the first one left there, as keys and values that layers share."""

    def __init__(self, first):
        super().__init__()
        self.first, self.linear = first, torch.nn.Linear(32, 32)

    def forward(self, x, shared):
        if self.first:
            shared["said"] = torch.tanh(x)
        return x + torch.tanh(self.linear(x)) + shared["said"]


class Chain(torch.nn.Module):
    def __init__(self, gossip=False, in_place=False, shares=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(60, 32)
        blocks = []
        for i in range(4):
            blocks.append(Sharing(i == 0) if shares else Gossip(blocks[-1] if blocks and gossip else None))
        self.blocks = torch.nn.ModuleList(blocks)
        self.in_place, self.shares = in_place, shares

    def forward(self, input_ids, attention_mask=None):
        h, shared = self.embed(input_ids), {}
        for block in self.blocks:
            h = block(h, shared) if self.shares else block(h)
            if self.in_place:
                h *= 1.5
        return h


SHORT = [batch_of([[5, 13, 2], [8, 4, 1]]), batch_of([[7, 3, 9], [1, 4, 8]])]


@pytest.mark.parametrize("options", [{"gossip": True}, {"in_place": True}, {"shares": True}, {}])
def test_blocks_that_talk_behind_their_outputs_are_not_replayed(options):
    whole = collect(Chain(**options), SHORT)
    budget = 4 * (32 * 32 + 32 * 33 // 2 + 2 * 6 * 32)  # one input, one triangle, all outputs
    plan = plan_collection(Chain(**options), SHORT, max_memory=budget)
    assert len(plan.passes) == 4 and plan.replay == ("gossip" not in options and "shares" not in options)
    assert_same_bits(collect(Chain(**options), SHORT, max_memory=budget), whole)


def test_blocks_that_return_lists_are_not_replayed():
    config = transformers.OpenAIGPTConfig(vocab_size=60, n_embd=32, n_layer=4, n_head=4, n_positions=32)
    torch.manual_seed(0)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    parts = collect(model, BATCHES, max_memory="120kB")
    assert len(plan_collection(model, BATCHES, max_memory="120kB").passes) > 1
    assert_same_bits(parts, collect(model, BATCHES))


def test_layers_that_the_first_batch_does_not_reach():
    model = LateReader()
    whole = collect(model, LATE)
    parts = collect(model, LATE, max_memory=4 * (36 + 21))
    assert parts.for_layer("early").tokens == 3 * 2 * 4 and parts.for_layer("late").tokens == 2 * 2 * 4
    for name in ("early", "late"):
        assert torch.equal(parts.for_layer(name).covariance, whole.for_layer(name).covariance)


@pytest.mark.parametrize("stop_at", range(0, 18, 4))
def test_interrupted_in_any_pass_and_resumed(stop_at, tmp_path, monkeypatch):
    model, seen = deep_llama(), []
    end_batch = collection.Collector.end_batch

    def stopping(self):
        seen.append(1)
        if len(seen) == stop_at + 1:
            raise Stop
        end_batch(self)

    monkeypatch.setattr(collection.Collector, "end_batch", stopping)
    options = {"max_memory": BUDGET["llama"], "checkpoint": tmp_path / "c", "answer_tokens": 2}
    with pytest.raises(Stop):
        collect(model, BATCHES, **options)
    resumed = collect(model, BATCHES, **options)
    passes = len(plan_collection(model, BATCHES, answer_tokens=2, max_memory=BUDGET["llama"]).passes)
    assert len(seen) == passes * len(BATCHES) + 1  # one batch was run again
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"c.{i}" for i in range(passes)]
    assert_same_bits(resumed, collect(model, BATCHES, answer_tokens=2))
    with pytest.raises(ValueError, match=r"checkpoint .*c\.0 was made with"):
        collect(model, BATCHES, **{**options, "max_memory": 1.5 * BUDGET["llama"]})


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "lm_head"])
def test_the_model_is_left_as_it_was_when_a_pass_fails(where, monkeypatch):
    model = deep_llama()

    def fail(*_):
        raise Stop

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        collect(model, BATCHES, max_memory=BUDGET["llama"])
    handle.remove()
    for module in model.modules():
        assert "forward" not in module.__dict__ and not module._forward_pre_hooks and not module._forward_hooks


def test_budgets():
    assert [parse_bytes("m", s) for s in (None, 5, "4GB", " 1.5 GiB ", "2kb", "7")] == [
        None, 5, 4 * 10**9, 3 * 2**29, 2000, 7
    ]  # fmt: skip
    for bad in ("", "4 gigs", "-1GB", 0, "1.2.3MB", "0GB"):
        with pytest.raises(ValueError, match=r'max_memory must be a number of bytes such as "4GB" or "512MiB", got'):
            collect(PlainModel(), max_memory=bad)
    with pytest.raises(
        ValueError, match=r"max_memory is 500 B, but the input of layer q with 10 features needs 620 B alone"
    ):
        collect(PlainModel(), max_memory=500)
    with pytest.raises(ValueError, match="batches is empty"):
        collect(PlainModel(), [], max_memory="1GB")
    inputs = [LayerInput((str(i),), 10, i) for i in range(5)]
    for budget in range(620, 3000, 100):
        plan = plan_passes(inputs, torch.float32, budget, None)
        assert [one for part in plan.passes for one in part] == inputs
        assert plan.live_bytes <= budget and plan.whole_bytes == 2000 and plan.stored_bytes == 1100
        assert all(sum(one.bytes(torch.float32) for one in part) + 220 <= budget for part in plan.passes)
        assert len(plan.passes) == -(-5 // min(5, (budget - 220) // 400))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have nothing to be told")
def test_freed_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [torch.ones(2**14) for _ in range(2000)]  # of 64 KB, 131 MB in all, from the heap
    last = torch.ones(2**14)
    del blocks
    before = resident()
    passes.release_memory()
    assert before - resident() > 60e6 and last.sum() == 2**14


def test_under_a_budget_it_does_after_every_pass_and_solve(monkeypatch):
    model, released = deep_llama(), []
    for module in (collection, planning):
        monkeypatch.setattr(module, "release_memory", lambda module=module: released.append(module))
    planned(model, collect(model, BATCHES), gk.GuardConfig(rank=2, protect=0.5))
    assert not released
    stats = collect(model, BATCHES, max_memory=BUDGET["llama"])
    assert released == [collection] * len(plan_collection(model, BATCHES, max_memory=BUDGET["llama"]).passes)
    planned(model, stats, gk.GuardConfig(rank=2, protect=0.5), max_memory="1GB")
    assert released.count(planning) == len(stats.inputs)


def test_the_plan_is_shown_before(capsys):
    model = deep_llama()
    gk.collect_statistics(model, BATCHES, max_memory=BUDGET["llama"])
    shown = capsys.readouterr().err
    assert shown.startswith("statistics: 16 distinct inputs, ") and " passes instead of " in shown
