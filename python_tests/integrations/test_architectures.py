"""The method end to end on many architectures: a model is exact in everything, or refused, never accepted and wrong."""

from __future__ import annotations

import re
from functools import cached_property

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, Architecture

import guardspace_kernels as gk
from guardspace_kernels.guard.layers import is_conv1d

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = [[5, 9, 3, 7, 11, 4], [5, 2, 6], [8, 3, 9, 9, 10, 12, 6, 2, 7], [5, 13], [8, 4, 12, 3, 20, 21, 22]]


class Subject:
    """An architecture with its statistics, its plan and a guarded model that was trained, each made once."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.base = architecture.build()

    def collect(self, batches, **options):
        return gk.collect_statistics(self.base, batches, self.architecture.target, progress=False, **options)

    @cached_property
    def statistics(self):
        """Of prompts one by one, without padding."""
        return self.collect([self.architecture.batch([prompt]) for prompt in PROMPTS])

    @cached_property
    def plan(self):
        config = gk.GuardConfig(rank=1, alpha=3.0, protect=0.9)
        return gk.plan_guard(self.base, self.statistics, config, progress=False, allow_few_prompts=True)

    def guarded(self, residual="virtual"):
        return gk.attach_guard(self.architecture.build(), self.plan, residual=residual).eval()

    @cached_property
    def trained(self):
        """After a few steps on other prompts, so far that the adapter shows everywhere."""
        model = self.guarded().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            prompts = torch.randint(2, VOCAB - 1, (2, 7), generator=generator).tolist()
            self.logits(model, prompts).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    def logits(self, model, prompts=PROMPTS[2:3]):
        batch = self.architecture.batch(prompts)
        return model(**batch).logits.float()

    def unpadded_covariances(self):
        """(name -> C, name -> rows in it), by hooks of our own: each prompt alone, its tokens and nothing else."""
        names = self.statistics.layers
        sums, rows = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        handles = []
        for name in names:

            def hook(_module, args, name=name):
                x = args[0].detach().double().reshape(-1, args[0].shape[-1])[1:]
                sums[name], rows[name] = sums[name] + x.T @ x, rows[name] + len(x)

            handles.append(self.base.get_submodule(name).register_forward_pre_hook(hook))
        with torch.no_grad():
            for prompt in PROMPTS:
                batch = self.architecture.batch([prompt])
                del batch["attention_mask"]
                self.base(**batch)
        for handle in handles:
            handle.remove()
        return sums, rows


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda architecture: architecture.name)
def subject(request):
    with torch.random.fork_rng():
        return Subject(request.param)


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def base_weights(model):
    """Name -> parameter of the base model under an adapter."""
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.get_base_model().named_parameters()
        if "lora_" not in name
    }


def test_all_linear_leaves_heads_alone_out(subject):
    if subject.architecture.target != "all-linear":
        pytest.skip("its layers are named")
    linear = {n for n, m in subject.base.named_modules() if isinstance(m, torch.nn.Linear) or is_conv1d(m)}
    head = re.compile(r"(lm_|.*_lm_)?head(\..*)?|.*predictions?\..*|generator_.*|output_projection|decoder|vocab_.*")
    assert [name for name in linear - set(subject.statistics.layers) if not head.fullmatch(name)] == []


def test_statistics_are_those_of_unpadded_prompts(subject):
    wanted, rows = subject.unpadded_covariances()
    assert {name: subject.statistics.for_layer(name).tokens for name in wanted} == rows
    worst = max(relative(subject.statistics.for_layer(name).covariance, C) for name, C in wanted.items())
    assert worst < 1e-4


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_or_is_refused(subject, side):
    batches = [subject.architecture.batch(PROMPTS, side)]
    if side in subject.architecture.refused:
        with pytest.raises(ValueError, match="pad"):
            subject.collect(batches)
        return
    padded = subject.collect(batches)
    assert padded.layers == subject.statistics.layers
    worst = max(
        relative(padded.for_layer(name).covariance, subject.statistics.for_layer(name).covariance)
        for name in padded.layers
    )
    assert worst < 1e-4


def test_several_passes_give_the_bits_of_one(subject):
    batches = [subject.architecture.batch([prompt]) for prompt in PROMPTS]
    widest = max(entry.features for entry in subject.statistics.inputs)
    several = subject.collect(batches, max_memory=3 * 4 * widest**2)
    for name in subject.statistics.layers:
        one, other = subject.statistics.for_layer(name), several.for_layer(name)
        assert torch.equal(one.covariance, other.covariance) and one.tokens == other.tokens, name


@pytest.mark.parametrize("residual", ["virtual", "frozen"])
def test_starts_at_the_base_model(subject, residual):
    with torch.no_grad():
        base = subject.logits(subject.base)
        assert relative(subject.logits(subject.guarded(residual)), base) < 1e-5


def test_protected_directions_keep_their_outputs(subject, tiny):
    trained = subject.trained
    with torch.no_grad():
        moved = relative(subject.logits(trained), subject.logits(subject.base))
    protected, _ = tiny.drift(trained)
    assert protected < 1e-6 < 1e-5 < moved


def test_reloads_in_plain_peft(subject, tmp_path):
    import peft

    gk.export_lora(subject.trained, tmp_path / "lora")
    subject.trained.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        wanted = subject.logits(subject.trained)
        for folder in ("lora", "saved"):
            plain = peft.PeftModel.from_pretrained(subject.architecture.build(), str(tmp_path / folder)).eval()
            assert relative(subject.logits(plain), wanted) < 1e-5


def test_merges_and_unmerges_bit_for_bit(subject):
    trained = subject.trained
    before = base_weights(trained)
    with torch.no_grad():
        wanted = subject.logits(trained)
        trained.merge_adapter()
        merged = subject.logits(trained)
        trained.unmerge_adapter()
    assert relative(merged, wanted) < 1e-4
    after = base_weights(trained)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and not changed
