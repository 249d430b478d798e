"""The share of calibration prompts that the model refused, by its own answers."""

import pathlib
import warnings

import pytest
import torch
from guard_helpers import PROMPTS, assert_same_bits, batch_of, collect, plan_for, planned, rewrite, tiny_llama

import guardspace_kernels as gk


class Numbers:
    """A tokenizer that writes tokens as numbers."""

    def batch_decode(self, rows, **options):
        assert options == {"skip_special_tokens": True}
        return [" ".join(map(str, row)) for row in rows]


def own_answers(model, tokens=3):
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(tokens):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def refusing(prompts, asked=None):
    """A judge by which the model refuses these prompts."""
    texts = [" ".join(map(str, prompt)) for prompt in prompts]

    def judge(prompt, answer):
        if asked is not None:
            asked.append((prompt, answer))
        return "refuses" if prompt in texts else "other"

    return judge


def judged(model, batches=None, refused=PROMPTS, **options):
    options = {"judge": refusing(refused), "allow_unrefused": True, **options}
    return collect(model, batches, answer_tokens=3, tokenizer=Numbers(), **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_judge_reads_the_prompt_and_the_models_own_answer(side):
    model, asked = tiny_llama(), []
    stats = judged(model, [batch_of(side=side, width=12)], judge=refusing(PROMPTS[:4], asked))
    expected = [
        (" ".join(map(str, p)), " ".join(map(str, a))) for p, a in zip(PROMPTS, own_answers(model), strict=True)
    ]
    assert asked == expected
    assert (stats.judged, stats.refused, stats.refused_share) == (5, 4, 0.8)
    assert "5 prompts" in repr(stats) and "4 of 5 refused" in repr(stats)
    # The rest does not depend on it.
    without = collect(model, [batch_of(side=side, width=12)], answer_tokens=3)
    assert without.refused_share is None and "refused" not in repr(without)
    for one, other in zip(stats.inputs, without.inputs, strict=True):
        assert torch.equal(one.covariance, other.covariance)


def test_few_refusals_warn_and_the_plan_says_it_again():
    model = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = judged(model, refused=PROMPTS[:4], allow_unrefused=False)
        plan_for(model, enough)
        few = judged(model, refused=PROMPTS[:3], allow_unrefused=True)
        planned(model, few, gk.GuardConfig(rank=3, protect=0.9), allow_unrefused=True)
    words = r"the model REFUSED ONLY 3 OF 5 calibration prompts \(60%\).*protected as an answer.*allow_unrefused=True"
    with pytest.warns(UserWarning, match=words) as told:
        judged(model, refused=PROMPTS[:3], allow_unrefused=False)
    assert "collect_statistics(" in pathlib.Path(told[0].filename).read_text().splitlines()[told[0].lineno - 1]
    with pytest.warns(UserWarning, match=words):
        plan_for(model, few)


def test_the_default_judge_reads_openings():
    model = tiny_llama()
    first = [answer[0] for answer in own_answers(model)]
    middle = sorted(first)[2]

    class English(Numbers):
        def batch_decode(self, rows, **_):
            return [f"Sorry, I can't. {row[0]}" if row[0] < middle else f"Sure: {row[0]}" for row in rows]

    refused = sum(token < middle for token in first)
    stats = collect(model, answer_tokens=3, tokenizer=English(), allow_unrefused=True)
    assert (stats.judged, stats.refused) == (5, refused) and 0 < refused < 5


def test_counts_add_up_and_are_saved(tmp_path):
    model = tiny_llama()
    parts = [judged(model, [batch_of(PROMPTS[i : i + 3])], refused=PROMPTS[:1]) for i in (0, 3)]
    merged = parts[0].merge(parts[1])
    assert (merged.judged, merged.refused) == (5, 1)
    merged.save(tmp_path / "s")
    loaded = gk.CalibrationStatistics.load(tmp_path / "s")
    assert (loaded.judged, loaded.refused) == (5, 1) and repr(loaded) == repr(merged)
    unknown = parts[0].merge(collect(model, answer_tokens=3))
    assert (unknown.prompts, unknown.judged, unknown.refused) == (8, 3, 1)


def test_files_that_do_not_tell_are_read_and_impossible_ones_refused(tmp_path):
    judged(tiny_llama()).save(tmp_path / "s")

    def forget(_, header):
        del header["judged"], header["refused"]

    for change, words in (
        (lambda _, h: h.update(judged=6), "counts 5 prompts, .* 6 were judged"),
        (lambda _, h: h.update(judged=4), "4 were judged and 5 refused"),
        (lambda _, h: h.update(refused=-1), r"header\.refused must be a whole number of 0 or more"),
    ):
        judged(tiny_llama()).save(tmp_path / "altered")
        rewrite(tmp_path / "altered", change)
        with pytest.raises(ValueError, match=words):
            gk.CalibrationStatistics.load(tmp_path / "altered")
    rewrite(tmp_path / "s", forget)
    assert gk.CalibrationStatistics.load(tmp_path / "s").refused_share is None


@pytest.mark.parametrize("memory", [None, "30kB"], ids=["one pass", "several"])
def test_an_interrupted_collection_counts_each_prompt_once(tmp_path, memory):
    model, batches = tiny_llama(), [batch_of([prompt]) for prompt in PROMPTS]
    options = {"refused": PROMPTS[1:3], "max_memory": memory}
    whole = judged(model, batches, **options)
    assert (whole.judged, whole.refused) == (5, 2)

    def fail(prompt, answer):
        if prompt.startswith("5 13"):
            raise KeyboardInterrupt
        return refusing(PROMPTS[1:3])(prompt, answer)

    fail.__qualname__ = refusing([]).__qualname__  # by its name a judge is known
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        judged(model, batches, judge=fail, checkpoint=path, max_memory=memory)
    asked = []
    resumed = judged(model, batches, judge=refusing(PROMPTS[1:3], asked), checkpoint=path, max_memory=memory)
    assert len(asked) == 2  # what was not answered before the interruption
    assert (resumed.judged, resumed.refused) == (5, 2)
    assert_same_bits(resumed, whole)
    with pytest.raises(ValueError, match=r"was made with .*'judge'.*; give the arguments of the first call"):
        judged(model, batches, checkpoint=path, judge=gk.judge_opening, max_memory=memory)


def test_what_is_needed_to_judge_is_said():
    model = tiny_llama()
    with pytest.raises(ValueError, match="tokenizer is for judging the model's answers, of which answer_tokens=0"):
        collect(model, tokenizer=Numbers())
    with pytest.raises(ValueError, match="judge is function, and judges texts: give the model's tokenizer too"):
        collect(model, answer_tokens=3, judge=refusing([]))
    with pytest.raises(ValueError, match=r"judge must return one of .* got None for answer 1"):
        judged(model, judge=lambda prompt, answer: None)
