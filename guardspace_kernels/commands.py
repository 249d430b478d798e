"""What the commands ``guardspace collect``, ``plan``, ``certify`` and ``export`` do: load, call the function, save."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.batches import Batch
from guardspace_kernels.guard.certificate import DriftExceededError
from guardspace_kernels.guard.certificate import certify as certify_adapter
from guardspace_kernels.guard.collection import collect_statistics
from guardspace_kernels.guard.export import export_lora
from guardspace_kernels.guard.plan import GuardConfig, GuardPlan
from guardspace_kernels.guard.planning import plan_guard
from guardspace_kernels.guard.statistics import CalibrationStatistics


def collect(options: argparse.Namespace) -> int:
    prompts = read_prompts(options.prompts)
    tokenizer = _tokenizer(options.model)
    batches = batches_of(tokenizer, prompts, options.batch_size, options.raw)
    if options.dry_run:
        return _dry_run(options, batches)
    stats = collect_statistics(
        _model(options),
        batches,
        options.target_modules or "all-linear",
        answer_tokens=options.answer_tokens,
        checkpoint=options.checkpoint,
        checkpoint_every=options.checkpoint_every,
        max_memory=options.max_memory,
    )
    stats.save(options.out)
    print(f"{options.out}: {stats!r}")
    return 0


def plan(options: argparse.Namespace) -> int:
    config = GuardConfig(rank=options.rank, alpha=options.alpha, protect=options.protect, init=options.init)
    stats = CalibrationStatistics.load(options.statistics)
    made = plan_guard(
        _model(options), stats, config, target_modules=options.target_modules, max_memory=options.max_memory
    )
    made.save(options.out)
    print(made)
    return 0


def certify(options: argparse.Namespace) -> int:
    stats = CalibrationStatistics.load(options.statistics)
    heldout = None
    if options.heldout:
        tokenizer = _tokenizer(options.model)
        heldout = batches_of(tokenizer, read_prompts(options.heldout), options.batch_size, options.raw)
    model = _model(options)
    if options.plan:
        model = _guarded(model, options.plan, options.adapter)
    else:
        from peft import PeftModel

        _folder(options.adapter)
        model = PeftModel.from_pretrained(model, options.adapter)
    status = 0
    try:
        report = certify_adapter(model, stats, heldout, max_drift=options.max_drift)
    except DriftExceededError as error:
        report, status = error.report, 1
        print(f"guardspace certify: {error}", file=sys.stderr)
    if options.json:
        report.save(options.json)
    print(report)
    return status


def export(options: argparse.Namespace) -> int:
    stats = CalibrationStatistics.load(options.statistics) if options.statistics else None
    model = _guarded(_model(options), options.plan, options.adapter)
    dtype = getattr(torch, options.factors) if options.factors else None
    print(export_lora(model, options.out, dtype=dtype, stats=stats))
    return 0


def read_prompts(path: str) -> list[str]:
    """One prompt per line of a text file, or the field "prompt" of every line of a .jsonl file."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        if path.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: expected an object with a field "prompt"') from error
            if not isinstance(line, str) or not line.strip():
                raise ValueError(f'{path}, line {number}: "prompt" must be a text that is not empty')
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; give one per line")
    return prompts


def batches_of(tokenizer: Any, prompts: list[str], size: int, raw: bool) -> list[Batch]:
    """Padded batches, through the chat template unless there is none or ``raw``."""
    if size < 1:
        raise ValueError(f"--batch-size must be 1 or more, got {size}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token to pad with")
    tokenizer.padding_side = "left"
    chat = not raw and tokenizer.chat_template is not None
    if chat:
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
    batches: list[Batch] = []
    for i in range(0, len(prompts), size):
        # A template writes its own special tokens.
        made = tokenizer(prompts[i : i + size], return_tensors="pt", padding=True, add_special_tokens=not chat)
        batches.append({key: made[key] for key in ("input_ids", "attention_mask")})
    return batches


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes."""
    if model.endswith(".gguf"):
        if not os.path.isfile(model):
            raise FileNotFoundError(f"{model} does not exist (a .gguf file was expected)")
        return os.path.dirname(os.path.abspath(model)), {"gguf_file": os.path.basename(model)}
    return model, {}


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    source, extra = _source(model)
    return AutoTokenizer.from_pretrained(source, **extra)


def _model(options: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM

    source, extra = _source(options.model)
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    device = _device(options)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    return model.to(device).eval()


def _device(options: argparse.Namespace) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device must be such as cpu, cuda or cuda:1, got {options.device!r}") from error


def _guarded(model: nn.Module, plan: str, adapter: str) -> Any:
    from guardspace_kernels.integrations.peft import attach_guard

    _folder(adapter)
    guarded = attach_guard(model, GuardPlan.load(plan))
    guarded.load_adapter(adapter, guarded.active_adapter)
    return guarded


def _folder(adapter: str) -> None:
    if not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json; give the folder of save_pretrained")


def _dry_run(options: argparse.Namespace, batches: list[Batch]) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    from guardspace_kernels.guard.estimate import estimate_preparation

    source, extra = _source(options.model)
    config = AutoConfig.from_pretrained(source, **extra)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    named = options.dtype if options.dtype != "auto" else str(getattr(config, "dtype", None) or "float32")
    prompts = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    print(
        estimate_preparation(
            model,
            prompts=prompts,
            tokens_per_prompt=-(-tokens // prompts),
            answer_tokens=options.answer_tokens,
            batch_size=options.batch_size,
            target_modules=options.target_modules or "all-linear",
            dtype=getattr(torch, named.removeprefix("torch.")),
            device=_device(options),
            max_memory=options.max_memory,
        )
    )
    return 0
