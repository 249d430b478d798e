"""A training step of SmolLM2-135M (8 × 128 tokens, every linear layer): plain PEFT LoRA, naive GuardSpace and ours."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import tempfile
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

OP = "training_step"
CONTESTANTS = ("ours", "ours, virtual", "ours, step mode", "PEFT LoRA", "naive GuardSpace")


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    if size == "quick":
        return []  # planning a real model alone takes minutes
    model, batch, rank = ("tiny", (2, 8), 2) if size == "tiny" else ("SmolLM2-135M", (8, 128), 16)
    return [{"model": model, "batch": batch[0], "tokens": batch[1], "r": rank, "dtype": dtype} for dtype in dtypes]


def _model(name: str, dtype: torch.dtype) -> nn.Module:
    """The base model, frozen; the same weights in every dtype."""
    if name == "tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=60, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).bfloat16().to(dtype).requires_grad_(False)
    from guardspace_kernels.demo.model import converted_model, load_model

    return load_model(converted_model(), dtype, torch.device("cpu"))


def _plan(name: str, dtype: torch.dtype, rank: int) -> gk.GuardPlan:
    """A plan from random tokens: a step takes the same time whatever is protected, as long as it is as much."""
    model = _model(name, dtype)
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    statistics = gk.collect_statistics(model, [{"input_ids": ids}], progress=False)
    config = gk.GuardConfig(rank=rank, protect=0.5 if name == "tiny" else 0.99)
    return gk.plan_guard(model, statistics, config, progress=sys.stderr.isatty(), allow_few_prompts=True)


class Training:
    """One contestant: its model, AdamW over what requires grad, and a batch."""

    def __init__(self, name: str, model: str, batch: int, tokens: int, dtype: torch.dtype, plan: gk.GuardPlan) -> None:
        base = _model(model, dtype)
        self.ids = torch.randint(base.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))
        self.layers = list(plan.layers)
        rank, scale = plan.config.rank, plan.config.scale
        if name == "naive GuardSpace":
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
            self.model = gk.attach_guard(base, plan, residual="virtual" if "virtual" in name else "frozen")
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        if "step mode" in name:
            gk.guard_optimizer(self.optimizer, self.model)

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def modules(self) -> dict[str, nn.Module]:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return {name: base.get_submodule(name) for name in self.layers}

    def saved_per_layer(self, dtype: torch.dtype) -> float:
        """Mean over the layers of the first block, each with an input of its own."""
        modules = list(self.modules().values())[:7]
        total = 0
        for module in modules:
            d_in = (module.base_layer if hasattr(module, "base_layer") else module).weight.shape[1]
            x = torch.randn(*self.ids.shape, d_in).to(dtype).requires_grad_()
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
    "ours": ("adapter", "fold"),
    "ours, virtual": ("adapter", "fold", "frozen_pair"),
    "ours, step mode": ("adapter",),
    "PEFT LoRA": ("adapter",),
    "naive GuardSpace": ("adapter", "dense_p"),
}


def peak_memory(name: str, shape: dict[str, Any], plan_file: Path) -> float:
    """Bytes: the largest resident set of a process of its own that makes two steps."""
    arguments = [
        name,
        *(str(shape[key]) for key in ("model", "batch", "tokens", "dtype")),
        str(torch.get_num_threads()),
    ]
    command = [sys.executable, "-m", "benchmarks.bench_training_step", *arguments, str(plan_file)]
    here = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: the process that measures memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _measure_memory(
    name: str, model: str, batch: str, tokens: str, dtype: str, threads: str, plan_file: str
) -> None:  # fmt: skip
    torch.set_num_threads(int(threads))
    training = Training(name, model, int(batch), int(tokens), getattr(torch, dtype), gk.GuardPlan.load(plan_file))
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


def build(model: str, batch: int, tokens: int, r: int, dtype: str) -> Case:
    base_dtype: torch.dtype = getattr(torch, dtype)
    shape = {"model": model, "batch": batch, "tokens": tokens, "r": r, "dtype": dtype}
    plan = _plan(model, base_dtype, r)
    scratch = tempfile.TemporaryDirectory(prefix="guardspace-bench-")
    plan_file = Path(scratch.name) / "plan.safetensors"
    plan.save(plan_file)
    shares = [
        space.protected / layer.shape[1] for layer in plan.layers.values() if (space := plan.space_of(layer.name))
    ]
    protected = sum(shares) / len(shares)
    trainings = {name: Training(name, model, batch, tokens, base_dtype, plan) for name in CONTESTANTS}

    @cache
    def truth() -> dict[str, Tensor]:
        """The base model's loss: no adapter changes it before the first step."""
        exact, ids = _model(model, torch.float64), trainings["ours"].ids
        with torch.no_grad():
            return {"loss at the start": exact(input_ids=ids, labels=ids, use_cache=False).loss.double()}

    def contestant(name: str) -> Contestant:
        training = trainings[name]

        def outputs() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"loss at the start": training.loss()}

        def facts() -> dict[str, float]:
            assert scratch  # the folder lives as long as this function
            constants = (*training.model.parameters(), *training.model.buffers())
            found: dict[str, float] = {
                "saved": training.saved_per_layer(base_dtype),
                "saved_model": saved_bytes(training.loss, constants),
                "peak_memory": peak_memory(name, shape, plan_file),
                "protected": protected,
            }
            gc.collect()
            return found if name == "PEFT LoRA" else {**found, "leak": training.leak(plan)}

        flops = _flops(training.modules(), batch * tokens, r, _PARTS[name])
        return Contestant(training.step, outputs, truth, "PEFT LoRA", flops, facts)

    # Forward and backward each read the weights.
    least = 2 * sum(p.nbytes for p in trainings["PEFT LoRA"].model.parameters())
    return Case(OP, shape, {name: contestant(name) for name in CONTESTANTS}, base_dtype, least)


_build = lru_cache(maxsize=1)(build)  # five models, for every contestant in turn


@pytest.mark.parametrize("params", cases("default", ("bfloat16",)), ids=label)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_training_step(benchmark: Any, params: dict[str, Any], name: str) -> None:
    pytest_case(benchmark, _build(**params), name)


if __name__ == "__main__":
    _measure_memory(*sys.argv[1:])
