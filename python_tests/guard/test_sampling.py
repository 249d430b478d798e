import copy
import pickle

import pytest
import torch
from guard_helpers import PROMPTS, PlainModel, batch_of, collect, gather_inputs, tiny_llama
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.passes import LayerInput, plan_passes
from guardspace_kernels.guard.sampling import ANSWER, KINDS, REQUEST, SAMPLED, TEMPLATE, Sample, Template, kept, probed

GENERATOR = torch.Generator().manual_seed(3)
MANY = [torch.randint(2, 50, (int(n),), generator=GENERATOR).tolist() for n in torch.randint(3, 9, (40,))]


def chat(prompts, before=(51, 52, 53), after=(54, 55)):
    return [[*before, *prompt, *after] for prompt in prompts]


def batches(prompts, size, side="right"):
    return [batch_of(prompts[i : i + size], side) for i in range(0, len(prompts), size)]


def assert_same_samples(a, b, exact=True):
    assert (a.held_prompts, a.kind_tokens) == (b.held_prompts, b.kind_tokens)
    for x, y in zip(a.inputs, b.inputs, strict=True):
        assert torch.equal(x.sample.keys, y.sample.keys) and x.sample.rows.dtype == y.sample.rows.dtype
        torch.testing.assert_close(x.sample.rows, y.sample.rows, **({"rtol": 0, "atol": 0} if exact else {}))
        assert x.held_tokens == y.held_tokens and (x.held is None) == (y.held is None)
        if x.held is not None:
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(x.held_on("cpu"), y.held_on("cpu"), **tolerance)


def test_samples_are_rows_of_the_prompts_and_held_prompts_are_a_part_of_the_covariance():
    model = tiny_llama(dtype=torch.float64)
    stats = collect(model, batches(chat(MANY), 8), dtype=torch.float64)
    rows = gather_inputs(model, chat(MANY), stats.layers)
    prompts = chat(MANY)
    assert stats.kind_tokens == (4 * len(MANY), sum(map(len, MANY)), 0)
    assert 0 < stats.held_prompts < len(MANY)
    kinds_of = [[TEMPLATE] * 2 + [REQUEST] * (len(p) - 5) + [TEMPLATE] * 2 for p in prompts]
    for entry in stats.inputs:
        name, sample = entry.layers[0], entry.sample
        assert sample.kinds.bincount().tolist() == [SAMPLED, SAMPLED]
        every = torch.cat([x[1:] for x in rows[name]])
        kinds = torch.tensor([kind for of in kinds_of for kind in of])
        distances = torch.cdist(sample.rows, every, compute_mode="donot_use_mm_for_euclid_dist")
        # Equal tokens at equal places have equal inputs: the kind of one of them must fit.
        for row, kind in enumerate(sample.kinds.tolist()):
            assert kind in kinds[distances[row] < 1e-9].tolist()
    held = [e for e in stats.inputs if e.held is not None]
    assert held and all(
        any(name in probed(stats.layers) for name in e.layers) == (e.held is not None) for e in stats.inputs
    )
    # Some subset of the prompts gives that covariance: the one with as many tokens, found by trying each alone.
    alone = [collect(model, [batch_of([p])], dtype=torch.float64) for p in prompts]
    mine = [one for one in alone if one.held_prompts]
    assert len(mine) == stats.held_prompts
    for i, entry in enumerate(stats.inputs):
        if entry.held is not None:
            C = sum(one.inputs[i].covariance for one in mine)
            torch.testing.assert_close(entry.held_on("cpu"), C)
            assert entry.held_tokens == sum(one.inputs[i].tokens for one in mine)


@pytest.mark.parametrize("side", ["right", "left"])
def test_how_prompts_are_batched_ordered_and_divided_decides_nothing(side):
    model = tiny_llama(dtype=torch.float64)
    prompts = chat(MANY)
    whole = collect(model, batches(prompts, 40), dtype=torch.float64)
    assert_same_samples(collect(model, batches(prompts, 7, side), dtype=torch.float64), whole, exact=False)
    assert_same_samples(collect(model, batches(prompts[::-1], 9), dtype=torch.float64), whole, exact=False)
    a, b = (
        collect(model, batches(prompts[:15], 5), dtype=torch.float64),
        collect(model, batches(prompts[15:], 5, side), dtype=torch.float64),
    )
    assert_same_samples(a.merge(b), whole, exact=False)
    assert_same_samples(a.merge(b), b.merge(a))
    c = collect(model, batches(prompts[10:20], 3), dtype=torch.float64)  # a part of it is in both
    assert_same_samples(a.merge(c), c.merge(a))
    keys = [entry.sample.keys for entry in a.merge(c).inputs]
    assert all(len(k.unique()) == len(k) for k in keys)


def test_interrupted_and_several_passes_keep_the_same_bits(tmp_path):
    model, prompts = tiny_llama(), chat(MANY)
    whole = collect(model, batches(prompts, 8))
    stopped = batches(prompts, 8)

    def some():
        yield from stopped[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gk.collect_statistics(model, some(), progress=False, checkpoint=tmp_path / "c")
    assert_same_samples(collect(model, stopped, checkpoint=tmp_path / "c"), whole)
    passes = collect(model, stopped, max_memory=40_000, checkpoint=tmp_path / "d")
    assert (tmp_path / "d.1").exists()  # several passes
    assert_same_samples(passes, whole)


def test_samples_are_saved_copied_and_pickled(tmp_path):
    stats = collect(tiny_llama(dtype=torch.bfloat16), batches(chat(MANY), 8))
    assert stats.inputs[0].sample.rows.dtype == torch.bfloat16
    stats.save(tmp_path / "s")
    for other in (
        gk.CalibrationStatistics.load(tmp_path / "s"),
        copy.deepcopy(stats),
        pickle.loads(pickle.dumps(stats)),
    ):
        assert_same_samples(other, stats)


def test_statistics_without_samples_are_still_read_and_merged(tmp_path):
    stats = collect(tiny_llama(), batches(chat(MANY), 8))
    old = copy.deepcopy(stats)
    for entry in old.inputs:
        entry.sample, entry.held, entry.held_tokens = None, None, 0
    old.held_prompts, old.kind_tokens = 0, (0, 0, 0)
    old.save(tmp_path / "s")
    loaded = gk.CalibrationStatistics.load(tmp_path / "s")
    assert all(entry.sample is None and entry.held is None for entry in loaded.inputs)
    for merged in (loaded.merge(stats), stats.merge(loaded)):
        assert all(entry.sample is None and entry.held is None for entry in merged.inputs)
        assert merged.inputs[0].tokens == 2 * stats.inputs[0].tokens


def test_answers_are_a_kind_of_their_own():
    model = tiny_llama()
    stats = collect(model, batches(chat(MANY[:6]), 3), answer_tokens=4)
    assert stats.kind_tokens == (4 * 6, sum(map(len, MANY[:6])), 4 * 6)
    assert set(stats.inputs[0].sample.kinds.tolist()) == {TEMPLATE, REQUEST, ANSWER}
    alone = collect(model, batches(chat(MANY[:6]), 3))
    assert alone.held_prompts == stats.held_prompts  # by the prompt, not by its answer


def test_kinds_by_what_all_prompts_share():
    prompts = chat(PROMPTS)
    template = Template()
    batch = batch_of(prompts, "left")
    kinds = template.kinds(batch, 0, batch["attention_mask"].bool())
    for row, prompt in zip(kinds, PROMPTS, strict=True):
        wanted = [TEMPLATE] * 3 + [REQUEST] * len(prompt) + [TEMPLATE] * 2
        assert row[-len(wanted) :].tolist() == wanted
    one = batch_of(chat([[9, 8, 7]]))
    assert template.kinds(one, 1, one["attention_mask"].bool()).tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    # By themselves one prompt, and copies of one, share nothing with others.
    for batch in (one, batch_of(chat([[9, 8, 7]] * 3))):
        assert (Template().kinds(batch, 0, batch["attention_mask"].bool()) == REQUEST).all()
    whole = batch_of([[1, 2], [1, 2, 2], [1, 2, 2, 2]])  # the same tokens begin and end the shortest
    mask = whole["attention_mask"].bool()
    assert Template().kinds(whole, 0, mask)[mask].tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 1]


def test_given_kinds_are_taken_and_the_model_is_not_given_them():
    model, batch = tiny_llama(), batch_of()
    given = torch.zeros_like(batch["input_ids"])
    given[:, 3:] = REQUEST
    stats = collect(model, [{**batch, "token_kinds": given}])
    assert stats.kind_tokens == (2 + 2 + 2 + 1 + 2, 3 + 6 + 1, 0)
    assert torch.equal(stats.inputs[0].covariance, collect(model).inputs[0].covariance)
    answered = collect(model, [{**batch, "token_kinds": given}], answer_tokens=2)
    assert answered.kind_tokens == (9, 10, 10)


@pytest.mark.parametrize(
    "kinds, message",
    [
        (torch.zeros(5, 3, dtype=torch.long), r"batch 0: token_kinds must be integers .*\(5, 9\), got \(5, 3\)"),
        (torch.zeros(5, 9), r"token_kinds must be integers of the shape of the mask"),
        ([[0]], r"token_kinds must be integers .* got list"),
        (torch.full((5, 9), 3), r"must be 0 \(template\), 1 \(request\) or 2 \(answer\), got values from 3 to 3"),
    ],
)
def test_unusable_kinds(kinds, message):
    with pytest.raises(ValueError, match=message):
        collect(tiny_llama(), [{**batch_of(), "token_kinds": kinds}])


def test_the_sample_holds_the_smallest_keys_of_each_kind():
    keys = torch.randint(0, 2**59, (500,), generator=GENERATOR) | (torch.arange(500) % 3) << 60
    twice = torch.cat([keys, keys[:100]])
    assert torch.equal(twice[kept(twice)], torch.cat([keys[keys >> 60 == k].sort().values[:SAMPLED] for k in range(3)]))
    empty = Sample(keys[:0], torch.empty(0, 4))
    one = Sample(keys[:1], torch.ones(1, 4))
    assert torch.equal(empty.merge(one).rows, one.rows) and len(empty.merge(empty).keys) == 0


def test_probes_are_spread_and_not_in_experts():
    names = [f"layers.{i}.{x}" for i in range(30) for x in ("q", "k", "v", "o", "gate", "up", "down")]
    experts = [f"layers.{i}.experts.{j}.up" for i in range(30) for j in range(8)]
    found = probed(names + experts)
    assert len(found) == 8 and found <= set(names)
    assert len({int(name.split(".")[1]) for name in found}) == 8 and len({name.split(".")[2] for name in found}) >= 4
    assert probed(["a"]) == {"a"} and len(probed(["a", "b", "c"])) == 1 and len(probed(names[:32])) == 2
    assert len(probed(experts)) == 8


def test_a_budget_without_room_holds_out_nothing_and_keeps_the_rest():
    inputs = [LayerInput((str(i),), 10, i, held=i == 1) for i in range(5)]
    assert [one.bytes(torch.float32) for one in inputs] == [400, 800, 400, 400, 400]
    roomy, tight = (plan_passes(inputs, torch.float32, budget, None) for budget in (1420, 1400))
    assert [one.held for part in roomy.passes for one in part] == [False, True, False, False, False]
    assert [one.held for part in tight.passes for one in part] == [False] * 5
    assert (roomy.whole_bytes, roomy.stored_bytes, tight.whole_bytes, tight.stored_bytes) == (2400, 1320, 2000, 1100)
    model = PlainModel()
    whole, tight = collect(model, batches(MANY, 8)), collect(model, batches(MANY, 8), max_memory=650)
    assert [e.held is None for e in whole.inputs] == [False, True] and all(e.held is None for e in tight.inputs)
    for a, b in zip(whole.inputs, tight.inputs, strict=True):
        assert torch.equal(a.covariance, b.covariance) and torch.equal(a.sample.rows, b.sample.rows)


def test_prompts_are_told_apart_by_embeddings_too():
    class Embedded(PlainModel):
        def forward(self, inputs_embeds, attention_mask=None):
            return self.out(torch.tanh(self.q(inputs_embeds) + self.k(inputs_embeds)))

    torch.manual_seed(0)
    model, x = Embedded(), torch.randn(24, 4, 10)
    mask = torch.ones(24, 4, dtype=torch.long)
    whole = collect(model, [{"inputs_embeds": x, "attention_mask": mask}])
    parts = [{"inputs_embeds": x[i : i + 5], "attention_mask": mask[i : i + 5]} for i in range(0, 24, 5)]
    assert_same_samples(collect(model, parts), whole, exact=False)
    assert 0 < whole.held_prompts < 24 and whole.kind_tokens == (0, 72, 0)


def test_a_layer_that_joins_an_input_holds_out_as_its_first_reader_does():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(60, 6)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(9))

        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            return sum(layer(x) for layer in self.layers)

    stats = collect(Two(), batches(MANY, 8))
    entry = stats.inputs[0]
    assert len(stats.inputs) == 1 and 0 < entry.held_tokens < entry.tokens
    rest = entry.covariance - entry.held_on("cpu")
    assert torch.linalg.eigvalsh(rest.double())[0] > -1e-4


@pytest.mark.parametrize(
    "weights", [{"template": 0.25}, {"template": 0, "answer": 3.0}, {"request": 0.5, "answer": 0.5}]
)
def test_weights_by_kind(weights, tmp_path):
    model = tiny_llama(dtype=torch.float64)
    options = {"answer_tokens": 3, "dtype": torch.float64}
    parts = batches(chat(MANY), 8, "left")
    plain, stats = collect(model, parts, **options), collect(model, parts, kind_weights=weights, **options)
    given = tuple(float(weights.get(kind, 1.0)) for kind in KINDS)
    assert stats.kind_weights == given and stats.kind_tokens == plain.kind_tokens
    assert stats.weighting == ", ".join(f"{kind} {weight:g}" for kind, weight in zip(KINDS, given, strict=True))
    only = [collect(model, parts, kind_weights={**dict.fromkeys(KINDS, 0), kind: 1}, **options) for kind in KINDS]
    for i, entry in enumerate(stats.inputs):
        C = sum(weight * one.inputs[i].covariance for weight, one in zip(given, only, strict=True))
        torch.testing.assert_close(entry.covariance, C)
        torch.testing.assert_close(sum(one.inputs[i].covariance for one in only), plain.inputs[i].covariance)
        assert entry.tokens == sum(n for n, weight in zip(stats.kind_tokens, given, strict=True) if weight)
        assert torch.equal(entry.sample.rows, plain.inputs[i].sample.rows)
        if entry.held is not None:
            C = sum(weight * one.inputs[i].held_on("cpu") for weight, one in zip(given, only, strict=True))
            torch.testing.assert_close(entry.held_on("cpu"), C)
    stats.save(tmp_path / "s")
    assert gk.CalibrationStatistics.load(tmp_path / "s").kind_weights == given
    assert stats.merge(stats).kind_weights == given
    with pytest.raises(ValueError, match=r"to merge weigh kinds of tokens by .* and .*; collect both with the same"):
        stats.merge(plain)


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (
            {"system": 1},
            ValueError,
            "kind_weights must be a mapping of template, request, answer to numbers, or None, got .*system",
        ),
        ({"request": -1}, ValueError, r"kind_weights\['request'\] must be a number of 0 or more, got -1"),
        ({"request": "1"}, TypeError, r"kind_weights\['request'\] must be a number of 0 or more"),
        ([1, 1, 1], TypeError, "kind_weights must be a mapping of template, request, answer to numbers, or None"),
        (dict.fromkeys(KINDS, 0), ValueError, "kind_weights must leave one kind a weight above 0, got 0 for all"),
    ],
)
def test_unusable_weights(weights, error, message):
    with pytest.raises(error, match=message):
        collect(tiny_llama(), kind_weights=weights)


def test_weights_need_kinds(tmp_path):
    from test_routing import tiny_moe

    with pytest.raises(ValueError, match=r"layer .*mlp\..* of which kinds they are is not known.* leave it out"):
        collect(tiny_moe(), batches(chat(MANY), 8), kind_weights={"template": 0.5})
    collect(tiny_llama(), batches(MANY, 8), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"was made with .*, this call has .*kind_weights"):
        collect(tiny_llama(), batches(MANY, 8), checkpoint=tmp_path / "c", kind_weights={"template": 0.5})


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_shared_prefix_is_kept_apart_like_the_first_token(side):
    model = tiny_llama(dtype=torch.float64)
    options = {"answer_tokens": 2, "dtype": torch.float64}
    prompts = chat(MANY[:20])
    plain = collect(model, batches(prompts, 5, side), **options)
    for limit, apart in ((2, 2), (3, 3), (9, 3)):
        stats = collect(model, batches(prompts, 5, side), separate_prefix=limit, **options)
        assert stats.kind_tokens == (plain.kind_tokens[0] - (apart - 1) * 20, *plain.kind_tokens[1:])
        for a, b in zip(stats.inputs, plain.inputs, strict=True):
            assert len(a.sinks) == apart and len(b.sinks) == 1 and a.sink_tokens == apart * 20
            assert a.tokens == b.tokens - (apart - 1) * 20
            more = a.sinks[1:]
            torch.testing.assert_close(a.covariance + 20 * more.T @ more, b.covariance)
    singly = collect(model, batches(prompts, 1, side), separate_prefix=3, **options)
    for a, b in zip(
        singly.inputs, collect(model, batches(prompts, 5, side), separate_prefix=3, **options).inputs, strict=True
    ):
        assert len(a.sinks) == 3 and a.sink_tokens == 3 * 20
        torch.testing.assert_close(a.covariance, b.covariance)
    with pytest.raises(ValueError, match="separate_prefix needs separate_sink=True"):
        collect(model, separate_prefix=2, separate_sink=False)
    with pytest.raises(ValueError, match="separate_prefix must be 0 or more, got -1"):
        collect(model, separate_prefix=-1)
