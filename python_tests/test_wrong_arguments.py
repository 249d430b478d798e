"""Every public function and class refuses what it cannot use by the argument's name, and shows what it got.

One table: (callable, argument) -> values that are wrong. A refusal is a ``raise`` of this package, or the schema check
of a registered op; it names the argument and shows the value, its type or its shape.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent / "guard"))
from guard_helpers import batch_of, collect, perturb, plan_for, tiny_llama

import guardspace_kernels as gk
from guardspace_kernels.cli import _refused
from guardspace_kernels.guard.inspection import inspect_statistics

D_OUT, D, R = 5, 6, 2


class Tokenizer:
    """Takes texts of digits."""

    chat_template, pad_token_id = "", 0

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(n) if n.isdigit() else 59 for n in text.split()]}

    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row)) for row in rows]


class Things:
    """What calls are made with; made once, since what is refused changes nothing."""

    def __init__(self, folder):
        self.folder, self.file = folder / "folder", folder / "file.txt"
        self.folder.mkdir()
        self.file.write_text("1 2\n")
        self.model = tiny_llama()
        self.stats = collect(self.model)
        self.plan = plan_for(self.model, self.stats)
        self.guarded = perturb(gk.attach_guard(tiny_llama(), self.plan))
        self.report, self.exported = gk.certify(self.guarded, self.stats), gk.export_lora(self.guarded, folder / "e")
        self.basis = torch.linalg.qr(torch.randn(D, 2)).Q
        self.evaluator = gk.RefusalEvaluator(Tokenizer(), ["1 2"], chat=False, progress=False)
        self.evaluation = self.evaluator(self.model)
        self.optimizer = torch.optim.AdamW(self.guarded.parameters())


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    return Things(tmp_path_factory.mktemp("arguments"))


def exhausted():
    batches = iter([batch_of()])
    list(batches)
    return batches


NAN, INF = float("nan"), float("inf")
TYPES = [None, "3", b"3", {}, object(), len]
NO_NUMBER = [None, "3", True, [3], torch.tensor(3.0), np.bool_(True), 1j]
NO_INTEGER = [*NO_NUMBER, 2.5, NAN, INF, np.float32(2.0)]
NO_BOOL = [None, "yes", 1, 0.0, torch.tensor(True), []]
NO_DTYPE = ["float32", 32, torch.int32, torch.float16, np.float32]
NO_PATH = [None, 3, b"x", "", ["x"]]
NO_MODULE = [None, "model", {}, nn.Linear, tiny_llama, torch.ones(2)]
NO_TENSOR = ["x", 3, [1.0], {}]
NO_BATCHES = [None, "text", b"text", 3, dict]
A_BATCH = [
    ["text"],
    [None],
    [torch.ones(1, 3)],
    [{}],
    [{"input_ids": [[1, 2]]}],
    [{"input_ids": torch.ones(1, 3)}],
    [{"input_ids": torch.ones(3, dtype=torch.long)}],
    [{"input_ids": torch.ones(0, 3, dtype=torch.long)}],
    [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)}],
    [{"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.full((1, 3), NAN)}],
    [{"input_ids": torch.full((1, 3), 10**6)}],
    [{"input_ids": torch.ones(1, 3000, dtype=torch.long)}],
]
SHAPES = [torch.randn(2), torch.ones(D, D, dtype=torch.int64), torch.randn(3, 7)]
LISTS = [None, "x", 3, torch.randn(3, D), [], [torch.randn(3, 7)]]


def no_stats(things):
    return [None, "stats", things.file, gk.CalibrationStatistics, [things.stats], things.plan]


def use_backend(name):
    with gk.use_backend(name):
        pass


def masked(mask):
    accumulator = gk.nn.CovarianceAccumulator(D)
    with accumulator.masked(mask):
        accumulator.update(torch.randn(4, D), accumulator._mask)


def adamw_lists(things):
    lists = {name: [torch.rand(3, D)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    return {**lists, "steps": [torch.ones(())], "bases": [things.basis], "complements": True, **numbers}


def table(things):
    """Name -> (callable, arguments that it takes, argument -> values that it does not take)."""
    t, ops, modules = things, gk.ops, gk.nn
    accumulator = modules.CovarianceAccumulator(D)
    layer = {
        "weight": torch.randn(D_OUT, D),
        "lora_A": torch.randn(R, D),
        "lora_B": torch.randn(D_OUT, R),
        "basis": t.basis,
    }
    config, path = gk.GuardConfig(rank=3), [*NO_PATH, t.folder]
    missing = t.folder / "none"
    return {
        "collect_statistics": (
            gk.collect_statistics,
            {"model": t.model, "batches": [batch_of()], "progress": False},
            {
                "model": [*NO_MODULE, t.guarded],
                "batches": [*NO_BATCHES, [], exhausted(), *A_BATCH],
                "target_modules": [None, 3, [], [3], "(", "nope", ["nope"], ["q_proj", "nope"], nn.Linear],
                "answer_tokens": [*NO_INTEGER, -1],
                "separate_sink": NO_BOOL,
                "separate_prefix": [*NO_INTEGER, -1],
                "kind_weights": [3, [1, 1, 1], {"nope": 1}, {"request": -1}, {"request": "1"}, {"request": NAN}],
                "dtype": [None, *NO_DTYPE],
                "progress": NO_BOOL,
                "checkpoint": [3, b"x", "", t.folder, t.file / "x"],
                "checkpoint_every": [*NO_INTEGER, 0],
                "max_memory": ["lots", -1, 0, True, NAN, [1], b"4GB"],
                "tokenizer": [3, "x", Tokenizer, {}],
                "judge": [3, "x", ["refuses"]],
                "allow_unrefused": NO_BOOL,
            },
        ),
        "plan_guard": (
            gk.plan_guard,
            {"model": t.model, "stats": t.stats, "config": config, "progress": False, "allow_few_prompts": True},
            {
                "model": [*NO_MODULE, t.guarded],
                "stats": no_stats(t),
                "config": ["x", {"rank": 3}, gk.GuardConfig, 3],
                "target_modules": [3, [], [3], "(", "nope"],
                "progress": NO_BOOL,
                "max_memory": ["lots", -1, 0, True],
                "allow_few_prompts": NO_BOOL,
                "allow_unrefused": NO_BOOL,
            },
        ),
        "attach_guard": (
            gk.attach_guard,
            {"model": t.model, "plan": t.plan},
            {
                "model": [*NO_MODULE, t.guarded],
                "plan": [None, "plan", t.file, gk.GuardPlan, t.stats],
                "residual": [None, 3, "real", ["frozen"]],
                "adapter_name": [None, 3, b"x", "", "a.b"],
                "start": [3, b"x", "", [], t.model, t.folder, t.folder / "none"],
            },
        ),
        "certify": (
            gk.certify,
            {"model": t.guarded, "stats": t.stats, "heldout": [batch_of()], "answer_tokens": 2},
            {
                "model": NO_MODULE,
                "stats": no_stats(t),
                "heldout": [*NO_BATCHES[1:], *A_BATCH],
                "plan": ["plan", t.file, gk.GuardPlan, t.stats],
                "answer_tokens": [*NO_INTEGER, 0],
                "max_drift": [*NO_NUMBER[1:], NAN, INF, -1],
            },
        ),
        "DriftMonitor": (
            gk.DriftMonitor,
            {"stats": t.stats},
            {
                "stats": no_stats(t),
                "every": [*NO_INTEGER, 0, -1],
                "max_drift": [*NO_NUMBER[1:], NAN, INF, -1],
                "per_layer": NO_BOOL,
            },
        ),
        "DriftMonitor.__call__": (gk.DriftMonitor(t.stats), {"model": t.guarded}, {"model": [*NO_MODULE, t.model]}),
        "export_lora": (
            gk.export_lora,
            {"model": t.guarded, "path": t.folder, "stats": t.stats},
            {
                "model": NO_MODULE,
                "path": [*NO_PATH, t.file, t.file / "x"],
                "dtype": ["float32", 32, torch.int32, torch.complex64],
                "stats": no_stats(t)[1:],
            },
        ),
        "GuardConfig": (
            gk.GuardConfig,
            {},
            {
                "rank": [*NO_INTEGER, 0, -1],
                "alpha": [*NO_NUMBER[1:], NAN, INF, 0, -1],
                "protect": [*NO_NUMBER, NAN, INF, 0, -1, 1.1],
                "rule": [None, 3, "best", ["energy"]],
                "init": [None, 3, "best", torch.ones(2)],
                "projector": NO_BOOL,
                "damping": [*NO_NUMBER, NAN, INF, -1],
                "dropout": [*NO_NUMBER, NAN, INF, -1, 1.0],
                "seed": NO_INTEGER,
            },
        ),
        "GuardConfig(rule='rank')": (
            functools.partial(gk.GuardConfig, rule="rank"),
            {"protect_dims": 3},
            {"protect_dims": [*NO_INTEGER[1:], -1]},
        ),
        "GuardPlan.load": (gk.GuardPlan.load, None, {"path": [*path, t.file, missing]}),
        "GuardPlan.save": (t.plan.save, None, {"path": path}),
        "GuardPlan.space_of": (t.plan.space_of, None, {"name": [None, 3, "nope"]}),
        "CalibrationStatistics.load": (gk.CalibrationStatistics.load, None, {"path": [*path, t.file, missing]}),
        "CalibrationStatistics.save": (t.stats.save, None, {"path": path}),
        "CalibrationStatistics.merge": (t.stats.merge, None, {"other": no_stats(t)}),
        "CalibrationStatistics.for_layer": (t.stats.for_layer, None, {"name": [None, 3, "nope"]}),
        "DriftReport.save": (t.report.save, None, {"path": path}),
        "ExportReport.save": (t.exported.save, None, {"path": path}),
        "GuardedAdamW": (
            gk.GuardedAdamW,
            {"model": t.guarded},
            {
                "model": [*NO_MODULE, t.model],
                "params": ["x", 3, [], [torch.randn(3)], dict],
                "lr": [*NO_NUMBER, NAN, INF, -1],
                "betas": [None, 0.9, (0.9,), ("a", "b"), (1.0, 0.9), (0.9, -1), (NAN, 0.9), (True, 0.9)],
                "eps": [*NO_NUMBER, NAN, INF, -1],
                "weight_decay": [*NO_NUMBER, NAN, INF, -1],
            },
        ),
        "guard_optimizer": (
            gk.guard_optimizer,
            {"optimizer": t.optimizer, "model": t.guarded},
            {
                "optimizer": [None, "adamw", torch.optim.AdamW, 3, torch.optim.AdamW([nn.Parameter(torch.ones(2))])],
                "model": [*NO_MODULE, t.model],
            },
        ),
        "read_prompts": (
            gk.read_prompts,
            {"path": t.file},
            {"path": [*path, missing], "column": [3, b"x", ["a"], "goal"]},
        ),
        "prompt_batches": (
            gk.prompt_batches,
            {"tokenizer": Tokenizer(), "prompts": ["1 2"], "chat": False},
            {
                "tokenizer": [*TYPES, Tokenizer],
                "prompts": [None, "text", 3, {"a": 1}, [], [3], [None], [""], [[{"role": "user"}]]],
                "batch_size": [*NO_INTEGER, 0, -1],
                "chat": NO_BOOL,
                "max_tokens": [*NO_INTEGER[1:], 0, -1],
            },
        ),
        "evaluate_refusals": (
            gk.evaluate_refusals,
            {"model": t.model, "tokenizer": Tokenizer(), "harmful": ["1 2"], "chat": False, "progress": False},
            {
                "model": NO_MODULE,
                "tokenizer": [*TYPES, Tokenizer],
                "base": [3, b"x", "adapter_on", {}, nn.Linear, "adapter_off"],
                **(
                    evaluated := {
                        "harmful": [None, "text", 3, {}, [], [3], [None], [""], {"x": []}, {"x": "text"}, {"x": [3]}],
                        "lookalikes": ["text", 3, {"a": 1}, [3], [None], [""]],
                        "task": ["text", 3, {"a": 1}, ["1"], [("1", "2", "3")], [("1", 2)], [("1", " ")], [("", "2")]],
                        "judge": [3, "judge", ["refuses"]],
                        "answer_tokens": [*NO_INTEGER, 0],
                        "task_tokens": [*NO_INTEGER[1:], 0],
                        "batch_size": [*NO_INTEGER, 0],
                        "kl_prompts": [*NO_INTEGER, -1],
                        "chat": NO_BOOL,
                        "progress": NO_BOOL,
                    }
                ),
            },
        ),
        "RefusalEvaluator": (
            gk.RefusalEvaluator,
            {"tokenizer": Tokenizer(), "harmful": ["1 2"], "chat": False, "progress": False},
            {"tokenizer": [*TYPES, Tokenizer], **evaluated},
        ),
        "EvaluationCallback": (
            gk.EvaluationCallback,
            {"tokenizer": Tokenizer(), "harmful": ["1 2"], "chat": False},
            {"tokenizer": [*TYPES, Tokenizer], "every": [*NO_INTEGER, 0], **evaluated},
        ),
        "RefusalEvaluator.set_base": (t.evaluator.set_base, {"model": t.model}, {"model": NO_MODULE, "task": NO_BOOL}),
        "RefusalEvaluator.__call__": (t.evaluator, {"model": t.model}, {"model": NO_MODULE, "task": NO_BOOL}),
        "EvaluationReport.save": (t.evaluation.save, {"path": t.file}, {"path": NO_PATH, "answers": NO_BOOL}),
        "EvaluationReport.load": (gk.EvaluationReport.load, None, {"path": [*path, missing, t.file]}),
        "EvaluationReport.compare": (t.evaluation.compare, None, {"other": [None, "x", t.stats, gk.EvaluationReport]}),
        "inspect_statistics": (
            inspect_statistics,
            {"stats": t.stats, "progress": False},
            {
                "stats": [None, "x", 3, [], [None], gk.CalibrationStatistics],
                "task": ["x", t.plan],
                "heldout": ["x", [t.stats]],
                "rank": [*NO_INTEGER, 0],
                "progress": NO_BOOL,
            },
        ),
        "use_backend": (use_backend, {"name": "auto"}, {"name": [None, 3, "tpu", ["cpu"]]}),
        "ops.covariance_update_": (
            ops.covariance_update_,
            {"covariance": torch.zeros(D, D), "x": torch.randn(4, D)},
            {
                "covariance": [None, *NO_TENSOR[:-1], *SHAPES, torch.zeros(D, D).half(), []],
                "x": [None, *NO_TENSOR, *SHAPES, torch.randn(4, D, device="meta")],
                "mask": [*NO_TENSOR, torch.randn(4), torch.ones(3).bool()],
                "scale": [None, "x", [1], torch.randn(2), NAN, INF],
            },
        ),
        "ops.squared_drift": (
            ops.squared_drift,
            {"covariance": torch.eye(D), "F": torch.randn(D_OUT, R), "G": torch.randn(R, D)},
            {name: [*NO_TENSOR, *SHAPES] for name in ("covariance", "F", "G")},
        ),
        "ops.symmetrize_": (ops.symmetrize_, None, {"covariance": [*NO_TENSOR, *SHAPES]}),
        "ops.null_project_": (
            ops.null_project_,
            {"g": torch.randn(3, D), "basis": t.basis},
            {
                "g": [None, *NO_TENSOR[1:2], torch.ones(3, D).long(), torch.randn(())],
                "basis": [None, *NO_TENSOR, *SHAPES, torch.randn(D, D + 1)],
                "complement": NO_BOOL,
            },
        ),
        "ops.null_project_ of a list": (
            ops.null_project_,
            {"g": [torch.randn(3, D)], "basis": [t.basis]},
            {"basis": [None, 3, t.basis, [torch.randn(3, 7)]], "complement": [None, "yes", [None], [1], [True] * 2]},
        ),
        "ops.projected_lora": (
            ops.projected_lora,
            {"x": torch.randn(4, D), **layer, "frozen_A": layer["lora_A"], "frozen_B": layer["lora_B"]},
            {
                **{name: [*NO_TENSOR[1:], *SHAPES] for name in ("weight", "lora_A", "lora_B", "basis", "bias")},
                "x": [torch.randn(3, 7), torch.ones(4, D).long()],
                "frozen_A": [3, *SHAPES],
                "frozen_B": [3, *SHAPES],
                "complement": NO_BOOL,
                "scale": [None, "x", [1]],
                "dropout": [None, "x", NAN, -1, 1.0],
                "output_sizes": ["x", 3, [], [0, D_OUT], [2, 2], [2.5, 2.5]],
            },
        ),
        "ops.projected_lora with dropout": (
            functools.partial(ops.projected_lora, dropout=0.5),
            {"x": torch.randn(4, D), **layer},
            {"seed": ["x", 1.5, torch.randn(()), torch.ones(2).long()]},
        ),
        "ops.projected_adamw_": (
            ops.projected_adamw_,
            adamw_lists(t),
            {
                **dict.fromkeys(("grads", "exp_avgs", "exp_avg_sqs", "bases", "steps"), LISTS),
                "params": [None, "x", 3, torch.randn(3, D), [3], [torch.ones(3, D).long()]],
                "complements": [None, "x", [], [None], 3, ["yes"]],
                "lr": [None, "x", [1], NAN, INF, -1],
                "beta1": [None, "x", NAN, -1, 1.0],
                "beta2": [None, "x", NAN, -1, 1.0],
                "eps": [None, "x", NAN, -1],
                "weight_decay": [None, "x", NAN, -1],
            },
        ),
        "nn.NullSpaceProjector": (
            modules.NullSpaceProjector,
            {"basis": t.basis},
            {
                "basis": [None, *NO_TENSOR, *SHAPES, torch.randn(D, D + 1)],
                "complement": NO_BOOL,
                "persistent": NO_BOOL,
            },
        ),
        "nn.NullSpaceProjector.forward": (
            modules.NullSpaceProjector(t.basis),
            None,
            {"x": [None, *NO_TENSOR, *SHAPES[::2], torch.randn(())]},
        ),
        "nn.NullSpaceProjector.project_": (
            modules.NullSpaceProjector(t.basis).project_,
            None,
            {"g": [None, 3, torch.ones(3, D).long(), torch.randn(())]},
        ),
        "nn.ProjectedLoraLinear": (
            modules.ProjectedLoraLinear,
            {**layer, "bias": None},
            {
                **{name: [*NO_TENSOR, *SHAPES] for name in ("lora_A", "lora_B", "basis", "bias")},
                "weight": [None, *NO_TENSOR, *SHAPES[:2]],
                "complement": NO_BOOL,
                "scale": [*NO_NUMBER, NAN, INF],
                "dropout": [*NO_NUMBER, NAN, -1, 1.0],
                "virtual_residual": NO_BOOL,
                "output_sizes": [[2, 2], [0, D_OUT]],
            },
        ),
        "nn.ProjectedLoraLinear.from_linear": (
            modules.ProjectedLoraLinear.from_linear,
            {"linear": nn.Linear(D, D_OUT), "rank": R, "basis": t.basis},
            {
                "linear": [*NO_MODULE, nn.Conv1d(3, 3, 1)],
                "rank": [*NO_INTEGER, 0, -1, 99],
                "basis": [None, *NO_TENSOR, *SHAPES],
                "alpha": [*NO_NUMBER[1:], NAN, INF, 0, -1],
                "dropout": [*NO_NUMBER, NAN, -1, 1.0],
                "init": ["x", 3, (layer["lora_A"],), (layer["lora_A"], None), (torch.ones(3, 3), torch.ones(3, 3))],
                "dtype": [None, "float32", 32, torch.int32],
                "complement": NO_BOOL,
            },
        ),
        "nn.FusedProjectedLoraLinear.from_linears": (
            modules.FusedProjectedLoraLinear.from_linears,
            {"linears": [nn.Linear(D, D_OUT), nn.Linear(D, D_OUT)], "rank": R, "basis": t.basis},
            {
                "linears": [None, "x", 3, [], [None], nn.Linear(D, D), [nn.Linear(D, D), nn.Linear(D + 1, D)]],
                "rank": [*NO_INTEGER, 0],
                "basis": [None, *NO_TENSOR, *SHAPES],
                "init": ["x", 3, [], [(layer["lora_A"],)] * 2],
                "dtype": [None, "float32", torch.int32],
            },
        ),
        "nn.CovarianceAccumulator": (
            modules.CovarianceAccumulator,
            {"features": D},
            {"features": [*NO_INTEGER, -1], "dtype": [None, *NO_DTYPE]},
        ),
        "nn.CovarianceAccumulator.update": (
            accumulator.update,
            {"x": torch.randn(4, D)},
            {"x": [None, *NO_TENSOR, *SHAPES], "mask": [*NO_TENSOR, torch.randn(4), torch.ones(3).bool()]},
        ),
        "nn.CovarianceAccumulator.attach": (accumulator.attach, None, {"module": NO_MODULE}),
        "nn.CovarianceAccumulator.masked": (masked, None, {"mask": ["x", 3, torch.randn(4), torch.ones(3).bool()]}),
    }


# Where a message calls what is wrong by a word that says more: of one batch, one layer, or the folder and file itself.
WORDS = {
    "batches": ["batch"],
    "heldout": ["batch"],
    "prompts": ["prompt"],
    "lookalikes": ["lookalike"],
    "path": ["/"],
    "bases": ["basis"],
    "grads": ["grad"],
    "steps": ["step"],
    "exp_avgs": ["exp_avg"],
    "exp_avg_sqs": ["exp_avg"],
    "params": ["param", "the optimizer does not hold", "optimizer got"],
    "complements": ["complement"],
    "linears": ["linear"],
    "optimizer": ["step mode", "optimizer"],
    "model": ["model", "LlamaForCausalLM"],
    "weight": ["lora_B"],
    "name": ["layer"],
}


def told(value):
    """Any of these in a message shows the value."""
    yield from (repr(value)[:40], str(value), type(value).__name__, getattr(value, "__name__", "?"))
    if isinstance(value, torch.Tensor):
        yield from (str(tuple(value.shape)), str(value.dtype), f"on {value.device}")
        yield from ("a scalar", "a tensor", "14 of 14 guarded layers") if value.dim() < 2 else ()
        if value.dim() == 2 and value.numel():
            yield from (f"token {value[0, 0]}", *(f"has {value.shape[1] + answer} tokens" for answer in (0, 2)))
    if isinstance(value, nn.Module):
        yield from ("already carries adapters", "of one d_in, dtype and device, got")
    if isinstance(value, torch.optim.Optimizer):
        yield "the optimizer does not hold the lora_A of 14"
    if isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(told, value))
    if hasattr(value, "__next__") or value == []:
        yield from ("empty", "no inputs", "at least one", "matches no", "0")
    if isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(told, value.values()))
        yield from ("attention_mask", "has []")


NAMES = [
    "collect_statistics", "plan_guard", "attach_guard", "certify", "DriftMonitor", "DriftMonitor.__call__",
    "export_lora", "GuardConfig", "GuardConfig(rule='rank')", "GuardPlan.load", "GuardPlan.save", "GuardPlan.space_of",
    "CalibrationStatistics.load", "CalibrationStatistics.save", "CalibrationStatistics.merge",
    "CalibrationStatistics.for_layer", "DriftReport.save", "ExportReport.save", "GuardedAdamW", "guard_optimizer",
    "read_prompts", "prompt_batches", "inspect_statistics", "use_backend", "ops.covariance_update_",
    "ops.squared_drift", "ops.symmetrize_", "ops.null_project_", "ops.null_project_ of a list", "ops.projected_lora",
    "ops.projected_lora with dropout", "ops.projected_adamw_", "nn.NullSpaceProjector", "nn.NullSpaceProjector.forward",
    "nn.NullSpaceProjector.project_", "nn.ProjectedLoraLinear", "nn.ProjectedLoraLinear.from_linear",
    "nn.FusedProjectedLoraLinear.from_linears", "nn.CovarianceAccumulator", "nn.CovarianceAccumulator.update",
    "nn.CovarianceAccumulator.attach", "nn.CovarianceAccumulator.masked",
    "evaluate_refusals", "EvaluationCallback", "RefusalEvaluator", "RefusalEvaluator.set_base",
    "RefusalEvaluator.__call__", "EvaluationReport.save", "EvaluationReport.load", "EvaluationReport.compare",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_by_name(name, things):
    rows = table(things)
    assert set(rows) == set(NAMES)
    call, good, wrong = rows[name]
    faults = []
    for argument, values in wrong.items():
        for value in values:
            try:
                call(**{**(good or {}), argument: value})
            except Exception as error:
                message = str(error)
                schema = "Expected a value of type" in message and argument in message
                named = any(word in message for word in (argument, *WORDS.get(argument, [])))
                shows = any(part in message for part in told(value))
                if not ((_refused(error) or schema) and named and shows):
                    faults.append(f"{argument}={str(value)[:60]!r}: {type(error).__name__}: {message[:200]}")
            else:
                faults.append(f"{argument}={str(value)[:60]!r} is accepted")
    assert not faults, "\n".join(faults)


def test_the_table_covers_every_public_name():
    """Classes that are results, and modules, apart."""
    results = {
        "DriftExceededError", "DriftReport", "EvaluationReport", "ExportReport", "GuardPlan", "CalibrationStatistics",
    }  # fmt: skip
    others = {"dispatch", "nn", "ops", "GuardCallback", "judge_opening"}
    listed = {name.split("(")[0] for name in NAMES}
    assert set(gk.__all__) - results - others <= listed
    for module, prefix in ((gk.ops, "ops"), (gk.nn, "nn")):
        for name in module.__all__:
            assert any(one.startswith(f"{prefix}.{name}") for one in listed), name


def test_numbers_of_numpy_are_taken_as_what_they_are(things, tmp_path):
    """A plan made with them is read back as the same plan."""
    config = gk.GuardConfig(rank=np.int64(3), protect=np.float64(0.9), alpha=np.float32(6.0), projector=np.bool_(True))
    assert repr(config) == repr(gk.GuardConfig(rank=3, protect=0.9, alpha=6.0))
    plan = gk.plan_guard(things.model, things.stats, config, progress=False, allow_few_prompts=True)
    plan.save(tmp_path / "plan")
    assert gk.GuardPlan.load(tmp_path / "plan").fingerprint == plan.fingerprint
