"""Batches of prompts: what is wrong with them, their real and first tokens, and how a model runs on them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from guardspace_kernels.guard.exclusive import exclusively
from guardspace_kernels.guard.layers import base_model

Batch = Mapping[str, torch.Tensor]
TOKEN_KINDS = "token_kinds"  # an entry of a batch that the model is not given


def checked_mask(batch: Batch, index: int) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {index} must be a mapping such as {{'input_ids': ..., 'attention_mask': ...}}, got "
            f"{type(batch).__name__}; pass a list of such batches"
        )
    ids = batch.get("input_ids")
    mask = batch.get("attention_mask")
    for name, value in (("input_ids", ids), ("attention_mask", mask)):
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"batch {index}: {name} must be a tensor, got {type(value).__name__}; tokenize with return_tensors='pt'"
            )
    if ids is not None and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"batch {index}: input_ids must be integers, got {ids.dtype} of shape {tuple(ids.shape)}")
    if mask is None:
        if ids is None:
            raise ValueError(f"batch {index} needs input_ids or an attention_mask; it has {sorted(batch)}")
        mask = torch.ones_like(ids)
    if mask.dim() != 2:
        raise ValueError(f"batch {index}: attention_mask must be (prompts, tokens), got shape {tuple(mask.shape)}")
    if ids is not None and ids.shape != mask.shape:
        raise ValueError(
            f"batch {index}: attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} differ in shape"
        )
    if not len(mask):
        raise ValueError(f"batch {index} holds no prompt, its shape is {tuple(mask.shape)}: leave it out")
    if not ((mask == 0) | (mask == 1)).all():  # additive masks, or numbers of packed prompts
        raise ValueError(f"batch {index}: attention_mask must hold 1 at real tokens and 0 at padding, nothing else")
    mask = mask.bool()
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"batch {index}: prompt {empty[0]} is all padding (its attention_mask has no 1)")
    return mask


def check_ids(model: nn.Module, batch: Batch, index: int) -> None:
    """ValueError that names the prompt if it holds a token that the model does not know (another tokenizer's)."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    known = getattr(get_embeddings() if callable(get_embeddings) else None, "num_embeddings", None)
    ids = batch.get("input_ids")
    if needs_decoder_ids(model) and "decoder_input_ids" not in batch:
        raise ValueError(
            f"batch {index} has no decoder_input_ids: {type(model).__name__} is an encoder-decoder model; give the "
            "tokens that its decoder is to read, and decoder_attention_mask where they are padded"
        )
    if known is None or ids is None:
        return
    unknown = ((ids < 0) | (ids >= known)).nonzero()
    if len(unknown):
        prompt, place = unknown[0].tolist()
        raise ValueError(
            f"batch {index}: prompt {prompt} holds token {int(ids[prompt, place])}, but the model knows {known} "
            "tokens; tokenize with this model's tokenizer"
        )


def positions_of(config: Any) -> int | None:
    """How many tokens a model of that Transformers configuration has positions for; None where it does not say."""
    get_text = getattr(config, "get_text_config", None)
    with suppress(ValueError):  # several texts: no one answer
        config = get_text() if callable(get_text) else config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(model: nn.Module, batch: Batch, index: int, answer_tokens: int = 0) -> None:
    """ValueError that names the prompt if it is longer, with its answer, than the model has positions for."""
    limit = positions_of(getattr(base_model(model), "config", None))
    if limit is None:
        return
    positions = batch.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        lengths = positions.amax(dim=1) + 1
    else:
        lengths = checked_mask(batch, index).sum(dim=1) + answer_tokens
    longest = int(lengths.argmax())
    if lengths[longest] > limit:
        answer = f" with {answer_tokens} of its answer" if answer_tokens else ""
        raise ValueError(
            f"batch {index}: prompt {longest} has {int(lengths[longest])} tokens{answer}, but the model has {limit} "
            "positions; shorten or leave out the prompt"
        )


def needs_decoder_ids(model: nn.Module) -> bool:
    """Of an encoder-decoder model, which may make them up of others, at places that nobody knows."""
    return "decoder_input_ids" in inspect.signature(base_model(model).forward).parameters


def first_tokens(mask: torch.Tensor) -> torch.Tensor:
    """A mask of each row's first real token, on whichever side the padding is."""
    return mask & (mask.long().cumsum(dim=1) <= 1)


def check_answerable(model: nn.Module, batch: Batch) -> None:
    if needs_decoder_ids(model):
        raise ValueError(
            f"answer_tokens continues prompts, but {type(model).__name__} is an encoder-decoder model, whose answers "
            "are its decoder's; give them as decoder_input_ids"
        )
    extra = sorted(set(batch) - {"input_ids", "attention_mask", "labels", TOKEN_KINDS})
    if extra or "input_ids" not in batch:
        raise ValueError(f"answer_tokens needs batches of input_ids and attention_mask alone, got also {extra}")
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"answer_tokens needs a model with .generate(), got {type(model).__name__}")


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Within, nothing of the model's generation settings but its special tokens: the likeliest token at each step."""
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = type(config)(**{name: getattr(config, name, None) for name in special})
    try:
        yield
    finally:
        model.generation_config = config


def end_tokens(model: Any) -> list[int]:
    """The tokens that end an answer, by the model's generation settings."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def with_answers(
    model: Any, batch: Batch, answer_tokens: int, ends: Collection[int] | None = None
) -> dict[str, torch.Tensor]:
    """The batch with the first tokens of the model's own greedy answers appended, padded on the left.

    Greedy: the likeliest token at each step, whatever the model's generation settings say of sampling, beams,
    penalties, lengths and forced tokens. An answer ends with its first token of ``ends``, by default what the model's
    settings say; the rest is masked.
    """
    check_answerable(model, batch)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).long()
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    ends = end_tokens(model) if ends is None else list(ends)
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    pad = pad if pad is not None else (ends[0] if ends else 0)
    with _greedy(base_model(model)):
        whole = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=answer_tokens, do_sample=False, pad_token_id=pad,
            eos_token_id=ends or None,
        )  # fmt: skip
    answer = whole[:, ids.shape[1] :]
    ended = torch.isin(answer, torch.tensor(ends, device=answer.device)) if ends else torch.zeros_like(answer).bool()
    before_end = (ended.long().cumsum(dim=1) - ended.long()) == 0
    return {"input_ids": whole, "attention_mask": torch.cat([mask, before_end.long()], dim=1)}


def forward_batch(model: nn.Module, batch: Batch, logits: int | None = 1, positions: bool = True) -> Any:
    """``model(**batch)`` without a cache and, where the model knows how and no labels ask for more, with the logits of
    the last ``logits`` positions only.

    With ``positions``, a batch with padding gets ``position_ids`` that follow its mask: padding on the left moves
    absolute ones.
    """
    accepted = inspect.signature(base_model(model).forward).parameters
    arguments: dict[str, Any] = {key: value for key, value in batch.items() if key != TOKEN_KINDS}
    mask = batch.get("attention_mask")
    wanted = positions and "position_ids" in accepted and "position_ids" not in batch
    if wanted and mask is not None and mask.dim() == 2 and not mask.all():
        arguments["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    if "use_cache" in accepted:
        arguments.setdefault("use_cache", False)
    if "logits_to_keep" in accepted and "labels" not in batch and logits is not None:
        ids = batch.get("input_ids")
        # Positions, not a number: a number makes a strided slice, for which torch copies a frozen output embedding
        # once per prompt (10.1 s against 2.7 s for 64 prompts of 38 tokens).
        kept = logits if ids is None else torch.arange(ids.shape[1], device=ids.device)[-logits:]
        arguments.setdefault("logits_to_keep", kept)
    return model(**arguments)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code, which would pass hooks by, within the context; every module is left
    as it was. RuntimeError if another thread is within it for this model."""
    with exclusively(model):
        training = [module for module in model.modules() if module.training]
        compiled = [(module, call) for module in model.modules() if (call := module._compiled_call_impl) is not None]
        model.eval()
        try:
            for module, _ in compiled:
                module._compiled_call_impl = None
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            for module, call in compiled:
                module._compiled_call_impl = call


def to_device(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    if device.type == "meta":  # accelerate offloaded it, and moves what the model is called with
        return dict(batch)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
