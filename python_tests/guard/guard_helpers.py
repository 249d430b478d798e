"""Tiny models and independent float64 computations that the tests of ``guard/`` share."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import guardspace_kernels as gk
from guardspace_kernels.guard.files import load_tensors, save_tensors

PROMPTS = ([5, 9, 3, 7, 11, 4], [5, 2, 6], [8, 3, 9, 9, 10, 12, 6, 2, 7], [5, 13], [8, 4, 12, 3])


def tiny_llama(seed=0, dtype=torch.float32, tied=False, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 60,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype).eval()


def tiny_gpt2(seed=0, dtype=torch.float32):
    """Conv1D layers, absolute positions, biases (random ones: GPT-2 starts them at zero)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=2, n_positions=64, vocab_size=60, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


class PlainModel(nn.Module):
    """No transformers. q and k read ``reads``: "same" tensor, "other" tensors, one changed "inplace" in between, or
    "flip": the same one but for prompts with token 49."""

    def __init__(self, reads="same", d=10, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.reads = reads
        self.embed = nn.Embedding(60, d)
        self.q, self.k, self.out = nn.Linear(d, 8), nn.Linear(d, 8, bias=False), nn.Linear(8, d)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        q = self.q(h)
        other = self.reads == "other" or (self.reads == "flip" and bool((input_ids == 49).any()))
        if self.reads == "inplace":
            h.add_(1.0)
        return self.out(torch.tanh(q + self.k(h.clone() * 2 if other else h)))


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "plain": lambda seed=0: PlainModel(seed=seed)}


def batch_of(prompts=PROMPTS, side="right", width=None):
    """One padded batch; padding is a token that would change every statistic if it counted."""
    width = width or max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), 50), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        here = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, here], mask[row, here] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def gather_inputs(model, prompts, names):
    """Name -> one float64 (tokens, d_in) per prompt: every prompt alone, without padding, through hooks of our own."""
    rows = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: rows[name].append(args[0].detach().double().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    was_training = model.training
    model.eval()
    for prompt in prompts:
        model(torch.tensor([prompt]))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return rows


def hand_made(model, prompts, names, separate_sink=True):
    """Name -> (X, C, first-token inputs), independent of the library."""
    made = {}
    for name, rows in gather_inputs(model, prompts, names).items():
        X = torch.cat([x[1:] if separate_sink else x for x in rows])
        made[name] = X, X.T @ X, torch.stack([x[0] for x in rows])
    return made


def collect(model, batches=None, **kwargs):
    return gk.collect_statistics(model, [batch_of()] if batches is None else batches, progress=False, **kwargs)


def planned(model, stats, config=None, **options):
    """A plan from a few tiny prompts, which the library refuses unless it is told otherwise."""
    return gk.plan_guard(model, stats, config, progress=False, allow_few_prompts=True, **options)


def plan_for(model, stats=None, **config):
    config = {"rank": 3, "protect": 0.9, **config}
    return planned(model, collect(model) if stats is None else stats, gk.GuardConfig(**config))


def perturb(guarded, seed=1, size=0.3):
    """Stands for training: moves A and B of every adapted layer anywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in guarded.named_parameters():
            if "lora_" in name:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p) * (p.abs().mean() + 0.1))
    return guarded


def dense_projector(basis, complement):
    basis = basis.double()
    onto = basis @ basis.T
    return torch.eye(basis.shape[0], dtype=torch.float64) - onto if complement else onto


def weight_of(model, name):
    """(d_out, d_in) in float64."""
    module = model.get_submodule(name)
    weight = module.weight.detach().to(torch.float64, copy=True)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def relative_error(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))


def assert_same_bits(a, b):
    assert repr(a) == repr(b) and a.fingerprint == b.fingerprint
    for x, y in zip(a.inputs, b.inputs, strict=True):
        assert (x.layers, x.tokens, x.sink_tokens) == (y.layers, y.tokens, y.sink_tokens)
        assert torch.equal(x.covariance, y.covariance) and torch.equal(x.sinks, y.sinks)


def rewrite(path, change, earlier=False):
    """Calls ``change(tensors, header)`` on a file's content and writes it again: with the hashes of the new content, as
    a forger would, or as an ``earlier`` version, without."""
    with safe_open(path, framework="pt") as file:
        kind = json.loads(file.metadata()["guardspace"])["kind"]
    tensors, header = load_tensors(path, kind)
    change(tensors, header)
    if earlier:
        header = {**header, "version": header["version"] - 1}
        save_file(tensors, path, metadata={"format": "pt", "guardspace": json.dumps(header)})
    else:
        save_tensors(path, kind, tensors, header)
