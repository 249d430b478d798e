"""Collection: one pass of a model over prompts, with hooks that accumulate covariances."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from guardspace_kernels.arguments import boolean, instance, integer, iterable, shown, writable_file
from guardspace_kernels.guard.batches import (
    Batch,
    check_answerable,
    check_ids,
    check_length,
    evaluating,
    to_device,
    with_answers,
)
from guardspace_kernels.guard.collecting.checkpoint import Checkpoint
from guardspace_kernels.guard.collecting.collector import Collector, EnoughError
from guardspace_kernels.guard.collecting.scout import scouted
from guardspace_kernels.guard.collecting.trial import Trial
from guardspace_kernels.guard.collecting.witness import listed
from guardspace_kernels.guard.exclusive import Unchanged
from guardspace_kernels.guard.files import StoredTensor
from guardspace_kernels.guard.fingerprint import ModelFingerprint
from guardspace_kernels.guard.judges import BatchJudge, Judge, judge_name, warn_of_unrefused
from guardspace_kernels.guard.layers import find_layers, linear_weight, unwrapped
from guardspace_kernels.guard.lockstep import Lockstep
from guardspace_kernels.guard.passes import CollectionPlan, Replay, parse_bytes, plan_passes, release_memory
from guardspace_kernels.guard.routing import Routing, grouped_as_siblings
from guardspace_kernels.guard.sampling import EQUAL, Sample, Template, checked_weights, marks
from guardspace_kernels.guard.statistics import CalibrationStatistics, InputStatistics
from guardspace_kernels.guard.tokens import tokens_of

_NO_PROMPT = "batches is empty: at least one prompt is needed"
_OUTPUT = "the output for the next pass"  # among names of layers, which have no spaces


def plan_collection(
    model: nn.Module,
    batches: Sequence[Batch],
    target_modules: str | Sequence[str] = "all-linear",
    *,
    answer_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    max_memory: int | str | None = None,
) -> CollectionPlan:
    """What :func:`collect_statistics` would do with these arguments, from a forward of the first batch."""
    model, lockstep = unwrapped(model), Lockstep(unwrapped(model))
    with evaluating(model):
        trial = Trial(model, find_layers(model, target_modules), Routing(model), lockstep)
        batches = _check_all(model, batches, answer_tokens, lockstep)
        return _planned(trial, batches, answer_tokens, dtype, max_memory)[0]


def _check(model: nn.Module, batch: Batch, index: int, answer_tokens: int) -> None:
    tokens_of(batch, index)
    check_ids(model, batch, index)
    check_length(model, batch, index, answer_tokens)
    if answer_tokens:
        check_answerable(model, batch)


def _check_all(model: nn.Module, batches: Iterable[Batch], answer_tokens: int, lockstep: Lockstep) -> list[Batch]:
    """The batches as a list, looked at before the first forward."""
    with lockstep.step():
        batches = list(batches)
        for index, batch in enumerate(batches):
            _check(model, batch, index, answer_tokens)
        if not batches:
            raise ValueError(_NO_PROMPT)
    advice = "divide the prompts among as many batches on every rank; their sizes may differ"
    lockstep.agree("batches", len(batches), advice)
    return batches


def _planned(
    trial: Trial, batches: Sequence[Batch], answer_tokens: int, dtype: torch.dtype, max_memory: int | str | None
) -> tuple[CollectionPlan, Replay | None, bool]:
    budget = parse_bytes("max_memory", max_memory)
    masks = (_mask(batch, index) for index, batch in enumerate(batches))
    tokens = sum(mask.shape[0] * (mask.shape[1] + answer_tokens) for mask in masks)
    first = to_device(trial.model, batches[0])
    trial.look(first, 0)
    inputs, replay, per_token, once = scouted(trial, first)
    plan = plan_passes(inputs, dtype, budget, per_token * tokens if replay else None)
    return plan, replay if plan.replay else None, once


def _warn_if_slow(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    slow = [name for name in layers if model.get_submodule(name).weight.dtype == torch.bfloat16]
    on_cpu = bool(slow) and model.get_submodule(slow[0]).weight.device.type == "cpu"
    # Without oneDNN, as on Apple's processors, there is nobody to ask.
    if on_cpu and torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        warnings.warn(
            f"layer {slow[0]} is bfloat16, which this CPU has no instructions for: expect some 40 times the time of "
            "float32. Collect from model.float(): a plan made so is one for the bfloat16 model as well",
            stacklevel=3,
        )


def _mask(batch: Batch, index: int) -> torch.Tensor:
    """Of the prompts."""
    return next(iter(tokens_of(batch, index).values())).mask


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: str | Sequence[str] = "all-linear",
    *,
    answer_tokens: int = 0,
    separate_sink: bool = True,
    separate_prefix: int = 0,
    kind_weights: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    max_memory: int | str | None = None,
    tokenizer: Any = None,
    judge: Judge | None = None,
    allow_unrefused: bool = False,
) -> CalibrationStatistics:
    """One pass over safety-triggering prompts: ``C = Xᵀ X`` of the input of every guarded layer.

    Padding never counts, on either side, and guarded layers do not compute it: at padding their output is that of
    zeros. A forward ends where the last layer is reached if the first forward called each of them once. Layers
    that read the same tensor (q/k/v, gate/up) share one covariance. The first real token of each prompt, the attention
    sink, whose input can dwarf all others and is the same in every prompt, is kept out of C; its distinct inputs are
    kept apart and will be protected as directions of their own.

    Before a batch of a new kind (other entries, other padding) one of its prompts is tried, alone and as it stands in
    its batch. A layer's input counts by the tokens whose number it follows: those of the prompts or, in encoder-decoder
    models, of the decoder. Prompts packed into one row are told apart by ``position_ids`` that start again. What is
    read of a prompt must be what is read of it alone, else the batch is refused.

    Of a layer in a routed expert, a module called with rows (n, d) of what the module around it reads, C holds the
    tokens that were routed to it. An expert that none reached has statistics of no token.

    Args:
        model: the aligned base model, without adapters. It is run in eval mode and left in the mode it was in.
            DistributedDataParallel is unwrapped. With a model sharded by ``fully_shard`` every process makes this call,
            each with prompts of its own in as many batches; parameters are gathered one by one for the fingerprint.
            Layers that accelerate offloaded, to memory or disk, are loaded by its hooks.
        batches: mappings passed as ``model(**batch)``: ``input_ids`` and, where there is padding,
            ``attention_mask`` (prompts, tokens); any batch sizes. An entry ``token_kinds`` (prompts, tokens), which the
            model is not given, may say what each token is of: 0 the template, 1 the request, 2 an answer. Without it
            the template is what all prompts of a batch, and the very first one, begin and end with. Use harmful
            requests that the model refuses, through its chat template.
        target_modules: "all-linear" (every Linear and Conv1D but heads), a regular expression, or a list of name
            endings.
        answer_tokens: generate this many tokens of the model's own greedy answer and include them: refusing is
            decided there.
        separate_sink: False counts the first token as any other.
        separate_prefix: up to so many tokens that all prompts of a batch, and the very first one, begin with (so many
            of a first batch of one prompt) are kept out of C and apart, like the first one: each has the same input in
            every prompt of a causal model, and one direction protects it wholly. Where three template tokens dwarf the
            inputs of a layer of SmolLM2-135M, 15.8% of the requests' energy lies outside of what ``protect=0.99``
            protects without it, and 1.4% with it. Experts count them.
        kind_weights: of "template", "request" and "answer" tokens, default 1: ``C = Σ_k w_k · X_kᵀ X_k``. What a plan
            then protects, and what :func:`guardspace_kernels.certify` says, is of tokens so weighted. Not with experts.
        dtype: of C: float32 or float64 (for ``rule="paper"``, whose threshold float32 hardly resolves).
        progress: show a progress bar.
        checkpoint: a file that holds the state after every ``checkpoint_every`` batches (the size of the statistics
            themselves, so choose a larger number for a large model); each process needs its own. If it exists, those
            batches are not run again: the same call with the same batches goes on, and ends with the same bits as an
            uninterrupted one.
        max_memory: bytes, or a text such as "4GB", that the covariances may take while they are accumulated; samples,
            of up to 96 rows of each input, come on top. What does not fit waits for further passes, which start from
            the outputs of the block where the last one ended if the model is a plain chain of blocks, else from the
            beginning; all batches are then held in memory. Finished triangles go into files: beside the checkpoint, as
            ``checkpoint.0``, ``.1``..., or deleted ones in the folder for temporary files (``TMPDIR``). The plan is
            shown before; the bits are those of a single pass.
        tokenizer: the model's. With it the model's own answers are judged, and the statistics tell how many prompts the
            model refused. Needs ``answer_tokens``.
        judge: ``judge(prompt, answer)`` -> "refuses", "complies" or "other"; default
            :func:`guardspace_kernels.judge_opening`.
        allow_unrefused: no warning where the model refused fewer than 80% of the prompts. What it answers instead is
            protected as it is: an answer.

    Returns:
        :class:`CalibrationStatistics`.

    Raises:
        TypeError, ValueError: an unusable model, dtype or batch (empty, all padding, shapes that differ), a layer that
            does not read the prompts' tokens or does not compute ``x Wᵀ + b``, a prompt that is read otherwise than
            alone, or a non-finite activation; the message names batch and layer. Hooks go whatever happens.
        RuntimeError: another thread collects from the model, certifies it or trains it meanwhile; its own forwards
            raise, too. Or another process of a sharded model raised one of the above. Only an error within a forward,
            such as a lack of memory, leaves the others waiting there; ``torchrun`` ends them.

    Source: GuardSpace (arXiv 2510.14301), the covariances of its sections on both subspaces.
    """
    instance("model", model, nn.Module, "a torch.nn.Module")
    iterable("batches", batches, "a list, or another iterable, of batches")
    answer_tokens = integer("answer_tokens", answer_tokens, 0)
    separate_sink, progress = boolean("separate_sink", separate_sink), boolean("progress", progress)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {shown(dtype)}")
    separate_prefix = integer("separate_prefix", separate_prefix, 0)
    if separate_prefix and not separate_sink:
        raise ValueError("separate_prefix needs separate_sink=True: the first token is the first of the prefix")
    weights = checked_weights(kind_weights)
    checkpoint_every = integer("checkpoint_every", checkpoint_every, 1)
    allow_unrefused, refusals = boolean("allow_unrefused", allow_unrefused), None
    if tokenizer is not None:
        refusals = BatchJudge(tokenizer, judge)
        if not answer_tokens:
            raise ValueError("tokenizer is for judging the model's answers, of which answer_tokens=0 gives none")
    elif judge is not None:
        raise ValueError(f"judge is {shown(judge)}, and judges texts: give the model's tokenizer too")
    parse_bytes("max_memory", max_memory)
    model = unwrapped(model)
    lockstep = Lockstep(model)
    if checkpoint is not None:
        with lockstep.step():
            checkpoint = writable_file("checkpoint", checkpoint)
    layers = find_layers(model, target_modules)
    if max_memory is not None or lockstep.sharded:
        batches = _check_all(model, batches, answer_tokens, lockstep)
    _warn_if_slow(model, layers)
    unchanged = Unchanged(model)
    fingerprint = ModelFingerprint.of(model, list(layers))
    options = {"answer_tokens": answer_tokens, "separate_sink": separate_sink, "dtype": str(dtype)}
    if separate_prefix or weights != EQUAL:
        options |= {"separate_prefix": separate_prefix, "kind_weights": list(weights)}
    if refusals is not None:
        options["judge"] = judge_name(refusals.judge)
    routing = Routing(model)
    trial = Trial(model, layers, routing, lockstep)
    passes, replay, once, probes = [list(layers)], None, False, None
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if max_memory is not None:
            assert isinstance(batches, list)
            plan, replay, once = _planned(trial, batches, answer_tokens, dtype, max_memory)
            passes = [[name for one in part for name in one.layers] for part in plan.passes]
            probes = {name for part in plan.passes for one in part if one.held for name in one.layers}
            starts = [min(one.after for one in part) for part in plan.passes]
            if progress:
                tqdm.write(f"statistics: {plan}", file=sys.stderr)
        several = len(passes) > 1
        if several and checkpoint is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="guardspace-"))
        inputs: list[InputStatistics] = []
        unseen: list[str] = []
        answered: dict[int, Batch] = {}
        prompts, verdicts = 0, (0, 0)
        for number, names in enumerate(passes):
            collector = Collector(layers, names, dtype, separate_sink, routing, trial.stream, probes, weights)
            path, every = checkpoint, checkpoint_every
            if several and checkpoint is None:
                path, every = os.path.join(folder, str(number)), sys.maxsize
            elif several and checkpoint is not None:
                path = f"{os.fspath(checkpoint)}.{number}"
            about = {**options, "layers": f"{len(names)} from {names[0]} to {names[-1]}"}
            with lockstep.step():
                state = Checkpoint(path, collector, fingerprint, about)
            lockstep.agree("batches in their checkpoints", state.resumed, "delete the checkpoints and begin again")
            if replay:
                replay.begin(starts[number], starts[min(number + 1, len(passes) - 1)])
            index, template = -1, Template()
            label = f"statistics {number + 1}/{len(passes)}" if several else "statistics"
            for index, raw in enumerate(tqdm(batches, desc=label, unit="batch", disable=not progress)):
                with lockstep.step():
                    _check(model, raw, index, answer_tokens)
                    mask = _mask(raw, index)
                    kinds = template.kinds(raw, index, mask)
                    apart = max(1, min(separate_prefix, template.before))
                    if state.has(index, raw):
                        continue
                told = 0, 0
                batch = answered.get(index) or to_device(model, raw)
                if answer_tokens and index not in answered:
                    batch = with_answers(model, batch, answer_tokens)
                    if refusals is not None and number == 0:
                        with lockstep.step():
                            told = refusals.of(batch["input_ids"], batch["attention_mask"], mask.shape[1])
                    if several:
                        answered[index] = batch
                trial.look(batch, index)
                streams = tokens_of(batch, index, apart)
                read = next(iter(streams.values()))  # of the prompts
                with ExitStack() as running:
                    running.enter_context(collector.counting(streams, marks(raw, mask, kinds, read.mask)))
                    if replay:
                        running.enter_context(replay.run(index, partial(collector.arrived, _OUTPUT)))
                    if once:
                        collector.waiting = {*names, _OUTPUT} if replay and replay.keeps else set(names)
                        running.enter_context(suppress(EnoughError))
                    trial.forward(batch, index)
                with lockstep.step():
                    unchanged.check()
                trial.confirm(batch, index, collector.late)
                once = once or (not several and collector.once(model))
                with lockstep.step():
                    collector.end_batch()
                    state.add(raw, int(read.first.sum()), (index + 1) % every == 0, *told)
            with lockstep.step():
                state.end(index + 1)
                prompts, sampler = state.prompts, collector.sampler
                verdicts = (state.judged, state.refused) if number == 0 else verdicts
                if prompts == 0:
                    raise ValueError(_NO_PROMPT)
                idle = [name for name in names if name not in collector.input_of]
                lost = routing.lost(idle)
                if lost:
                    subject = f"layer {lost[0]} was" if len(lost) == 1 else f"{len(lost)} layers were"
                    all_of_them = f": {listed(lost)}; leave them" if len(lost) > 1 else "; leave it"
                    raise ValueError(f"{subject} never reached by the forward pass{all_of_them} out of target_modules")
                unseen += idle
                inputs += state.statistics() if several else [one.statistics() for one in collector.inputs]
            del collector, state
            if max_memory is not None:
                release_memory()
    for group in grouped_as_siblings(unseen, [one.layers for one in inputs], routing.containers):
        inputs.append(_of_no_token(group, linear_weight(layers[group[0]]).shape[1], dtype))
    # Which expert is reached first depends on the prompts: statistics of others must have the same order to be merged.
    order = {name: i for i, name in enumerate(layers)}
    for one in inputs:
        one.routed = routing.routed(one.layers[0])
    inputs.sort(key=lambda one: order[one.layers[0]] if one.routed else -1)
    held, kind_tokens, distinct = sampler.held_prompts, tuple(sampler.kind_tokens), tuple(sampler.distinct)
    made = CalibrationStatistics(inputs, fingerprint, prompts, held, kind_tokens, weights, distinct, *verdicts)
    warn_of_unrefused(made.judged, made.refused, allow_unrefused)
    return made


def _of_no_token(layers: list[str], features: int, dtype: torch.dtype) -> InputStatistics:
    shape = (features * (features + 1) // 2,)
    zeros = StoredTensor(dtype, shape, lambda: torch.zeros(shape, dtype=dtype))
    nothing = torch.empty(0, features, dtype=dtype)
    return InputStatistics(layers, zeros, 0, nothing, 0, sample=Sample(torch.empty(0, dtype=torch.int64), nothing))
