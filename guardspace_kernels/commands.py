"""What ``guardspace collect``, ``inspect``, ``plan``, ``certify``, ``export`` and ``evaluate`` do: load, call, save.

What a user gives is looked at before any weights are loaded, and errors of other libraries are told in our words.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from guardspace_kernels.arguments import integer, number, readable_file, writable_file, writable_folder
from guardspace_kernels.guard.adapter_folder import ADAPTER_CONFIG
from guardspace_kernels.guard.batches import Batch, positions_of
from guardspace_kernels.guard.certificate import certify as certify_adapter
from guardspace_kernels.guard.collection import collect_statistics
from guardspace_kernels.guard.export import export_lora
from guardspace_kernels.guard.inspection import inspect_statistics
from guardspace_kernels.guard.passes import parse_bytes
from guardspace_kernels.guard.plan import GuardConfig, GuardPlan
from guardspace_kernels.guard.planning import plan_guard
from guardspace_kernels.guard.prompt_files import PROMPT_FILES, Prompt, read_prompts
from guardspace_kernels.guard.sampling import checked_weights
from guardspace_kernels.guard.statistics import CalibrationStatistics
from guardspace_kernels.integrations.chat import prompt_batches

_LONGEST = 300  # of what another library says; Transformers lists every class that it knows
_CERTIFIED_ANSWER = 12  # tokens, as certify has it by default


def collect(options: argparse.Namespace) -> int:
    integer("--answer-tokens", options.answer_tokens, 0)
    integer("--checkpoint-every", options.checkpoint_every, 1)
    integer("--separate-prefix", options.separate_prefix, 0)
    parse_bytes("--max-memory", options.max_memory)
    weights = _kind_weights(options.kind_weights)
    _check_outputs(options, ("prompts", "model"), ("out", "checkpoint"))
    device = _device(options)
    batches = _batches(options, options.prompts, options.answer_tokens)
    if options.dry_run:
        return _dry_run(options, batches, device)
    tokenizer = _from_pretrained("AutoTokenizer", options.model) if options.answer_tokens else None
    stats = collect_statistics(
        _model(options, device),
        batches,
        options.target_modules or "all-linear",
        answer_tokens=options.answer_tokens,
        separate_prefix=options.separate_prefix,
        kind_weights=weights,
        checkpoint=options.checkpoint,
        checkpoint_every=options.checkpoint_every,
        max_memory=options.max_memory,
        tokenizer=tokenizer,
        allow_unrefused=options.allow_unrefused,
    )
    with _writing("--out", options.out):
        stats.save(options.out)
    print(f"{options.out}: {stats!r}")
    return 0


def _kind_weights(given: list[str] | None) -> dict[str, float]:
    weights = {}
    for text in given or []:
        kind, _, weight = text.partition("=")
        try:
            weights[kind] = float(weight)
        except ValueError as error:
            raise ValueError(f"--kind-weights must be such as template=0.1, got {text!r}") from error
    checked_weights(weights)
    return weights


def inspect(options: argparse.Namespace) -> int:
    integer("--rank", options.rank, 1)
    _check_outputs(options, ("statistics", "heldout", "task"), ("json", "png"))
    _check_drawing(options)
    heldout, task = (
        _statistics(f"--{name}", getattr(options, name)) if getattr(options, name) else None
        for name in ("heldout", "task")
    )
    parts = [_statistics("statistics", path) for path in options.statistics]
    report = inspect_statistics(parts, task=task, heldout=heldout, rank=options.rank)
    if options.json:
        with _writing("--json", options.json):
            report.save(options.json)
    if options.png:
        from guardspace_kernels.guard.inspection_figure import draw

        with _writing("--png", options.png):
            draw(report, options.png)
    print(report)
    return 0


def plan(options: argparse.Namespace) -> int:
    config = GuardConfig(rank=options.rank, alpha=options.alpha, protect=options.protect, init=options.init)
    parse_bytes("--max-memory", options.max_memory)
    _check_outputs(options, ("statistics", "model"), ("out",))
    device = _device(options)
    stats = _statistics("statistics", options.statistics)
    made = plan_guard(
        _model(options, device),
        stats,
        config,
        target_modules=options.target_modules,
        max_memory=options.max_memory,
        allow_few_prompts=options.allow_few_prompts,
        allow_unrefused=options.allow_unrefused,
    )
    with _writing("--out", options.out):
        made.save(options.out)
    print(made)
    return 0


def certify(options: argparse.Namespace) -> int:
    if options.max_drift is not None:
        number("--max-drift", options.max_drift, "a number of 0 or more", lambda x: x >= 0)
    from guardspace_kernels.integrations.deployed import check_adapter_folder, deployed_adapter

    config = check_adapter_folder(options.adapter)
    _check_outputs(options, ("statistics", "plan", "heldout", "model"), ("json",))
    device = _device(options)
    stats = _statistics("statistics", options.statistics)
    made = _plan("--plan", options.plan) if options.plan else None
    heldout = _batches(options, options.heldout, _CERTIFIED_ANSWER) if options.heldout else None
    model = _model(options, device)
    if made is not None:
        # That the folder is whole, unaltered and of this plan; judged is then what PEFT makes of it.
        model = _guarded(model, made, options.adapter, config).unload()
        if config.get("modules_to_save"):
            model = _model(options, device)  # PEFT's unload leaves the trained copies in the model
    deployed = deployed_adapter(model, options.adapter)
    report = certify_adapter(deployed, stats, heldout, plan=made, answer_tokens=_CERTIFIED_ANSWER)
    named = config.get("base_model_name_or_path")
    if named and os.path.realpath(named) != os.path.realpath(options.model):
        report.notes.append(f"{ADAPTER_CONFIG} names the base model {named!r}; this is judged on {options.model!r}")
    if options.json:
        with _writing("--json", options.json):
            report.save(options.json)
    print(report)
    failure = report.failure(options.max_drift)
    if failure:
        print(f"guardspace certify: {failure}", file=sys.stderr)
    return 1 if failure else 0


def export(options: argparse.Namespace) -> int:
    from guardspace_kernels.integrations.deployed import check_adapter_folder

    config = check_adapter_folder(options.adapter)
    _check_outputs(options, ("adapter", "plan", "statistics", "model"), ("out",), folder=True)
    device = _device(options)
    stats = _statistics("--statistics", options.statistics) if options.statistics else None
    model = _guarded(_model(options, device), _plan("plan", options.plan), options.adapter, config)
    dtype = getattr(torch, options.factors) if options.factors else None
    with _writing("--out", options.out):
        report = export_lora(model, options.out, dtype=dtype, stats=stats)
    print(report)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from guardspace_kernels.evaluate.refusals import RefusalEvaluator
    from guardspace_kernels.integrations.deployed import check_adapter_folder, deployed_adapter

    integer("--answer-tokens", options.answer_tokens, 1)
    integer("--batch-size", options.batch_size, 1)
    if options.min_refused is not None:
        number("--min-refused", options.min_refused, "a share from 0 to 1", lambda x: 0 <= x <= 1)
    if options.answers and not options.json:
        raise ValueError("--answers writes texts into the report: give --json FILE too")
    base = options.base or ("adapter-off" if options.adapter else "none")
    if base == "adapter-off" and not options.adapter:
        raise ValueError("--base adapter-off compares with the model without its adapter: give --adapter FOLDER too")
    if options.adapter:
        check_adapter_folder(options.adapter)
    _check_outputs(options, ("harmful", "lookalikes", "task", "adapter", "base", "model"), ("json", "png"))
    _check_drawing(options)
    device = _device(options)
    evaluator = RefusalEvaluator(
        _from_pretrained("AutoTokenizer", options.model),
        _sources(options),
        lookalikes=_prompts("--lookalikes", options.lookalikes, options.column) if options.lookalikes else None,
        task=_examples(options.task) if options.task else None,
        answer_tokens=options.answer_tokens,
        batch_size=options.batch_size,
        chat=not options.raw,
    )
    evaluator.check_lengths(_from_pretrained("AutoConfig", options.model))
    before = None
    if base not in ("adapter-off", "none"):
        before = evaluator.set_base(_model(options, device, base))
    model = _model(options, device)
    if base == "adapter-off":
        before = evaluator.set_base(model)
    if options.adapter:
        model = deployed_adapter(model, options.adapter).eval()
    report = evaluator(model)
    report.base = before
    if options.json:
        with _writing("--json", options.json):
            report.save(options.json, answers=options.answers)
    if options.png:
        with _writing("--png", options.png):
            report.plot(options.png)
    print(report)
    if options.min_refused is not None and not report.refuses.value >= options.min_refused:
        print(
            f"guardspace evaluate: {report.refuses.value:.1%} of the harmful prompts are refused, below --min-refused "
            f"{options.min_refused:g}",
            file=sys.stderr,
        )
        return 1
    return 0


def _sources(options: argparse.Namespace) -> dict[str, list[Prompt]]:
    """Harmful prompts by the name of their file."""
    found: dict[str, list[Prompt]] = {}
    for path in options.harmful:
        name = os.path.splitext(os.path.basename(path))[0]
        found[path if name in found else name] = _prompts("--harmful", path, options.column)
    return found


def _prompts(flag: str, path: str, column: str | None) -> list[Prompt]:
    """Of a file; a column is one of those files that have any."""
    readable_file(flag, path, PROMPT_FILES)
    return read_prompts(path, None if path.lower().endswith(".txt") else column)


def _examples(path: str) -> list[tuple[Prompt, str]]:
    prompts, answers = _prompts("--task", path, None), read_prompts(path, "answer")
    for example, answer in enumerate(answers, 1):
        if not isinstance(answer, str):
            raise ValueError(f"--task: {path}, example {example}: 'answer' must be a text, got a conversation")
    return [(prompt, str(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def _check_drawing(options: argparse.Namespace) -> None:
    """Before the work, not after it."""
    if options.png:
        try:
            import matplotlib.figure  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError(f"--png needs {error.name}: pip install matplotlib") from error


def _check_outputs(
    options: argparse.Namespace, read: tuple[str, ...], written: tuple[str, ...], folder: bool = False
) -> None:
    """ValueError unless what is to be written can be, and is none of what is read."""
    taken: dict[str, str] = {}
    for name in read:
        given = getattr(options, name)
        for one in given if isinstance(given, list) else [given] if given else []:
            taken[os.path.realpath(one)] = name
    for name in written:
        target = getattr(options, name)
        if target is None:
            continue
        flag = f"--{name}"
        (writable_folder if folder else writable_file)(flag, target)
        other = taken.setdefault(os.path.realpath(target), flag)
        if other != flag:
            raise ValueError(f"{flag}: {target} is given as {other} too, and would be overwritten; give another name")


@contextmanager
def _writing(flag: str, path: str) -> Iterator[None]:
    """Says of an error that it came up while that was written; a full disk is one."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise ValueError(f"{flag}: {path} cannot be written: {reason}; nothing under that name was changed") from error


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of another library's loading, whatever their class, as one line that begins with ``what``."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _batches(options: argparse.Namespace, path: str, answer_tokens: int) -> list[Batch]:
    """Of a file of prompts, each of which the model has room for, its answer included."""
    integer("--batch-size", options.batch_size, 1)
    readable_file("prompts" if path == getattr(options, "prompts", None) else "--heldout", path, PROMPT_FILES)
    prompts = read_prompts(path, options.column)
    for prompt_number, prompt in enumerate(prompts, 1):
        if answer_tokens and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"{path}, prompt {prompt_number} ends with an assistant's message, where {answer_tokens} tokens of the "
                "model's own answer are to follow; leave that message out"
            )
    limit = positions_of(_from_pretrained("AutoConfig", options.model))
    if limit is not None and limit <= answer_tokens:
        raise ValueError(f"--answer-tokens {answer_tokens}: the model has {limit} positions")
    return prompt_batches(
        _from_pretrained("AutoTokenizer", options.model),
        prompts,
        options.batch_size,
        chat=not options.raw,
        max_tokens=None if limit is None else limit - answer_tokens,
    )


def _statistics(name: str, path: str) -> CalibrationStatistics:
    return CalibrationStatistics.load(readable_file(name, path, "statistics of guardspace collect"))


def _plan(name: str, path: str) -> GuardPlan:
    return GuardPlan.load(readable_file(name, path, "a plan of guardspace plan"))


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes: a folder, a .gguf file, or the name of a model on the Hub."""
    ours: dict[str, Any] = {"trust_remote_code": False}  # asked otherwise, on a terminal
    if model.endswith(".gguf"):
        if not os.path.isfile(model):
            raise FileNotFoundError(f"model: {model} does not exist (a .gguf file was expected)")
        return os.path.dirname(os.path.abspath(model)), {"gguf_file": os.path.basename(model), **ours}
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise FileNotFoundError(f"model: {model} holds no config.json; give the folder of save_pretrained")
        return model, {"local_files_only": True, **ours}
    if os.path.exists(model):
        raise ValueError(f"model: {model} is a file; give the folder of save_pretrained, or a .gguf file")
    if model.startswith((".", "~", os.sep)) or model.endswith(os.sep) or model.count("/") > 1 or not model:
        raise FileNotFoundError(
            f"model: {model!r} does not exist; give the folder of save_pretrained, a .gguf file, or a model of the Hub"
        )
    return model, ours


def _from_pretrained(auto: str, model: str, **extra: Any) -> Any:
    """What that class of Transformers loads; an error in one line that names the model."""
    import transformers

    source, ours = _source(model)
    part = {"AutoConfig": "its configuration", "AutoTokenizer": "its tokenizer"}.get(auto, "its weights")
    where = f"{model}: {part} cannot be loaded"
    if source == model and not os.path.isdir(model):
        where = (
            f"{model} is no folder here, and {part} cannot be loaded from the Hub: check the name and the network, or "
            "give the folder of save_pretrained"
        )
    with _told(f"model: {where}"):
        return getattr(transformers, auto).from_pretrained(source, **ours, **extra)


def _model(options: argparse.Namespace, device: torch.device, name: str | None = None) -> nn.Module:
    """The model that is named, or else the command's own."""
    name = name or options.model
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    # Of weights that do not fit the report tells more than the error: both ways nothing is loaded.
    model, report = _from_pretrained(
        "AutoModelForCausalLM", name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    absent = sorted([*report["missing_keys"], *mismatched])
    if absent:
        raise ValueError(
            f"model: {name} has no weights, or of another shape, for {len(absent)} parameters, such as "
            f"{absent[0]}, which would start at random; is it whole, and a causal language model?"
        )
    moved: nn.Module = model.to(device).eval()
    return moved


def _device(options: argparse.Namespace) -> torch.device:
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(
            f"--device must be such as cpu, cuda or cuda:1 and exist, got {options.device!r}; there is "
            f"{', '.join(['cpu', *there])}"
        ) from error
    return device


def _guarded(model: nn.Module, plan: GuardPlan, adapter: str, config: dict[str, Any]) -> Any:
    from guardspace_kernels.integrations.peft import attach_guard

    guarded = attach_guard(model, plan, modules_to_save=config.get("modules_to_save"))
    guarded.load_adapter(adapter, guarded.active_adapter)
    return guarded


def _dry_run(options: argparse.Namespace, batches: list[Batch], device: torch.device) -> int:
    from transformers import AutoModelForCausalLM

    from guardspace_kernels.guard.estimate import estimate_preparation

    config = _from_pretrained("AutoConfig", options.model)
    where = f"model: {options.model} is not one that Transformers makes from its configuration"
    with _told(where), torch.device("meta"):
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
            device=device,
            max_memory=options.max_memory,
        )
    )
    return 0
