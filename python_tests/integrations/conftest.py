"""Tiny models, their plans, and what to ask of a guarded one."""

from __future__ import annotations

import functools
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import guardspace_kernels as gk

VOCAB, TOKENS = 64, 9


Output = namedtuple("Output", "logits loss")


class Plain(nn.Module):
    """No transformers, no generate, biases, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12)
        self.up = nn.Linear(12, 20)
        self.mix = nn.Linear(20, 20)
        self.down = nn.Linear(20, VOCAB)

    def forward(self, input_ids, labels=None):
        h = self.mix(self.up(self.embed(input_ids)).tanh()).tanh()
        logits = self.down(h + h.roll(1, dims=-2))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return Output(logits, loss)


def _gpt2(cls, **kwargs):
    return cls(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0, **kwargs))


def base(kind="llama", dtype=torch.float32):
    """A base model, the same whenever it is built."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            config = LlamaConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
        elif kind == "plain":
            model = Plain()
        else:
            model = _gpt2(*{"gpt2": (GPT2LMHeadModel,), "classifier": (GPT2ForSequenceClassification,)}[kind])
        for name, p in model.named_parameters():
            if name.endswith("bias") or "score" in name:
                nn.init.normal_(p, std=0.5)
            elif p.dim() == 2:
                p.data *= 4  # far from the linear regime, so that a wrong layer shows in the logits
    return model.to(dtype).eval()


def batch(kind="llama", seed=0):
    ids = torch.randint(2, VOCAB, (4, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if kind == "classifier" else ids}


@functools.cache
def statistics(kind="llama", dtype=torch.float32):
    return gk.collect_statistics(base(kind, dtype), [{"input_ids": batch(kind, 7)["input_ids"][:, :4]}], progress=False)


@functools.cache
def plan(kind="llama", dtype=torch.float32, **config):
    made = gk.plan_guard(
        base(kind, dtype),
        statistics(kind, dtype),
        gk.GuardConfig(**{"rank": 2, "alpha": 3.0, "protect": 0.9, **config}),
        progress=False,
        allow_few_prompts=True,
    )
    if dtype == torch.float64:  # plans are kept in float32: orthonormal to 1e-7, too little for some tests
        for space in made.spaces:
            space.basis = torch.linalg.qr(space.basis.double()).Q
        for name, layer in made.layers.items():
            space = made.space_of(name)
            layer.A0 = layer.A0.double()
            gk.ops.null_project_(layer.A0, space.basis, space.complement)
    return made


def guarded(kind="llama", dtype=torch.float32, residual="virtual", adapter_name="default", **config):
    return gk.attach_guard(
        base(kind, dtype), plan(kind, dtype, **config), residual=residual, adapter_name=adapter_name
    ).eval()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters, **kwargs):
    return torch.optim.AdamW(parameters, **{"lr": 1e-2, "weight_decay": 0.1, **kwargs})


def train(model, optimizer=None, steps=4, kind="llama", clip=None, accumulate=1):
    """Losses of a few steps; every micro-batch is another one."""
    optimizer = optimizer or adamw(trainable(model), fused=True)
    losses = []
    for step in range(steps):
        for micro in range(accumulate):
            loss = model(**batch(kind, seed=100 + step * accumulate + micro)).loss
            loss.backward()
            losses.append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logits(model, kind="llama"):
    with torch.no_grad():
        return model(input_ids=batch(kind, 3)["input_ids"]).logits


def directions(layer):
    """Orthonormal bases (Q, N) of what the layer protects and of its null space."""
    basis = layer.projector.basis.double()
    rest = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
    return (basis, rest) if layer.projector.complement else (rest, basis)


def delta(layer):
    """What the layer really does to an input, ΔW in float64, by running it with and without its adapter."""
    eye = torch.eye(layer.in_features, dtype=layer.get_base_layer().weight.dtype)
    with torch.no_grad():
        ours = layer(eye).double()
        layer.enable_adapters(False)
        base_output = layer(eye).double()
        layer.enable_adapters(True)
    return (ours - base_output).T


def drift(model):
    """(worst ‖ΔW Q‖/‖W‖, smallest ‖ΔW N‖/‖W‖) over the layers: what is protected, and what is learnt."""
    rows = []
    for layer in model.guarded_layers().values():
        Q, N = directions(layer)
        size, dW = layer.get_base_layer().weight.double().norm(), delta(layer)
        rows.append(((dW @ Q).norm() / size, (dW @ N).norm() / size))
    return max(float(q) for q, _ in rows), min(float(n) for _, n in rows)


@pytest.fixture(scope="session")
def tiny():
    return SimpleNamespace(
        base=base, batch=batch, statistics=statistics, plan=plan, guarded=guarded, trainable=trainable, adamw=adamw,
        train=train, logits=logits, directions=directions, delta=delta, drift=drift,
    )  # fmt: skip
