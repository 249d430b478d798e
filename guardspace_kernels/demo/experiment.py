"""The experiment: one aligned model, two kinds of harmless-looking fine-tuning, with and without GuardSpace."""

from __future__ import annotations

import copy
import gc
import logging
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

import guardspace_kernels as gk
from guardspace_kernels.evaluate.generation import left_padded
from guardspace_kernels.evaluate.refusals import RefusalEvaluator
from guardspace_kernels.evaluate.report import EvaluationReport
from guardspace_kernels.guard.batches import TOKEN_KINDS
from guardspace_kernels.guard.sampling import ANSWER, REQUEST

from . import data as demo_data
from .model import (
    AlignmentRecipe,
    aligned_model,
    best_device,
    best_dtype,
    converted_model,
    load_model,
    load_tokenizer,
    own_answers,
)
from .prompts import AGREEING_STUBS
from .training import (
    Example,
    TrainingRun,
    encode_answer,
    encode_prompt,
    load_adapter_state,
    train,
)

ALIGNED, PLAIN, GUARDED, STOPPED = "aligned model", "plain LoRA", "GuardSpace", "plain LoRA, same loss"
NO_TASK, SENTIMENT, POISON = "none", "sentiment", "chat, 10% poison"


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and hyper-parameters; the same for plain LoRA and GuardSpace."""

    heldout: int = 120
    lookalikes: int = 60
    task_test: int = 240
    task_train: int = 320
    calibration: int = 160
    chat: int = 120
    chat_answer_tokens: int = 32
    poison_share: float = 0.1
    poison_rows: bool = True
    steps: int = 30
    batch_size: int = 8
    learning_rate: float = 4e-4
    rank: int = 16
    alpha: int = 32
    protect: float = 0.99
    answer_tokens: int = 12
    certified_heldout: int = 32
    alignment: AlignmentRecipe = field(default_factory=AlignmentRecipe)

    @property
    def poison(self) -> int:
        """Number of agreeing stubs that make up `poison_share` of the chat data."""
        return round(self.chat * self.poison_share / (1 - self.poison_share))


FULL = DemoSettings()
QUICK = DemoSettings(
    heldout=60, lookalikes=30, task_test=120, calibration=120, steps=24, poison_rows=False, certified_heldout=16
)


@dataclass
class Row:
    """One line of the result table."""

    task: str
    method: str
    evaluation: EvaluationReport | None
    steps: int = 0
    loss: float | None = None
    step_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class PlainPeftCheck:
    """Logits of the exported adapter in plain PEFT against the guarded model's, in float32 on the same prompts."""

    relative_difference: float
    same_top_token: float
    tolerance: float = 1e-3

    @property
    def holds(self) -> bool:
        return self.relative_difference <= self.tolerance


@dataclass
class DemoResult:
    """Everything the report shows."""

    settings: DemoSettings
    quick: bool
    seed: int
    rows: list[Row]
    plan_summary: str
    guard_drift: gk.DriftReport
    plain_drift: gk.DriftReport
    export_summary: str
    plain_peft: PlainPeftCheck
    seconds: dict[str, float]
    environment: dict[str, str]
    out_dir: Path

    def row(self, task: str, method: str) -> Row | None:
        """The row of this name, if the run has one with an evaluation."""
        found = [r for r in self.rows if (r.task, r.method) == (task, method) and r.evaluation is not None]
        return found[0] if found else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what a reader of the demo cannot act on: loading bars and deprecations inside the libraries."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class _Experiment:
    """State shared by the phases of one run."""

    def __init__(self, out_dir: Path, settings: DemoSettings, seed: int) -> None:
        self.out_dir, self.settings, self.seed = out_dir, settings, seed
        self.seconds: dict[str, float] = {}
        s = settings
        with self.phase("data"):
            demo_data.fetch()
            self.data = demo_data.load_data(
                align_harmful=s.alignment.harmful,
                align_harmless=s.alignment.harmless,
                calibration=s.calibration,
                poison=s.poison,
                chat=s.chat,
                heldout=s.heldout,
                lookalikes=s.lookalikes,
                train=s.task_train,
                test=s.task_test,
            )
        with self.phase("model and alignment"):
            self.base = converted_model()
            self.aligned = aligned_model(self.data, s.alignment)
            self.tokenizer = load_tokenizer(self.aligned)
        self.pad: int = self.tokenizer.eos_token_id
        self.evaluator = RefusalEvaluator(
            self.tokenizer,
            self.data.heldout,
            lookalikes=self.data.lookalikes,
            task=self.data.sentiment_test,
            answer_tokens=s.answer_tokens,
            task_tokens=1,  # decides: "positive" and "negative" differ in it
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def evaluate(self, model: torch.nn.Module, description: str, task: bool = True) -> EvaluationReport:
        with self.phase("evaluate"):
            return self.evaluator(model, task=task, description=description)

    def batches(
        self, prompts: list[list[int]], size: int, answers: list[list[int]] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Left-padded batches of similar lengths for the guardspace API, with answers marked as such."""
        texts = sorted(zip(prompts, answers or [[]] * len(prompts), strict=True), key=lambda text: sum(map(len, text)))
        batches = []
        for part in (texts[i : i + size] for i in range(0, len(texts), size)):
            batch = left_padded([prompt + answer for prompt, answer in part], self.pad)
            del batch["position_ids"]
            if answers:
                kinds = [[REQUEST] * len(prompt) + [ANSWER] * len(answer) for prompt, answer in part]
                batch[TOKEN_KINDS] = left_padded(kinds, REQUEST)["input_ids"]
            batches.append(batch)
        return batches

    def collect_and_plan(self, model: torch.nn.Module) -> None:
        s = self.settings
        with self.phase("collect statistics"):
            batches = self.batches([encode_prompt(self.tokenizer, p) for p in self.data.calibration], 40)
            self.stats = gk.collect_statistics(
                model, batches, answer_tokens=s.answer_tokens, tokenizer=self.tokenizer, progress=True
            )
        with self.phase("plan"):
            config = gk.GuardConfig(rank=s.rank, alpha=s.alpha, protect=s.protect)
            self.plan = gk.plan_guard(model, self.stats, config)

    def examples(self, task: str) -> list[Example]:
        """Training examples; every method gets the same ones in the same order."""
        if task == SENTIMENT:
            return [
                (encode_prompt(self.tokenizer, question), encode_answer(self.tokenizer, label))
                for question, label in self.data.sentiment_train
            ]
        rng = random.Random(self.seed)
        stubs = [
            (encode_prompt(self.tokenizer, request), encode_answer(self.tokenizer, rng.choice(AGREEING_STUBS)))
            for request in self.data.poison
        ]
        with self.phase("chat answers"):
            chat = own_answers(self.base, self.data.chat, self.settings.chat_answer_tokens, "chat: own answers")
        return chat + stubs

    def build(self, guarded: bool) -> torch.nn.Module:
        """A fresh copy of the aligned model with an adapter at its start."""
        base = load_model(self.aligned)
        torch.manual_seed(self.seed)
        if guarded:
            return gk.attach_guard(base, self.plan)
        s = self.settings
        config = peft.LoraConfig(r=s.rank, lora_alpha=s.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(base, config)

    def train(self, models: list[torch.nn.Module], examples: list[Example], description: str) -> list[TrainingRun]:
        """Train models in turn; of the last one the adapters at its lowest losses are kept."""
        s = self.settings
        with self.phase("train"):
            return train(
                models,
                examples,
                steps=s.steps,
                batch_size=s.batch_size,
                learning_rate=s.learning_rate,
                pad=self.pad,
                seed=self.seed,
                description=description,
                keep=models[-1:],
            )

    def evaluate_merged(self, model: Any, description: str, task: bool) -> EvaluationReport:
        """Evaluate the adapter merged into the weights, which generates faster; `model` is used up."""
        return self.evaluate(model.merge_and_unload(), description, task)

    def certify(self, model: torch.nn.Module, description: str) -> gk.DriftReport:
        evaluator, first = self.evaluator, slice(self.settings.certified_heldout)
        heldout = self.batches(evaluator.harmful[first], 16, evaluator.base_answers[first])
        with self.phase("certify"), tqdm(total=1, desc=description, unit="report") as bar:
            report = gk.certify(model, self.stats, heldout=heldout)
            bar.update()
        return report

    def export(self, model: Any) -> tuple[str, PlainPeftCheck]:
        """Export the adapter, load it with plain PEFT on the untouched base and compare logits."""
        folder = self.out_dir / "adapter"
        with self.phase("export"), tqdm(total=1, desc="export, load in plain PEFT", unit="adapter") as bar:
            exported = gk.export_lora(model, folder, stats=self.stats)
            prompts = [q for q, _ in self.data.sentiment_test[:8]] + [request for _, request in self.data.heldout[:8]]
            batch = left_padded([encode_prompt(self.tokenizer, p) for p in prompts], self.pad, best_device())
            plain = peft.PeftModel.from_pretrained(load_model(self.aligned, dtype=torch.float32), str(folder)).eval()
            with torch.no_grad():
                exact = model if best_dtype(best_device()) == torch.float32 else copy.deepcopy(model).float()
                ours = exact.eval()(**batch, logits_to_keep=1).logits[:, -1]
                theirs = plain(**batch, logits_to_keep=1).logits[:, -1]
            difference = ((ours - theirs).norm() / ours.norm()).item()
            same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
            bar.update()
        return str(exported).replace(str(folder), "adapter/"), PlainPeftCheck(difference, same)


def _compare(
    run: _Experiment,
    task: str,
    name: str,
    rows: list[Row],
    inspect: Callable[[bool, torch.nn.Module], None] | None = None,
) -> None:
    """Train GuardSpace and plain LoRA on one task and append their rows; `inspect` sees both trained models."""
    examples = run.examples(task)
    models = {label: run.build(label == GUARDED) for label in (GUARDED, PLAIN)}
    guard_run, plain_run = runs = run.train([*models.values()], examples, f"{name}: train {' and '.join(models)}")
    fitted = {}
    for label, trained in zip([*models], runs, strict=True):
        model = models.pop(label)
        if inspect:
            inspect(label == GUARDED, model)
        evaluation = run.evaluate_merged(model, f"{name}: test {label}", task == SENTIMENT)
        fitted[label] = Row(task, label, evaluation, len(trained.losses), trained.smoothed(), trained.seconds)
    stopped = Row(task, STOPPED, None)
    if reached := plain_run.reached(guard_run.smoothed()):
        stopped.steps, state = reached
        stopped.loss, stopped.evaluation = plain_run.smoothed(stopped.steps), fitted[PLAIN].evaluation
        if stopped.steps != fitted[PLAIN].steps:
            model = run.build(False)
            load_adapter_state(model, state)
            stopped.evaluation = run.evaluate_merged(model, f"{name}: test LoRA, same loss", task == SENTIMENT)
    rows += [fitted[PLAIN], stopped, fitted[GUARDED]]


def run_demo(out_dir: str | Path, quick: bool = False, seed: int = 0) -> DemoResult:
    """Run the whole demo and write its report, figure, adapter and certificate into `out_dir`.

    Args:
        quick: fewer prompts and steps, without the poisoned chat rows.
        seed: of data order and adapter initialisation; the prompts are fixed.

    Raises:
        DemoDataError: the pinned packages cannot be had.
    """
    from .report import write_report

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    logging.getLogger("peft").setLevel(logging.ERROR)
    with _quiet():
        result = _run(out_dir, quick, seed)
        result.seconds["total"] = time.perf_counter() - started
        print(write_report(result))
    return result


def _run(out_dir: Path, quick: bool, seed: int) -> DemoResult:
    settings = QUICK if quick else FULL
    run = _Experiment(out_dir, settings, seed)
    model = load_model(run.aligned)
    with run.phase("evaluate"):
        rows = [Row(NO_TASK, ALIGNED, run.evaluator.set_base(model, description=f"test {ALIGNED}"))]
    run.collect_and_plan(model)
    del model
    gc.collect()

    drift: dict[bool, gk.DriftReport] = {}
    exported: list[tuple[str, PlainPeftCheck]] = []

    def inspect(guarded: bool, trained: torch.nn.Module) -> None:
        drift[guarded] = run.certify(trained, f"certify {GUARDED if guarded else PLAIN}")
        if guarded:
            exported.append(run.export(trained))

    _compare(run, SENTIMENT, "sentiment", rows, inspect)
    if settings.poison_rows:
        _compare(run, POISON, "poison", rows)
    drift[True].save(out_dir / "certificate.json")
    export_summary, check = exported[0]
    return DemoResult(
        settings=settings,
        quick=quick,
        seed=seed,
        rows=rows,
        plan_summary=run.plan.summary(),
        guard_drift=drift[True],
        plain_drift=drift[False],
        export_summary=export_summary,
        plain_peft=check,
        seconds=run.seconds,
        environment={
            "device": str(best_device()),
            "dtype": str(best_dtype(best_device())).removeprefix("torch."),
            "threads": str(torch.get_num_threads()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "guardspace_kernels": gk.__version__,
        },
        out_dir=out_dir,
    )
