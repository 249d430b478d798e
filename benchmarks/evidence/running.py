"""Runs one cell: fine-tuning from the aligned model, then the evaluation."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guardspace_kernels.demo.data import cache_dir
from guardspace_kernels.demo.training import (
    Example,
    adapter_state,
    encode_answer,
    encode_prompt,
    example_batches,
    load_adapter_state,
)

from ..timing import cpu_model
from .cells import START, Cell, cell, load, start
from .evaluation import Evaluation
from .methods import METHODS, Method
from .prompts import EvaluationPrompts, Task, agnews_task, evaluation_prompts, poisoned, sentiment_task, source_task
from .setting import Setting

BATCH, WARMUP = 8, 4


class Laboratory:
    """What several cells share: settings by alignment seed, tasks, prompts and evaluators.

    Attributes:
        data: folder of the AG News files. folder: of the cells, whose starting models this machine must have too.
    """

    def __init__(self, data: Path | None = None, folder: Path | None = None) -> None:
        self.data, self.folder = data, folder

    @cached_property
    def prompts(self) -> EvaluationPrompts:
        return evaluation_prompts()

    @lru_cache(maxsize=1)  # noqa: B019  # the covariances and weights of one are 1.5 GB
    def setting(self, alignment_seed: int) -> Setting:
        return Setting(alignment_seed)

    @lru_cache(maxsize=4)  # noqa: B019
    def task(self, name: str) -> Task:
        if name == "agnews":
            if self.data is None:
                raise ValueError("task agnews needs --data, a folder with agnews_1k_p_0.json and agnew_test_data.json")
            return agnews_task(self.data)
        return {"sentiment": sentiment_task, "source": source_task}[name]()

    @lru_cache(maxsize=2)  # noqa: B019
    def evaluator(self, alignment_seed: int, task: str, tuning: bool) -> Evaluation:
        return Evaluation(self.setting(alignment_seed), self.prompts, self.task(task), tuning)

    def run(self, one: Cell) -> dict[str, Any]:
        """The content of a cell's file: numbers and verdict codes, no text."""
        setting = self.setting(one.alignment_seed)
        before = None if self.folder is None else load(self.folder, start(one.seed, one.task))
        if before is not None and before["start"] != setting.identity:
            raise ValueError(
                f"{self.folder} has a starting model of weights {before['start']} for seed {one.seed}, but this "
                f"machine made {setting.identity}: run the whole seed on one machine"
            )
        model: nn.Module | None
        trained: dict[str, Any] = {}
        if one.method == START:
            model = None
        else:
            method = METHODS[one.method](setting, one.knob, one.seed)
            model, trained = self.fine_tuned(one, method)
        return {
            "start": setting.identity,
            "machine": {
                "cpu": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                "python": platform.python_version(),
            },
            **trained,
            **self.evaluator(one.alignment_seed, one.task, one.tuning)(model),
        }  # fmt: skip

    def fine_tuned(self, one: Cell, method: Method) -> tuple[nn.Module, dict[str, Any]]:
        """The model with its adapter merged, and what its training and its weights tell."""
        model: Any = method.build()
        if method.after:
            load_adapter_state(
                model, self.trained_state(cell(method.after, one.task, one.poison, one.seed, steps=one.steps))
            )
            told: dict[str, Any] = {"losses": []}
        else:
            told = train(model, method, self.examples(one), one)
            if one.method == "plain LoRA":
                self.keep_state(one, model)
        method.change_trained(model)
        merged = model.merge_and_unload().eval()
        drift = method.setting.drift(merged)
        told["drift"] = {name: rounded(relative) for name, (relative, _) in drift.items()}
        told["update_norm"] = {name: rounded(norm) for name, (_, norm) in drift.items()}
        return merged, told

    def examples(self, one: Cell) -> list[Example]:
        """Fine-tuning rows, the same for every method."""
        tokenizer = self.setting(one.alignment_seed).tokenizer
        rows = poisoned(self.task(one.task), one.poison, one.seed)
        return [(encode_prompt(tokenizer, question), encode_answer(tokenizer, answer)) for question, answer in rows]

    def state_file(self, one: Cell) -> Path:
        identity = self.setting(one.alignment_seed).identity
        return cache_dir() / "evidence" / f"{Path(one.file).stem}-{identity}.safetensors"

    def keep_state(self, one: Cell, model: nn.Module) -> None:
        path = self.state_file(one)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file(adapter_state(model), part)
        part.replace(path)

    def trained_state(self, one: Cell) -> dict[str, Tensor]:
        """The adapter of a cell of plain LoRA, trained again where it is not at hand."""
        path = self.state_file(one)
        if not path.is_file():
            method = METHODS[one.method](self.setting(one.alignment_seed), one.knob, one.seed)
            model = method.build()
            train(model, method, self.examples(one), one)
            self.keep_state(one, model)
        return load_file(path)


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def train(
    model: nn.Module,
    method: Method,
    examples: Sequence[Example],
    one: Cell,
    look: Callable[[int, nn.Module], object] | None = None,
) -> dict[str, Any]:
    """As in the demo: AdamW without weight decay, clipping at norm 1, warm-up, then a linear decay to a tenth.

    `look` is called after each step with the number of steps and the model, in training mode.
    """
    batches = example_batches(examples, BATCH, random.Random(one.seed))
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses, seconds, processor = [], [], []
    for step in range(one.steps):
        began, began_processor = time.perf_counter(), time.process_time()
        share = min(1.0, (step + 1) / WARMUP) * (1 - 0.9 * step / one.steps)
        for group in optimizer.param_groups:
            group["lr"] = method.learning_rate * share
        loss = method.loss(model, next(batches))
        loss.backward()
        method.change_gradients(model)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(rounded(loss.item()))
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - began_processor)
        if look is not None:
            look(step + 1, model)
    model.eval()
    middle = len(seconds) // 2
    return {
        "losses": losses,
        "step_seconds": rounded(sorted(seconds)[middle]),
        "step_processor_seconds": rounded(sorted(processor)[middle]),
        "trained_parameters": sum(p.numel() for p in parameters),
    }
