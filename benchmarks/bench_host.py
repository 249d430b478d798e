"""What a guarded layer costs the host: layers and models so small that calls take the time, not products; one thread.

A layer's case is four in a row, forward and backward, on x (1, T, d) as in a model (``dims`` 3), or (T, d), where plain
LoRA is cheapest. In bfloat16 d and T are smaller: valgrind emulates no bfloat16 instructions, and at d = 64 ATen's
products would be half of all that it counts; so they are a fifth, as in float32. A model's case is a training step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import guardspace_kernels as gk

from . import counting
from .bench_projected_lora import Flops
from .bench_training_step import Training, tiny_batch, tiny_plan
from .timing import Case, Contestant, Run, label

OP, THREADS = "host", 1
CONTESTANTS = (
    "ours", "ours, frozen residual", "ours, step mode", "ours, step mode, frozen residual", "ours, nn module",
    "PEFT LoRA", "frozen linear",
)  # fmt: skip
STEP = ("ours", "ours, frozen residual", "ours, step mode", "PEFT LoRA")
LAYERS, ALPHA = 4, 2.0


def cases(size: str, dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    widths = {"float32": (64, 8, 8), "bfloat16": (16, 4, 2)}
    model = "tiny" if size == "tiny" else "Llama of 12 blocks"
    found: list[dict[str, Any]] = []
    for dtype in dtypes:
        d, r, T = widths[dtype]
        found += [{"layers": LAYERS, "d": d, "r": r, "T": T, "dims": dims, "dtype": dtype} for dims in (3, 2)]
        found.append({"model": model, "d": 64, "r": 8, "batch": 2, "tokens": 8, "dtype": dtype})
    return found


class Stack(nn.Module):
    """Linear layers, one after another."""

    def __init__(self, layers: int, d: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, d)
        self.layers = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def _base(layers: int, d: int, dtype: torch.dtype) -> Stack:
    """The same weights in every dtype, frozen."""
    torch.manual_seed(0)
    return Stack(layers, d).bfloat16().to(dtype).requires_grad_(False)


def _plan(layers: int, d: int, r: int, dtype: torch.dtype) -> gk.GuardPlan:
    model, ids = _base(layers, d, dtype), torch.arange(64).view(4, 16)
    statistics = gk.collect_statistics(model, [{"input_ids": ids[:, : d // 4]}], progress=False)
    config = gk.GuardConfig(rank=r, alpha=ALPHA * r, protect=0.5)
    return gk.plan_guard(model, statistics, config, progress=False, allow_few_prompts=True)


def _model(name: str, base: Stack, r: int, plan: gk.GuardPlan) -> nn.Module:
    if name == "frozen linear":
        return base
    if name == "PEFT LoRA":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(base, LoraConfig(r=r, lora_alpha=ALPHA * r, target_modules=list(plan.layers)))
    if name == "ours, nn module":
        for layer_name, layer in plan.layers.items():
            space = plan.space_of(layer_name)
            assert space is not None
            guarded = gk.nn.ProjectedLoraLinear.from_linear(
                base.get_submodule(layer_name), r, space.basis, complement=space.complement, alpha=ALPHA * r,
                init=(layer.A0, layer.B0),
            )  # fmt: skip
            base.set_submodule(layer_name, guarded)
        return base
    return gk.attach_guard(base, plan, residual="frozen" if "frozen residual" in name else "virtual")


class Layers:
    """A contestant: guarded layers, one after another, without PEFT's wrapper of the whole model."""

    def __init__(self, name: str, layers: int, d: int, r: int, x: Tensor, plan: gk.GuardPlan) -> None:
        self.model = _model(name, _base(layers, d, x.dtype), r, plan).train()
        self.layers = list(getattr(self.model, "get_base_model", lambda: self.model)().layers)
        self.x, self.dy = x, torch.ones_like(x)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if "step mode" in name:  # which ends with its optimiser
            self.optimizer = torch.optim.AdamW(self.trained)
            gk.guard_optimizer(self.optimizer, self.model)

    def forward(self) -> Tensor:
        y = self.x
        for layer in self.layers:
            y = layer(y)
        return y

    def run(self) -> None:
        self.x.grad = None
        for p in self.trained:
            p.grad = None
        self.forward().backward(self.dy)

    def outputs(self) -> dict[str, Tensor]:
        self.run()
        assert self.x.grad is not None
        return {"y": self.forward().detach(), "dx": self.x.grad}


def _layers(layers: int, d: int, r: int, T: int, dims: int, dtype: str) -> dict[str, Layers]:
    x_dtype: torch.dtype = getattr(torch, dtype)
    plan = _plan(layers, d, r, x_dtype)
    x = torch.randn((1, T, d)[3 - dims :], generator=torch.Generator().manual_seed(1)).to(x_dtype).requires_grad_()
    return {name: Layers(name, layers, d, r, x, plan) for name in CONTESTANTS}


def _steps(model: str, d: int, r: int, batch: int, tokens: int, dtype: str) -> dict[str, Training]:
    base_dtype: torch.dtype = getattr(torch, dtype)
    plan, ids = tiny_plan(model, base_dtype, r), tiny_batch(batch, tokens)
    return {name: Training(name, model, ids, base_dtype, plan) for name in STEP}


def runs(**shape: Any) -> dict[str, Run]:
    """What is timed, by contestant; :func:`counting.instructions` asks for it in its own process."""
    if "model" in shape:
        return {name: training.step for name, training in _steps(**shape).items()}
    return {name: layers.run for name, layers in _layers(**shape).items()}


@cache
def instructions(dtype: str, model: str) -> dict[str, dict[str, float]]:
    """Case -> contestant -> instructions, of all cases of a dtype: the start of their process takes half a minute."""
    size = "tiny" if model == "tiny" else "default"
    shapes = [s for s in cases(size, (dtype,)) if dtype == "float32" or "model" not in s]
    counted = counting.instructions("benchmarks.bench_host", shapes)
    return {label(shape): numbers for shape, numbers in zip(shapes, counted, strict=True)}


def _facts(run: Run, name: str, shape: dict[str, Any]) -> dict[str, float]:
    found = counting.calls(run)
    if not counting.why_not():
        counted = instructions(shape["dtype"], shape.get("model", "")).get(label(shape))
        found |= {} if counted is None else {"instructions": counted[name]}
    return found


def build(**shape: Any) -> Case:
    dtype: torch.dtype = getattr(torch, shape["dtype"])
    return _build_step(shape, dtype) if "model" in shape else _build_layers(shape, dtype)


def _build_layers(shape: dict[str, Any], dtype: torch.dtype) -> Case:
    built = _layers(**shape)

    @cache
    def truth() -> dict[str, Tensor]:
        """The base's: at the start no adapter changes it."""
        x = built["ours"].x.detach().double().requires_grad_()
        y = x
        for layer in _base(shape["layers"], shape["d"], torch.float64).layers:
            y = layer(y)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        return {"y": y.detach(), "dx": x.grad}

    flops = Flops.of(shape["T"], shape["d"], shape["d"], shape["r"]).counted("adapter") * shape["layers"]

    def contestant(name: str) -> Contestant:
        layers = built[name]
        plain = "frozen linear" if name in ("frozen linear", "PEFT LoRA") else "PEFT LoRA"
        return Contestant(layers.run, layers.outputs, truth, plain, flops, lambda: _facts(layers.run, name, shape))

    return Case(OP, shape, {name: contestant(name) for name in CONTESTANTS}, dtype, 0)


def _build_step(shape: dict[str, Any], dtype: torch.dtype) -> Case:
    built = _steps(**shape)
    truth = cache(lambda: built["PEFT LoRA"].truth())

    def contestant(name: str) -> Contestant:
        step = built[name].step
        return Contestant(step, built[name].outputs, truth, "PEFT LoRA", 0, lambda: _facts(step, name, shape))

    return Case(OP, shape, {name: contestant(name) for name in STEP}, dtype, 0)
