"""Training steps on a GPU of models of four blocks with the layers of Llama-3.2-1B and Llama-2-7B, in bfloat16.

The vocabulary is of 4096, so that the blocks are what takes the time; weights, tokens and the plan are random, since
none of them changes it. A step is forward, backward, clipping and fused AdamW. ``ms`` is that of steps one after the
other, ``host_ms`` the time until the call of a single one returns to Python; where both are equal the host is what
limits. The frozen base computes the gradient of its input alone.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import guardspace_kernels as gk
from guardspace_kernels.guard.fingerprint import ModelFingerprint
from guardspace_kernels.guard.null_space import NullSpace
from guardspace_kernels.guard.plan import LayerPlan

from .baselines import DensePLinear

if TYPE_CHECKING:
    from .gpu_run import Record, Row

PROTECTED = 1 / 8  # of the dimensions of every input


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int = 4
    vocabulary: int = 4096


MODELS = {"Llama-3.2-1B": Shape(2048, 8192, 32, 8), "Llama-2-7B": Shape(4096, 11008, 32, 32)}
BATCHES = ((1, 512), (4, 512), (8, 2048))
RANKS = (16, 64)
TINY = {"tiny": Shape(32, 48, 2, 1, blocks=1, vocabulary=64)}

#: The first four at every rank, the others at the first one.
CONTESTANTS = (
    "PEFT LoRA", "ours", "ours, guard_optimizer", "ours, GuardedAdamW", "frozen base", "PEFT LoRA in bfloat16",
    "dense P",
)  # fmt: skip
COMPILED = ("PEFT LoRA", "ours")


def base_model(shape: Shape, device: torch.device) -> nn.Module:
    """Llama with random weights in bfloat16, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=shape.blocks, vocab_size=shape.vocabulary,
        max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    with device:
        return LlamaForCausalLM(config).bfloat16().requires_grad_(False)


def random_plan(model: nn.Module, rank: int, device: torch.device) -> gk.GuardPlan:
    """A plan that protects random directions of the input of every linear layer but the head; q, k and v share one, so
    do gate and up."""
    generator = torch.Generator(device=device).manual_seed(0)
    layers, spaces, index = {}, [], dict[str, int]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        (d_out, d_in), (block, _, last) = module.weight.shape, name.rpartition(".")
        key = block + {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(last, last)
        k = max(1, int(PROTECTED * d_in))
        if key not in index:
            basis = torch.linalg.qr(torch.randn(d_in, k, device=device, generator=generator)).Q.contiguous()
            index[key] = len(spaces)
            spaces.append(NullSpace(basis.cpu(), True, k, 0, 0.0))
        A = torch.randn(rank, d_in, device=device, generator=generator) / d_in**0.5
        B = torch.randn(d_out, rank, device=device, generator=generator) / d_out**0.5
        basis = spaces[index[key]].basis.to(device)
        A = A - (A @ basis) @ basis.T
        layers[name] = LayerPlan(name, (d_out, d_in), A.cpu(), B.cpu(), index[key])
    plan = gk.GuardPlan(gk.GuardConfig(rank=rank), layers, [*spaces], ModelFingerprint.of(model, list(layers)))
    plan.check()
    return plan


class Training:
    """One contestant: its model, its optimiser, and steps on batches."""

    def __init__(self, name: str, base: nn.Module, plan: gk.GuardPlan) -> None:
        self.model, rank = copy.deepcopy(base), plan.config.rank
        if name == "frozen base":
            self.model.enable_input_require_grads()  # type: ignore[operator]
        elif name == "dense P":
            _dense(self.model, plan)
        elif name.startswith("PEFT"):
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(plan.layers), task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, config, autocast_adapter_dtype="bfloat16" not in name)
        else:
            self.model = gk.attach_guard(self.model, plan)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        if name == "ours, GuardedAdamW":
            self.optimizer = gk.GuardedAdamW(self.model, lr=1e-4)
        elif self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        if name == "ours, guard_optimizer":
            gk.guard_optimizer(self.optimizer, self.model)
        self.forward: Callable[..., Any] = self.model

    def step(self, ids: Tensor) -> None:
        self.forward(input_ids=ids, labels=ids).loss.backward()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@torch.no_grad()
def _dense(model: nn.Module, plan: gk.GuardPlan) -> None:
    """P as one more linear layer of every linear layer, formed once for each."""
    for name, layer in plan.layers.items():
        linear, space = model.get_submodule(name), plan.space_of(name)
        assert space is not None
        weight = linear.weight
        basis, A, B = (t.to(weight.device) for t in (space.basis, layer.A0, layer.B0))
        P = torch.eye(len(basis), device=weight.device) - basis @ basis.T
        model.set_submodule(name, DensePLinear(weight, linear.bias, A, B, P, plan.config.scale))


def timed(step: Callable[[], object], device: torch.device, rounds: int) -> Row:
    """Milliseconds of a step, of its call, and the bytes that it adds to what is allocated before it, at most."""
    step()
    on_gpu = device.type == "cuda"
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    host = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - start))
        wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    wait()
    ms = 1e3 * (time.perf_counter() - start) / rounds
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"ms": ms, "host_ms": statistics.median(host), "host_share": statistics.median(host) / ms, "peak": peak}


def run(record: Record, smoke: bool) -> None:
    device = torch.device("cpu" if smoke else "cuda")
    torch.manual_seed(0)
    models, batches, ranks, rounds = (TINY, ((1, 8),), (2,), 1) if smoke else (MODELS, BATCHES, RANKS, 5)
    compiled = []
    for rank in ranks:
        for name, shape in models.items():
            base = base_model(shape, device)
            plan = random_plan(base, rank, device)
            if rank == ranks[0] and not compiled:
                compiled = [(name, base, plan)]
            for contestant in CONTESTANTS[: None if rank == ranks[0] else 4]:
                for row, measured in _rows(contestant, base, plan, batches, device, rounds):
                    record.attempt({"model": name, "rank": rank, "by": contestant, "compiled": False, **row}, measured)
                _free(device)
    for name, base, plan in compiled:  # it takes most of a minute each, so last
        for contestant in COMPILED:
            compiler = "eager" if smoke else "inductor"
            for row, measured in _rows(contestant, base, plan, batches[-2:][:1], device, rounds, compiler):
                row = {"model": name, "rank": plan.config.rank, "by": contestant, "compiled": True, **row}
                record.attempt(row, measured, least=0 if smoke else 25)
            _free(device)


def _rows(
    contestant: str,
    base: nn.Module,
    plan: gk.GuardPlan,
    batches: tuple[tuple[int, int], ...],
    device: torch.device,
    rounds: int,
    compiler: str = "",
) -> Iterator[tuple[Row, Callable[[], Row]]]:
    made: list[Training] = []
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    for batch, tokens in batches:

        def measured(batch: int = batch, tokens: int = tokens) -> Row:
            if not made:
                made.append(Training(contestant, base, plan))
                if compiler:
                    made[0].forward = torch.compile(made[0].model, backend=compiler)
            ids = torch.randint(base.config.vocab_size, (batch, tokens), device=device)
            found = timed(lambda: made[0].step(ids), device, rounds)
            found["peak"] = max(0, found["peak"] - held)  # the model's own weights included, the base's are not
            return {**found, "tokens_per_second": 1e3 * batch * tokens / found["ms"]}

        yield {"batch": batch, "tokens": tokens}, measured


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
