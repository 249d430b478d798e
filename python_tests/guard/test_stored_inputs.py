"""Statistics and checkpoints whose hashes fit, and whose content cannot be."""

import pytest
import torch
from guard_helpers import PlainModel, batch_of, collect, plan_for, rewrite

import guardspace_kernels as gk
from guardspace_kernels.guard.statistics import InputStatistics, packed

PATH = "s.safetensors"


def poke(name, place, value):
    def change(tensors, _):
        tensors[name].reshape(-1)[place] = value

    return change


def entry(**fields):
    return lambda _, header: header["inputs"][0].update(fields)


# In a triangle the diagonal is at 0, 2, 5, ...
ON_READING = {
    "NaN": (poke("0.covariance", 7, torch.nan), "hold non-finite values"),
    "infinity": (poke("0.covariance", 7, torch.inf), "hold non-finite values"),
    "a negative diagonal": (poke("0.covariance", 5, -1e-3), "hold a negative diagonal"),
    "a large entry": (poke("0.covariance", 1, 1e6), "hold entries that are larger than any on the diagonal"),
    "a large negative entry": (poke("0.covariance", 1, -1e6), "hold entries that are larger than any"),
    "zeros": (lambda t, _: t["0.covariance"].zero_(), r"hold a covariance of \d+ tokens that is zero"),
    "no tokens": (entry(tokens=0, held_tokens=0), "hold a covariance of no token that is not zero"),
}
ON_LOADING = {
    "a sink that is NaN": (poke("0.sinks", 0, torch.nan), "hold non-finite first tokens"),
    "fewer first tokens than rows": (entry(sink_tokens=1), "hold 2 distinct first tokens of 1"),
    "first tokens without rows": (
        lambda t, _: t.update({"0.sinks": t["0.sinks"][:0]}), "hold 0 distinct first tokens of 5",
    ),
    "rows that are NaN": (poke("0.rows", 7, torch.nan), "hold non-finite sampled rows"),
    "rows of another width": (
        lambda t, _: t.update({"0.rows": t["0.rows"][:, :9]}), r"keys of sampled rows, which are \(\d+, 9\), of 10 f",
    ),
    "keys out of order": (lambda t, _: t.update({"0.keys": t["0.keys"].flip(0)}), "whose keys are out of order"),
    "a negative key": (poke("0.keys", 0, -1), "whose keys are out of order"),
    "a key of another kind": (poke("0.keys", -1, 2**62), "whose keys are out of order"),
    "keys that are no whole numbers": (
        lambda t, _: t.update({"0.keys": t["0.keys"].double()}), "'0.keys' is torch.float64 of shape",
    ),
    "keys alone": (lambda t, _: t.pop("0.rows"), r"lacks the tensor '0\.rows'"),
    "rows alone": (lambda t, _: t.pop("0.keys"), r"has a tensor '0\.rows', which belongs to nothing"),
    "held out: a triangle of another width": (
        lambda t, _: t.update({"0.held": t["0.held"][:50]}), "a triangle of 50 entries",
    ),
    "held out: more than there are": (entry(held_tokens=1000), r"hold out 1000 of \d+ tokens, with C"),
    "held out: tokens alone": (lambda t, _: t.pop("0.held"), r"hold out \d+ of \d+ tokens, without C"),
    "kinds of two": (lambda _, h: h.update(kind_tokens=[1, 2]), r"header\.kind_tokens must be a list of 3 entries"),
    "another width": (
        lambda t, _: t.update({"0.sinks": t["0.sinks"][:, :9]}), "inputs of 9 features, a triangle of 55 entries",
    ),
    "no width": (lambda t, _: t.update({"0.sinks": t["0.sinks"][:, :0]}), "inputs of 0 features, a triangle of 55"),
    "two dtypes": (
        lambda t, _: t.update({"0.covariance": t["0.covariance"].double()}), r"inputs of 10 features.* torch\.float64",
    ),
    "half": (lambda t, _: t.update({"0.covariance": t["0.covariance"].half()}), "is torch.float16 of shape"),
    "a matrix": (
        lambda t, _: t.update({"0.covariance": t["0.covariance"][None]}), r"of shape \(1, 55\), expected .*\(any\)",
    ),
    "a tensor less": (lambda t, _: t.pop("1.sinks"), r"lacks the tensor '1\.sinks'"),
    "a tensor more": (lambda t, _: t.update(x=torch.ones(1)), "has a tensor 'x', which belongs to nothing"),
    "a layer twice": (lambda _, h: h["inputs"][1].update(layers=["out", "q"]), "out are of q, which is there twice"),
    "an unknown layer": (entry(layers=["q", "v"]), "layer q are of v, which is unknown"),
    "no layer": (entry(layers=[]), r"inputs\[0\]\.layers must be a list of 1 or more entries"),
    "layers of numbers": (entry(layers=[1]), r"inputs\[0\]\.layers\[0\] must be a text, got 1"),
    "a negative count": (entry(tokens=-1), r"inputs\[0\]\.tokens must be a whole number of 0 or more, got -1"),
    "half a token": (entry(tokens=1.5), r"inputs\[0\]\.tokens must be a whole number of 0 or more, got 1\.5"),
    "true tokens": (entry(tokens=True), "must be a whole number of 0 or more, got True"),
    "a huge count": (entry(tokens=10**30), "must be a whole number of 0 or more"),
    "routed by a text": (entry(routed="no"), "routed must be true or false, got 'no'"),
    "an entry that is a list": (lambda _, h: h["inputs"].__setitem__(0, []), r"inputs\[0\] must be an object, got"),
    "no inputs": (lambda _, h: h.pop("inputs"), "header lacks inputs"),
    "no prompts": (lambda _, h: h.update(prompts=0), "counts 0 prompts, but 1 or more were collected"),
    "held out: more prompts than there are": (lambda _, h: h.update(held_prompts=6), "5 prompts.* 6 of them can"),
    "prompts of text": (lambda _, h: h.update(prompts="5"), r"header\.prompts must be a whole number"),
    "no fingerprint": (lambda _, h: h.update(fingerprint=None), r"header\.fingerprint must be an object, got None"),
    "a fingerprint of numbers": (lambda _, h: h["fingerprint"].update(model=1), "model must be a text, got 1"),
    "a field more": (lambda _, h: h.update(x=1), "header has an unknown entry 'x'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stats():
    return collect(PlainModel())


@pytest.mark.parametrize("case", [*ON_LOADING, *ON_READING])
def test_impossible_statistics_are_refused_by_file_and_layer(stats, tmp_path, case):
    path = tmp_path / PATH
    stats.save(path)
    change, match = {**ON_LOADING, **ON_READING}[case]
    rewrite(path, change)
    load = gk.CalibrationStatistics.load
    if case in ON_READING:
        loaded = load(path)
        _ = loaded.for_layer("out").covariance  # the others are read as ever
        load = lambda _: loaded.for_layer("q").covariance  # noqa: E731
    with pytest.raises(ValueError, match=match) as raised:
        load(path)
    assert str(raised.value).startswith(str(path))
    if case in ON_READING:
        assert "the statistics of layer q hold" in str(raised.value) and "collect them again" in str(raised.value)


def test_covariances_of_held_out_prompts_are_checked_too(stats, tmp_path):
    stats.save(tmp_path / PATH)
    rewrite(tmp_path / PATH, poke("0.held", 7, torch.nan))
    loaded = gk.CalibrationStatistics.load(tmp_path / PATH)
    _ = loaded.for_layer("q").covariance
    with pytest.raises(ValueError, match="the statistics of layer q hold non-finite values; collect them again"):
        loaded.for_layer("q").held_on("cpu")


@pytest.mark.parametrize("case", ON_READING)
def test_nothing_is_made_of_impossible_statistics(stats, tmp_path, case):
    model = PlainModel()
    guarded = gk.attach_guard(PlainModel(), plan_for(model, stats))
    stats.save(tmp_path / PATH)
    rewrite(tmp_path / PATH, ON_READING[case][0])
    for use in (
        lambda wrong: plan_for(model, wrong),
        lambda wrong: gk.certify(guarded, wrong, max_drift=1.0),
        lambda wrong: wrong.merge(stats),
        lambda wrong: wrong.save(tmp_path / "copy"),
    ):
        with pytest.raises(ValueError, match=r"the statistics of layer q hold|layer q: no token was counted"):
            use(gk.CalibrationStatistics.load(tmp_path / PATH))
    assert not (tmp_path / "copy").exists()


def test_rounding_is_no_reason_to_refuse(tmp_path):
    """Inputs that are all alike: every entry is as large as the diagonal."""
    x = torch.full((1000, 6), 0.1)
    stats = collect(PlainModel())
    C = x.T @ x
    C[1, 0] *= 1 + 1e-5
    stats.inputs[0] = InputStatistics(["q", "k"], packed(C), 1000, x[:1], 1)
    stats.save(tmp_path / PATH)
    assert torch.equal(gk.CalibrationStatistics.load(tmp_path / PATH).inputs[0].triangle(), packed(C))


BATCHES = [batch_of([[5, 9, 3, 7]]), batch_of([[5, 2, 6], [8, 3, 9, 9, 10]])]


class Stop(Exception):
    pass


def interrupted():
    yield BATCHES[0]
    raise Stop


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / PATH
    with pytest.raises(Stop):
        collect(PlainModel(), interrupted(), checkpoint=path)
    return path


CHECKPOINTS = {
    **{name: ON_READING[name] for name in ON_READING if name not in ("zeros", "no tokens")},
    **{
        name: ON_LOADING[name]
        for name in (
            "a sink that is NaN", "another width", "two dtypes", "a tensor less", "a tensor more", "no prompts",
        )
    },
    "no tokens": (
        lambda _, h: h["inputs"][0].__setitem__(slice(1, 5), [0, 2, 0, 0]),
        "hold a covariance of no token that is not zero",
    ),
    "a negative count": (lambda _, h: h["inputs"][0].__setitem__(1, -1), r"inputs\[0\]\[1\] must be a whole number"),
    "four fields": (lambda _, h: h["inputs"][0].pop(), r"inputs\[0\] must be a list of 5 entries"),
    "a later batch": (lambda _, h: h["inputs"][0].__setitem__(3, 1), "from batch 1 of 1 on, in torch.float32 and"),
    "another layer's": (
        lambda _, h: (h["inputs"][0].__setitem__(0, ["out"]), h["inputs"][1].__setitem__(0, ["q", "k"])),
        "an input of layer out from batch 0 of 1 on, in torch.float32 and with 10 features, which this call cannot",
    ),
    "float64": (
        lambda t, _: t.update({name: one.double() for name, one in t.items() if "keys" not in name}),
        "on, in torch.float64 and with 10 features",
    ),
    "batches of numbers": (lambda _, h: h.update(batches=[1]), r"header\.batches\[0\] must be a text"),
    "routed by texts": (lambda _, h: h.update(routed=["a", "b"]), r"header\.routed\[0\] must be a list"),
    "options that are a list": (lambda _, h: h.update(options=[]), r"header\.options must be an object"),
    "no options": (lambda _, h: h.pop("options"), "header lacks options"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_impossible_checkpoints_are_refused_by_name(checkpoint, case):
    change, match = CHECKPOINTS[case]
    rewrite(checkpoint, change)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=match) as raised:
        collect(PlainModel(), BATCHES, checkpoint=checkpoint)
    assert str(checkpoint) in str(raised.value) and checkpoint.read_bytes() == before


def test_checkpoints_of_earlier_versions_are_refused(checkpoint):
    """What they lack would be missing in the statistics."""
    rewrite(checkpoint, lambda *_: None, earlier=True)
    with pytest.raises(ValueError, match="has format version 1, this library reads 2; write it again"):
        collect(PlainModel(), BATCHES, checkpoint=checkpoint)


def test_a_checkpoint_may_hold_zeros(checkpoint):
    """Later prompts may have others."""
    rewrite(checkpoint, lambda tensors, _: tensors["0.covariance"].zero_())
    resumed, whole = collect(PlainModel(), BATCHES, checkpoint=checkpoint), collect(PlainModel(), BATCHES)
    assert resumed.inputs[0].tokens == whole.inputs[0].tokens
    assert 0 < resumed.inputs[0].covariance.trace() < whole.inputs[0].covariance.trace()
