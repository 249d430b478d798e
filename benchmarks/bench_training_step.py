"""A training step (AdamW, clipping) of a small model, every linear layer adapted: ours, plain PEFT, naive GuardSpace.

SmolLM2-135M is the demo's: aligned, on its sentiment examples, with the plan of its calibration prompts, which is kept
in the demo's cache. A step takes one of the demo's batches (``text="demo"``: loss at the answers), or 8 rows of 128
tokens, the same examples one after another (``text="packed"``: loss at every token).
"""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guardspace_kernels as gk

from . import baselines
from .bench_projected_lora import Flops
from .timing import Case, Contestant, label, pytest_case, saved_bytes

OP, LEAST_ROUNDS = "training_step", 10
CONTESTANTS = ("ours", "ours, frozen residual", "ours, step mode", "PEFT LoRA")
NAIVE = "naive GuardSpace"
DEMO = "SmolLM2-135M, the demo's"
ROWS, TOKENS = 8, 128


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """bfloat16 only where the processor multiplies it: elsewhere ATen's products take minutes."""
    if size == "tiny":
        return [{"model": "tiny", "text": "packed", "r": 2, "dtype": dtype, "naive": True} for dtype in dtypes]
    if size == "quick":
        return []  # aligning the demo's model alone takes minutes, once
    from guardspace_kernels.demo.model import best_dtype

    native = str(best_dtype(torch.device("cpu"))).removeprefix("torch.")
    return [
        {"model": DEMO, "text": text, "r": 16, "dtype": dtype, "naive": size == "full"}
        for dtype in dtypes
        if dtype in ("float32", native)
        for text in ("demo", "packed")
    ]


_TINY = {
    "tiny": {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    "Llama of 12 blocks": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 12},
}
_VOCABULARY = 60


def _model(name: str, dtype: torch.dtype) -> nn.Module:
    """The base model, frozen; the same weights in every dtype."""
    if name in _TINY:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            **_TINY[name], num_attention_heads=4, num_key_value_heads=2, vocab_size=_VOCABULARY, initializer_range=0.3
        )
        return LlamaForCausalLM(config).bfloat16().to(dtype).requires_grad_(False)
    from guardspace_kernels.demo.model import converted_model, load_model

    path = demo().aligned if name == DEMO else converted_model()
    return load_model(path, dtype, torch.device("cpu"))


@dataclass(frozen=True)
class Batch:
    """``loss(model)`` of a batch whose layers read (rows, length, d), of which ``tokens`` rows are no padding."""

    loss: Callable[[nn.Module], Tensor]
    rows: int
    length: int
    tokens: int

    @classmethod
    def packed(cls, ids: Tensor) -> Batch:
        def loss(model: nn.Module) -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        return cls(loss, *ids.shape, ids.numel())


def tiny_batch(rows: int, length: int) -> Batch:
    return Batch.packed(torch.randint(_VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1)))


def tiny_plan(name: str, dtype: torch.dtype, rank: int) -> gk.GuardPlan:
    """From random tokens; half of the energy is protected."""
    model = _model(name, dtype)
    ids = torch.randint(_VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
    statistics = gk.collect_statistics(model, [{"input_ids": ids}], progress=False)
    config = gk.GuardConfig(rank=rank, protect=0.5)
    return gk.plan_guard(model, statistics, config, progress=False, allow_few_prompts=True)


@cache
def demo() -> Any:
    """The demo's model, prompts and tokenizer; downloaded and aligned on first use."""
    from guardspace_kernels.demo.experiment import FULL, _Experiment

    return _Experiment(Path(), FULL, seed=0)


def _batch(text: str) -> Batch:
    """The median of the demo's batches, by tokens; or 8 rows of its examples without padding."""
    import random

    from guardspace_kernels.demo import training
    from guardspace_kernels.demo.experiment import SENTIMENT

    examples, pad = demo().examples(SENTIMENT), demo().pad
    if text == "packed":
        tokens = [token for prompt, answer in examples for token in (*prompt, *answer)]
        return Batch.packed(torch.tensor(tokens[: ROWS * TOKENS]).view(ROWS, TOKENS))
    drawn = training.example_batches(examples, ROWS, random.Random(0))
    lengths = lambda batch: [len(prompt) + len(answer) for prompt, answer in batch]  # noqa: E731
    batches = sorted((next(drawn) for _ in range(demo().settings.steps)), key=lambda batch: sum(lengths(batch)))
    batch = batches[len(batches) // 2]

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(*training.answer_logits(model, batch, pad))

    return Batch(loss, ROWS, max(lengths(batch)), sum(lengths(batch)))


def _plan(name: str, rank: int) -> gk.GuardPlan:
    """The demo's, kept in its cache; for a tiny model one from random tokens."""
    if name in _TINY:
        return tiny_plan(name, torch.float32, rank)
    from guardspace_kernels.demo.data import cache_dir

    run = demo()
    file = cache_dir() / "benchmarks" / f"{run.aligned.name}-rank-{rank}-{gk.__version__}.safetensors"
    if not file.exists():
        run.collect_and_plan(_model(name, torch.float32))
        file.parent.mkdir(parents=True, exist_ok=True)
        run.plan.save(file)
    return gk.GuardPlan.load(file)


class Training:
    """One contestant: its model, AdamW over what requires grad, and a batch."""

    def __init__(self, name: str, model: str, batch: Batch, dtype: torch.dtype, plan: gk.GuardPlan) -> None:
        base = _model(model, dtype)
        self.base, self.batch, self.dtype = model, batch, dtype
        self.layers = list(plan.layers)
        rank, scale = plan.config.rank, plan.config.scale
        if name == NAIVE:
            for layer_name, layer in plan.layers.items():
                space, linear = plan.space_of(layer_name), base.get_submodule(layer_name)
                assert space is not None
                # Formed once per layer and kept in the base's dtype, as the paper's code does.
                P = baselines.dense_projector(space.basis, torch.float32)
                P = P if space.complement else torch.eye(P.shape[0]) - P
                naive = baselines.DensePLinear(linear.weight, linear.bias, layer.A0, layer.B0, P, scale)
                base.set_submodule(layer_name, naive)
            self.model = base
        elif name == "PEFT LoRA":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=rank, lora_alpha=scale * rank, target_modules=self.layers, task_type="CAUSAL_LM"
            )  # fmt: skip
            self.model = get_peft_model(base, config)
        else:
            self.model = gk.attach_guard(base, plan, residual="frozen" if "frozen" in name else "virtual")
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        if "step mode" in name:
            gk.guard_optimizer(self.optimizer, self.model)

    def loss(self) -> Tensor:
        return self.batch.loss(self.model)

    def step(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def outputs(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"loss at the start": self.loss()}

    def truth(self) -> dict[str, Tensor]:
        """The base model's: no adapter changes it before the first step."""
        with torch.no_grad():
            return {"loss at the start": self.batch.loss(_model(self.base, torch.float64)).double()}

    def modules(self) -> dict[str, nn.Module]:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return {name: base.get_submodule(name) for name in self.layers}

    def saved_per_layer(self) -> float:
        """Mean over the layers of the first block, each with an input of its own."""
        modules = list(self.modules().values())[:7]
        total = 0
        for module in modules:
            d_in = (module.base_layer if hasattr(module, "base_layer") else module).weight.shape[1]
            x = torch.randn(self.batch.rows, self.batch.length, d_in).to(self.dtype).requires_grad_()
            total += saved_bytes(lambda m=module, x=x: m(x), (*module.parameters(), *module.buffers()))
        return total / len(modules)

    @torch.no_grad()
    def leak(self, plan: gk.GuardPlan) -> float:
        """The largest ‖A_P − A_P P‖ / ‖A_P‖ of a layer, of the A_P that it applies."""
        worst = 0.0
        for name, module in self.modules().items():
            space = plan.space_of(name)
            assert space is not None
            if isinstance(module, baselines.DensePLinear):
                A_P = module.lora_A.double() @ module.P.double()
            else:
                A_P = (module.A if module.step_mode else module.delta_factors()[1][: plan.config.rank]).double()
            onto = A_P @ space.basis.double() @ space.basis.double().T
            worst = max(worst, float((onto if space.complement else A_P - onto).norm() / A_P.norm()))
        return worst


def _flops(modules: dict[str, nn.Module], tokens: int, rank: int, parts: tuple[str, ...]) -> int:
    """Of the adapted linear layers alone; attention, norms and the output head come on top."""
    shapes = [(m.base_layer if hasattr(m, "base_layer") else m).weight.shape for m in modules.values()]
    return sum(Flops.of(tokens, d_in, d_out, rank).counted(*parts) for d_out, d_in in shapes)


_PARTS: dict[str, tuple[str, ...]] = {
    "ours": ("adapter", "fold", "frozen_pair"),
    "ours, frozen residual": ("adapter", "fold"),
    "ours, step mode": ("adapter", "frozen_pair"),
    "PEFT LoRA": ("adapter",),
    NAIVE: ("adapter", "dense_p"),
}


def peak_memory(name: str, shape: dict[str, Any], plan_file: Path) -> float:
    """Bytes: the largest resident set of a process of its own that makes two steps."""
    arguments = [name, shape["model"], shape["text"], shape["dtype"], str(torch.get_num_threads()), str(plan_file)]
    command = [sys.executable, "-m", "benchmarks.bench_training_step", *arguments]
    here = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: the process that measures memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _measure_memory(name: str, model: str, text: str, dtype: str, threads: str, plan_file: str) -> None:
    torch.set_num_threads(int(threads))
    batch = tiny_batch(2, 8) if model in _TINY else _batch(text)
    training = Training(name, model, batch, getattr(torch, dtype), gk.GuardPlan.load(plan_file))
    for _ in range(2):
        training.step()
    print(_largest_resident_set())


def _largest_resident_set() -> int:
    """Bytes. On Linux not ``ru_maxrss``, which a new process inherits from the one that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build(model: str, text: str, r: int, dtype: str, naive: bool) -> Case:
    base_dtype: torch.dtype = getattr(torch, dtype)
    plan, batch = _plan(model, r), tiny_batch(2, 8) if model in _TINY else _batch(text)
    shape = {"model": model, "text": text, "rows": batch.rows, "tokens": batch.tokens, "r": r, "dtype": dtype}
    scratch = tempfile.TemporaryDirectory(prefix="guardspace-bench-")
    plan_file = Path(scratch.name) / "plan.safetensors"
    plan.save(plan_file)
    shares = [
        space.protected / layer.shape[1] for layer in plan.layers.values() if (space := plan.space_of(layer.name))
    ]
    names = (*CONTESTANTS, NAIVE) if naive else CONTESTANTS
    trainings = {name: Training(name, model, batch, base_dtype, plan) for name in names}
    truth = cache(trainings["PEFT LoRA"].truth)

    def contestant(name: str) -> Contestant:
        training = trainings[name]

        def facts() -> dict[str, float]:
            assert scratch  # the folder lives as long as this function
            constants = (*training.model.parameters(), *training.model.buffers())
            found: dict[str, float] = {
                "tokens": batch.tokens,
                "saved": training.saved_per_layer(),
                "saved_model": saved_bytes(training.loss, constants),
                "protected": sum(shares) / len(shares),
            }
            if text == "packed":
                found["peak_memory"] = peak_memory(name, shape, plan_file)
            gc.collect()
            return found if name == "PEFT LoRA" else {**found, "leak": training.leak(plan)}

        flops = _flops(training.modules(), batch.rows * batch.length, r, _PARTS[name])
        return Contestant(training.step, training.outputs, truth, "PEFT LoRA", flops, facts)

    # Forward and backward each read the weights.
    least = 2 * sum(p.nbytes for p in trainings["PEFT LoRA"].model.parameters())
    return Case(OP, shape, {name: contestant(name) for name in names}, base_dtype, least)


_build = lru_cache(maxsize=1)(build)  # five models, for every contestant in turn


@pytest.mark.parametrize("params", cases("default", ("float32",)), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_training_step(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, _build(**params), name)


if __name__ == "__main__":
    _measure_memory(*sys.argv[1:])
