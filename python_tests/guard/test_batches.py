"""Prompts that are longer than a model has positions for."""

import pytest
import torch
from guard_helpers import batch_of, collect, perturb, plan_for, tiny_gpt2, tiny_llama

import guardspace_kernels as gk

LONG = [list(range(1, 8)), [5] * 60]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_beyond_the_models_positions_are_named(side):
    model = tiny_gpt2()
    assert collect(model, [batch_of([[5] * 64], side)]).prompts == 1
    with pytest.raises(ValueError, match="batch 1: prompt 1 has 65 tokens, but the model has 64 positions; shorten"):
        collect(model, [batch_of(), batch_of([[5, 6], [5] * 65], side, width=70)])
    # Padding takes no position.
    assert collect(model, [batch_of([[5, 6], [5] * 60], side, width=70)]).prompts == 2
    assert collect(model, [batch_of(LONG, side)], answer_tokens=4).prompts == 2
    with pytest.raises(ValueError, match="prompt 1 has 65 tokens with 5 of its answer, but the model has 64 positions"):
        collect(model, [batch_of(LONG, side)], answer_tokens=5)


def test_positions_that_are_given_count_instead_of_tokens():
    model = tiny_llama(max_position_embeddings=8)
    ids = torch.arange(1, 13)[None]
    packed = {"input_ids": ids, "position_ids": torch.arange(12)[None] % 6}
    gk.guard.batches.check_length(model, packed, 0)
    with pytest.raises(ValueError, match="prompt 0 has 12 tokens, but the model has 8 positions"):
        gk.guard.batches.check_length(model, {**packed, "position_ids": torch.arange(12)[None]}, 0)


def test_heldout_prompts_of_a_certificate_are_checked_with_their_answers():
    model = tiny_gpt2()
    stats = collect(model)
    guarded = perturb(gk.attach_guard(model, plan_for(model, stats)))
    with pytest.raises(ValueError, match="batch 0: prompt 1 has 65 tokens with 5 of its answer"):
        gk.certify(guarded, stats, [batch_of(LONG)], answer_tokens=5)


def test_masks_are_of_ones_and_zeros():
    ids = torch.ones(1, 3, dtype=torch.long)
    assert collect(tiny_gpt2(), [{"input_ids": ids, "attention_mask": torch.ones(1, 3)}]).prompts == 1
    for mask in (
        torch.zeros(1, 3),
        torch.tensor([[1, 1, 2]]),
        torch.tensor([[0.0, float("-inf"), 0.0]]),
        ids * torch.nan,
    ):
        with pytest.raises(
            ValueError, match=r"batch 0: .*(must hold 1 at real tokens and 0 at padding|is all padding)"
        ):
            collect(tiny_gpt2(), [{"input_ids": ids, "attention_mask": mask}])
