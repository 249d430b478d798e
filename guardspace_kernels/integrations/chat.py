"""Prompts through a tokenizer's chat template, as batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from guardspace_kernels.arguments import boolean, instance, integer, shown
from guardspace_kernels.guard.batches import Batch
from guardspace_kernels.guard.prompt_files import Prompt, checked_prompt, texts_of

_ASKING = ("system", "developer", "user")  # roles whose messages a template must write as they are
# What a template that takes texts alone makes of parts.
_PART_AS_CODE = ("{'type':'text'", '{"type":"text"')


def prompt_batches(
    tokenizer: Any, prompts: Sequence[Prompt], batch_size: int = 8, *, chat: bool = True, max_tokens: int | None = None
) -> list[Batch]:
    """Batches for :func:`guardspace_kernels.collect_statistics` and :func:`guardspace_kernels.certify`.

    Args:
        tokenizer: of Transformers.
        prompts: texts, each a user's message, or conversations, as :func:`guardspace_kernels.read_prompts` returns
            them. A conversation that does not end with an assistant's message is followed by the template's prompt for
            one. Where the template takes no plain text, messages are given to it in parts.
        batch_size: how many go into a batch.
        chat: False takes the texts as they are, with the special tokens that the tokenizer adds.
        max_tokens: refuse a prompt that is longer.

    Returns:
        Mappings of ``input_ids`` and ``attention_mask``, (prompts, tokens) int64, padded on the left.

    Raises:
        TypeError, ValueError: no chat template, one that raises or leaves a message out, or a prompt that is empty or
            too long; the message gives the prompt's number, from 1.
    """
    integer("batch_size", batch_size, 1)
    rows = [ids for _, ids in prompt_tokens(tokenizer, prompts, chat=chat, max_tokens=max_tokens)]
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = next((one for one in known if one is not None), 0)
    return [_padded(rows[i : i + batch_size], pad) for i in range(0, len(rows), batch_size)]


def prompt_tokens(
    tokenizer: Any, prompts: Sequence[Prompt], *, chat: bool = True, max_tokens: int | None = None, name: str = "prompt"
) -> list[tuple[str, list[int]]]:
    """Of each prompt what the model reads, as text and as tokens; arguments and errors as of :func:`prompt_batches`.

    ``name`` is what messages call a prompt.
    """
    boolean("chat", chat)
    if max_tokens is not None:
        integer("max_tokens", max_tokens, 1)
    if isinstance(tokenizer, type) or not (callable(tokenizer) and hasattr(tokenizer, "apply_chat_template")):
        raise TypeError(f"tokenizer must be a tokenizer of Transformers, got {shown(tokenizer)}")
    if any(kind.__name__ == "ProcessorMixin" for kind in type(tokenizer).__mro__):
        raise TypeError(
            f"tokenizer is a processor, {type(tokenizer).__name__}, of texts with images or sounds, which are not "
            "collected; give its tokenizer (processor.tokenizer)"
        )
    plural = f"{name}s"
    instance(plural, prompts, (list, tuple), "a list of texts or conversations")
    if not prompts:
        raise ValueError(f"{plural} is empty: at least one is needed")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, which an aligned model expects around a request; set "
            "tokenizer.chat_template, or take the prompts as they are with chat=False (--raw)"
        )
    rows = []
    for number, prompt in enumerate(prompts, 1):
        where = f"{name} {number}"
        prompt = checked_prompt(prompt, where)
        if chat:
            prompt = _rendered(tokenizer, prompt, where)
        elif not isinstance(prompt, str):
            raise ValueError(f"{where} is a conversation, which only a chat template makes a text of; leave out --raw")
        # A template writes its own special tokens.
        ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise ValueError(f"{where}: the tokenizer makes no token of it")
        if max_tokens is not None and len(ids) > max_tokens:
            raise ValueError(f"{where} has {len(ids)} tokens, above max_tokens = {max_tokens}; shorten it")
        rows.append((prompt, list(ids)))
    return rows


def _padded(rows: Sequence[list[int]], pad: int) -> Batch:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def _rendered(tokenizer: Any, prompt: Prompt, where: str) -> str:
    """What the template makes of a prompt; ValueError if a request is not in it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [texts_of(m, where) for m in messages]
    wanted = [_squeezed(one) for m, said in zip(messages, texts, strict=True) if m["role"] in _ASKING for one in said]
    failures: list[Exception | None] = []
    for form in _forms(messages, texts):
        try:
            text = tokenizer.apply_chat_template(
                form, tokenize=False, add_generation_prompt=messages[-1]["role"] != "assistant"
            )
        except Exception as error:  # a template is a program of its own, and may raise anything
            failures.append(error)
            continue
        squeezed = _squeezed(text)
        as_code = any(squeezed.count(part) > sum(one.count(part) for one in wanted) for part in _PART_AS_CODE)
        if all(one in squeezed for one in wanted) and not as_code:
            return str(text)
        failures.append(None)
    if failures[0] is not None:
        raise ValueError(
            f"{where}: the tokenizer's chat template raises {type(failures[0]).__name__}: {failures[0]}; give it "
            "messages that it takes, or prompts as they are (--raw)"
        ) from failures[0]
    raise ValueError(
        f"{where}: the tokenizer's chat template leaves a message out of its text, so that the model would not read "
        "the request; set a template that writes it, or give prompts as they are (--raw)"
    )


def _forms(messages: list[dict[str, Any]], texts: list[list[str]]) -> list[list[dict[str, Any]]]:
    """The messages as they are; with texts for parts, where each has one; and with parts for texts."""
    forms = [messages]
    if all(len(said) == 1 for said in texts):
        forms.append([{**m, "content": said[0]} for m, said in zip(messages, texts, strict=True)])
    in_parts = [[{"type": "text", "text": one} for one in said] for said in texts]
    forms.append([{**m, "content": parts} for m, parts in zip(messages, in_parts, strict=True)])
    return forms


def _squeezed(text: str) -> str:
    """Without white space, which templates trim."""
    return "".join(text.split())
