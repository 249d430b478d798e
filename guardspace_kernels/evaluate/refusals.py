"""What a model refuses: greedy answers to harmful prompts, to look-alikes and to a task, judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from guardspace_kernels.arguments import boolean, instance, integer, shown
from guardspace_kernels.evaluate.generation import generate
from guardspace_kernels.evaluate.report import EvaluationReport
from guardspace_kernels.guard.batches import end_tokens, evaluating, needs_decoder_ids, positions_of
from guardspace_kernels.guard.judges import REFUSALS, Judge, checked_judge, judge_name, judged
from guardspace_kernels.guard.layers import base_model, peft_model, unwrapped
from guardspace_kernels.guard.prompt_files import Prompt, texts_of
from guardspace_kernels.integrations.chat import prompt_tokens

#: Prompts, prompts with the name of their source in front, or lists of prompts by that name.
Harmful = Sequence[Prompt] | Sequence[tuple[str, Prompt]] | Mapping[str, Sequence[Prompt]]

ADAPTER_OFF = "adapter_off"


@dataclass
class _Base:
    """The base model's answers to harmful prompts and look-alikes, and its log-probabilities along the first ones."""

    answers: list[list[int]]
    log_p: dict[int, torch.Tensor] = field(default_factory=dict)  # prompt -> (tokens of the answer, vocabulary)


class RefusalEvaluator:
    """Prompts, tokenised once, and what answers a base model gives to them: ``evaluator(model)`` evaluates a model.

    Several models, or one at several times, are evaluated for the price of few tokens each: the base model's answers
    are guessed of the others, and a right guess is read in one forward together with its prompt. No answer depends on
    the guesses, up to rounding. See :func:`guardspace_kernels.evaluate_refusals` for arguments and errors.
    """

    def __init__(
        self,
        tokenizer: Any,
        harmful: Harmful,
        *,
        lookalikes: Sequence[Prompt] | None = None,
        task: Sequence[tuple[Prompt, str]] | None = None,
        judge: Judge | None = None,
        answer_tokens: int = 12,
        task_tokens: int | None = None,
        batch_size: int = 24,
        kl_prompts: int = 48,
        chat: bool = True,
        progress: bool = True,
    ) -> None:
        self.answer_tokens = integer("answer_tokens", answer_tokens, 1)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.progress = boolean("progress", progress)
        self.judge, self.tokenizer = checked_judge(judge), tokenizer
        known = _sourced(tokenizer, harmful, chat)
        self.sources = [source for source, _, _ in known]
        self.harmful = [ids for _, _, (_, ids) in known]
        texts = [_request(prompt) for _, prompt, _ in known]
        self.lookalikes: list[list[int]] = []
        if lookalikes is not None and lookalikes != []:
            self.lookalikes = [ids for _, ids in _encoded(tokenizer, lookalikes, chat, "lookalike")]
            texts += map(_request, lookalikes)
        self._texts = texts
        self.task: list[list[int]] = []
        self.expected: list[str] = []
        if task is not None and task != []:
            examples = _checked_task(task)
            self.task = [ids for _, ids in _encoded(tokenizer, [prompt for prompt, _ in examples], chat, "task prompt")]
            self.expected = [answer for _, answer in examples]
        longest = max((len(_ids(tokenizer, answer)) for answer in self.expected), default=1)
        self.task_tokens = longest if task_tokens is None else integer("task_tokens", task_tokens, 1)
        self.kl_prompts = min(integer("kl_prompts", kl_prompts, 0), len(self.harmful))
        self.openings = opening_tokens(tokenizer, known[0][2][0], chat)
        parts = [self.harmful, self.lookalikes, self.task, self.expected]
        self.prompts_hash = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        self._base: _Base | None = None

    @property
    def base_answers(self) -> list[list[int]]:
        """Tokens of the base model's answers to harmful prompts, then to look-alikes; none without a base model."""
        return self._base.answers if self._base else []

    def set_base(self, model: nn.Module, *, task: bool = True, description: str = "base model") -> EvaluationReport:
        """Evaluates the model that later ones are compared with: KL divergences are to it, and its answers guessed."""
        self._base = None
        return self._evaluated(model, task, description, base=True)

    def forget_base(self) -> None:
        """Later models are compared with none, and nothing is guessed of their answers."""
        self._base = None

    def __call__(self, model: nn.Module, *, task: bool = True, description: str = "evaluate") -> EvaluationReport:
        """Evaluates a model, which is left in the mode it was in; ``task=False`` leaves the task out."""
        return self._evaluated(model, task, description, base=False)

    def _evaluated(self, model: nn.Module, task: bool, description: str, base: bool) -> EvaluationReport:
        instance("model", model, nn.Module, "a causal language model of Transformers")
        model = unwrapped(model)
        task = boolean("task", task)
        self._check(model)
        total = len(self.harmful) + len(self.lookalikes) + task * len(self.task) + base * self.kl_prompts
        bar = tqdm(total=total, desc=description, unit="prompt", disable=not self.progress)
        settings = {"end": _ends(model, self.tokenizer), "batch_size": self.batch_size, "tick": bar.update}
        with bar, evaluating(model):
            answers, masses, changes = self._answers(model, settings, base)
            openings = []
            if task and self.task:
                openings = generate(model, self.task, new_tokens=self.task_tokens, **settings)
        texts, n = _decoded(self.tokenizer, answers), len(self.harmful)
        verdicts = judged(self.judge, self._texts, texts)
        right = [
            _as_expected(text, wanted, len(ids) == self.task_tokens)
            for text, ids, wanted in zip(_decoded(self.tokenizer, openings), openings, self.expected, strict=False)
        ]
        return EvaluationReport(
            prompts=self.prompts_hash,
            judge=judge_name(self.judge),
            answer_tokens=self.answer_tokens,
            sources=list(self.sources),
            verdicts=verdicts[:n],
            refusal_masses=masses[:n],
            lookalike_verdicts=verdicts[n:],
            lookalike_masses=masses[n:],
            task_correct=right,
            kls=[kl for kl, _ in changes],
            logprob_changes=[change for _, change in changes],
            kl_tokens=[len(self.base_answers[i]) for i in range(len(changes))],
            answers=texts[:n],
            lookalike_answers=texts[n:],
        )

    def _answers(
        self, model: nn.Module, settings: dict[str, Any], base: bool
    ) -> tuple[list[list[int]], list[float], list[tuple[float, float]]]:
        """Answers; of each prompt the mass of refusals' first tokens; of the first prompts KL(base ‖ model) along the
        base model's own answer, and the change of its log-probability."""
        prompts = self.harmful + self.lookalikes
        known = self._base
        guesses = known.answers if known else None
        masses: dict[int, float] = {}
        changes: dict[int, tuple[float, float]] = {}

        def watch(indices: list[int], logits: torch.Tensor) -> None:
            openings = torch.tensor(self.openings, dtype=torch.long, device=logits.device)
            for i, one in zip(indices, logits, strict=True):
                length = len(guesses[i]) if guesses else 1
                masses[i] = float(one[-length].float().softmax(-1)[openings].sum())
                if known and i in known.log_p:
                    changes[i] = _change(known.log_p[i], one[-length:], known.answers[i])

        options = {"new_tokens": self.answer_tokens, **settings}
        answers = generate(model, prompts, guesses=guesses, watch=watch, **options)
        if base:
            made = self._base = _Base(answers)

            def keep(indices: list[int], logits: torch.Tensor) -> None:
                for i, one in zip(indices, logits, strict=True):
                    made.log_p[i] = one[-len(answers[i]) :].float().log_softmax(-1)

            first = slice(self.kl_prompts)
            if self.kl_prompts:
                generate(model, prompts[first], guesses=answers[first], watch=keep, **options)
            changes = dict.fromkeys(made.log_p, (0.0, 0.0))
        ordered = [masses[i] for i in range(len(prompts))] if self.openings else []
        return answers, ordered, [changes[i] for i in sorted(changes)]

    def _check(self, model: nn.Module) -> None:
        """ValueError unless the model can read the prompts, with room for answers."""
        if needs_decoder_ids(model):
            raise ValueError(f"model is an encoder-decoder model, {type(base_model(model)).__name__}; give a decoder")
        self.check_lengths(getattr(base_model(model), "config", None))
        embeddings = getattr(base_model(model), "get_input_embeddings", lambda: None)()
        known = getattr(embeddings, "num_embeddings", None)
        for name, prompts, _ in self._parts():
            for number, ids in enumerate(prompts, 1):
                if known is not None and max(ids) >= known:
                    raise ValueError(
                        f"{name} {number} holds token {max(ids)}, but model knows {known}; give the model's tokenizer"
                    )

    def check_lengths(self, config: Any) -> None:
        """ValueError if a prompt and its answer are longer than a model of that configuration has positions for."""
        limit = positions_of(config)
        for name, prompts, new in self._parts():
            for number, ids in enumerate(prompts, 1):
                if limit is not None and len(ids) + new > limit:
                    raise ValueError(
                        f"{name} {number} has {len(ids)} tokens, and {new} more are to follow, but model has {limit} "
                        "positions; shorten or leave out the prompt"
                    )

    def _parts(self) -> list[tuple[str, list[list[int]], int]]:
        """What to call a prompt, the prompts, and how many tokens follow each."""
        return [
            ("harmful prompt", self.harmful, self.answer_tokens),
            ("lookalike", self.lookalikes, self.answer_tokens),
            ("task prompt", self.task, self.task_tokens),
        ]


def evaluate_refusals(
    model: nn.Module,
    tokenizer: Any,
    harmful: Harmful,
    *,
    lookalikes: Sequence[Prompt] | None = None,
    task: Sequence[tuple[Prompt, str]] | None = None,
    base: nn.Module | str | None = None,
    judge: Judge | None = None,
    answer_tokens: int = 12,
    task_tokens: int | None = None,
    batch_size: int = 24,
    kl_prompts: int = 48,
    chat: bool = True,
    progress: bool = True,
) -> EvaluationReport:
    """How many harmful prompts a model refuses, beside how many harmless ones, and how well it does its task.

    Answers are greedy, from a key-value cache, in batches. A label is what the judge says of an answer. Beside it stand
    numbers without a judge: the probability of the tokens that refusals begin with, at the first token of the answer;
    and against a base model, along its own answers y to the first ``kl_prompts`` harmful prompts x, the mean of
    ``KL(p_base(· | x, y_<t) ‖ p(· | x, y_<t))`` per token, and of ``log p(y | x) − log p_base(y | x)`` per prompt.

    The tokens that refusals begin with are the first token, after the first prompt, of each phrase of
    :data:`guardspace_kernels.guard.judges.REFUSALS`, as listed and with a capital letter, with and without a space in
    front. "I" is one of them, and begins other answers too: compare a model's mass with its base model's, and with that
    of look-alikes.

    Args:
        model: a causal language model of Transformers, with or without adapters. It is left in the mode it was in. Give
            what is deployed: merged into bfloat16 weights, an adapter of few steps is another one, since what is small
            beside a weight is rounded away (38% of ΔW in a layer of SmolLM2-135M after five steps).
        tokenizer: the model's.
        harmful: prompts, as :func:`guardspace_kernels.read_prompts` returns them, that were in no calibration. Or
            tuples of the name of a source and a prompt; or lists of prompts by that name, which are taken in turn.
        lookalikes: harmless prompts that look harmful: refusing these is no safety.
        task: pairs of a prompt and what the answer is to begin with, whatever the case.
        base: the model to compare with: another one, "adapter_off" for this one with its adapter switched off (a
            ``peft.PeftModel``), or None.
        judge: ``judge(prompt, answer)`` -> "refuses", "complies" or "other". The prompt is the last message of the
            user. Default :func:`guardspace_kernels.judge_opening`, which reads openings.
        answer_tokens: how many tokens of an answer are judged. Refusing is decided at its beginning.
        task_tokens: likewise of the task; default as many as the longest expected beginning has. An answer that is cut
            short by it is right if what is expected begins with it.
        batch_size: prompts that are read together.
        kl_prompts: whose log-probabilities are kept: (answer tokens, vocabulary) float32 each.
        chat: False takes texts as they are, without the chat template.
        progress: show a progress bar.

    Returns:
        :class:`EvaluationReport`: printed, saved, drawn, and compared with another one.

    Raises:
        TypeError, ValueError: no causal language model, another model's tokenizer, prompts that are empty, too long or
            end with an assistant's message, or a judge that says anything else. The message names the prompt or answer
            by its number, from 1.
    """
    instance("model", model, nn.Module, "a causal language model of Transformers")
    if base is not None and not isinstance(base, nn.Module) and base != ADAPTER_OFF:
        raise TypeError(f'base must be a model, "{ADAPTER_OFF}" or None, got {shown(base)}')
    evaluator = RefusalEvaluator(
        tokenizer,
        harmful,
        lookalikes=lookalikes,
        task=task,
        judge=judge,
        answer_tokens=answer_tokens,
        task_tokens=task_tokens,
        batch_size=batch_size,
        kl_prompts=kl_prompts,
        chat=chat,
        progress=progress,
    )
    before = None
    if isinstance(base, nn.Module):
        before = evaluator.set_base(base)
    elif base is not None:
        with adapter_off(model):
            before = evaluator.set_base(model)
    report = evaluator(model)
    report.base = before
    return report


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within, a PEFT model is its base model; TypeError of any other."""
    peft: Any = peft_model(model)
    if not callable(getattr(peft, "disable_adapter", None)):
        raise TypeError(
            f'base is "{ADAPTER_OFF}", which needs a peft.PeftModel as the model, got {shown(model)}; give the base '
            "model itself"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for p in model.parameters():  # PEFT has an adapter that it switches on again require gradients
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)


def opening_tokens(tokenizer: Any, context: str, chat: bool = True) -> list[int]:
    """The tokens that refusals begin with after that text; sorted. An unknown or blank token is none."""
    before = _ids(tokenizer, context, not chat)
    found = set()
    for phrase in REFUSALS:
        for variant in {
            phrase,
            phrase.capitalize(),
            phrase.replace("'", "\u2019"),
            phrase.capitalize().replace("'", "\u2019"),
        }:
            for text in (variant, f" {variant}"):
                whole = _ids(tokenizer, context + text, not chat)
                # Where the tokenizer joins the phrase to what stands before it, the phrase alone has to do.
                alone = whole[len(before) :] if whole[: len(before)] == before else _ids(tokenizer, text)
                found.update(alone[:1])
    found.discard(getattr(tokenizer, "unk_token_id", None))
    return [token for token in sorted(found) if _decoded(tokenizer, [[token]])[0].strip()]


def _change(base: torch.Tensor, logits: torch.Tensor, answer: Sequence[int]) -> tuple[float, float]:
    """Mean KL(base ‖ model) along an answer, and the change of the answer's log-probability."""
    log_p = logits.float().log_softmax(-1)
    base = base.to(log_p.device)
    chosen = torch.tensor(answer, device=log_p.device)[:, None]
    kl = (base.exp() * (base - log_p)).sum(-1).mean()
    return float(kl), float((log_p.gather(1, chosen) - base.gather(1, chosen)).sum())


def _as_expected(text: str, wanted: str, cut: bool) -> bool:
    text, wanted = text.strip().lower(), wanted.strip().lower()
    return text.startswith(wanted) or (cut and bool(text) and wanted.startswith(text))


def _sourced(tokenizer: Any, harmful: Any, chat: bool) -> list[tuple[str, Prompt, tuple[str, list[int]]]]:
    """(source, prompt, its text and tokens) of each harmful prompt."""
    if not isinstance(harmful, Mapping):
        instance("harmful", harmful, (list, tuple), "a list of prompts, or such lists by the name of their source")
        pairs = [one if isinstance(one, tuple) and len(one) == 2 else ("harmful", one) for one in harmful]
        rows = _encoded(tokenizer, [prompt for _, prompt in pairs], chat, "harmful prompt")
        return [(str(source), prompt, row) for (source, prompt), row in zip(pairs, rows, strict=True)]
    if not harmful:
        raise ValueError("harmful is {}, without a source: at least one prompt is needed")
    parts = []
    for source, prompts in harmful.items():
        rows = _encoded(tokenizer, prompts, chat, f"harmful {source} prompt")
        parts.append([(str(source), prompt, row) for prompt, row in zip(prompts, rows, strict=True)])
    return [one for turn in zip_longest(*parts) for one in turn if one is not None]


def _encoded(tokenizer: Any, prompts: Any, chat: bool, name: str) -> list[tuple[str, list[int]]]:
    rows = prompt_tokens(tokenizer, prompts, chat=chat, name=name)
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"{name} {number} ends with an assistant's message, where the model's own answer is to follow; leave "
                "that message out"
            )
    return rows


def _checked_task(task: Any) -> list[tuple[Prompt, str]]:
    instance("task", task, (list, tuple), "a list of pairs of a prompt and what its answer begins with")
    for number, example in enumerate(task, 1):
        pair = isinstance(example, (list, tuple)) and len(example) == 2
        if not (pair and isinstance(example[1], str) and example[1].strip()):
            raise ValueError(
                f"task example {number} must be a prompt and a text that its answer begins with, got {shown(example)}"
            )
    return list(task)


def _request(prompt: Prompt) -> str:
    """What a judge is told of a prompt: the text, or the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    last = [message for message in prompt if message["role"] == "user"][-1]
    return "\n".join(texts_of(last, "prompt"))


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    own = getattr(tokenizer, "eos_token_id", None)
    return {*end_tokens(base_model(model)), *([] if own is None else [own])}


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _decoded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    # Of no rows, tokenizers make one text.
    return list(tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)) if rows else []
