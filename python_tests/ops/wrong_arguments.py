"""Every registered op with every argument wrong in turn, on one backend: outcomes as lines of JSON.

A process of its own, since a kernel that gets a wrong pointer may end it: ``python wrong_arguments.py BACKEND``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import guardspace_kernels as gk

OPS = torch.ops.guardspace
ACCEPTED = "accepted"


def basis(d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, 3)).Q


def pair(*last: int) -> list[torch.Tensor]:
    """Tensors for two matrices of the given widths."""
    return [torch.rand(2 + i, d) for i, d in enumerate(last)]


def lora() -> dict[str, Any]:
    return {
        "x": torch.randn(5, 3, 8), "weight": torch.randn(6, 8), "lora_A": torch.randn(2, 8),
        "lora_B": torch.randn(6, 2), "basis": basis(8), "complement": True, "scale": 1.5, "bias": torch.randn(6),
        "frozen_A": torch.randn(2, 8), "frozen_B": torch.randn(6, 2), "dropout": 0.5, "seed": torch.tensor(3),
        "output_sizes": None,
    }  # fmt: skip


def lora_backward() -> dict[str, Any]:
    call = lora()
    y, h, A_P = OPS.projected_lora_forward(*call.values())
    x, _ = call.pop("x"), call.pop("bias")
    grads = {"dy": torch.randn(y.shape), "x": x, "h": h, "A_P": A_P}
    return {**grads, **call, "needs": [True, True, True], "backend": None}


def adamw() -> dict[str, Any]:
    lists = {name: pair(8, 6) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    return {
        **lists, "steps": [torch.ones(()), torch.ones(())], "bases": [basis(8), basis(6)], "complements": [True, False],
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
    }  # fmt: skip


#: Op -> arguments that it accepts, in the order of its schema.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "projected_lora": lora,
    "projected_lora_forward": lora,
    "projected_lora_backward": lora_backward,
    "null_project_": lambda: {"g": torch.randn(3, 8), "basis": basis(8), "complement": True},
    "null_project_list_": lambda: {"g": pair(8, 6), "basis": [basis(8), basis(6)], "complement": [True, False]},
    "projected_adamw_": adamw,
    "covariance_update_": lambda: {
        "covariance": torch.zeros(8, 8), "x": torch.randn(5, 3, 8), "mask": torch.ones(5, 3).bool(), "scale": 1.0
    },
    "covariance_update_list_": lambda: {
        "covariance": [torch.zeros(8, 8), torch.zeros(6, 6)], "x": [torch.randn(5, 3, 8), torch.randn(4, 6)],
        "mask": [torch.ones(5, 3).long(), None], "scale": 1.0,
    },
    "symmetrize_": lambda: {"covariance": torch.randn(8, 8)},
    "squared_drift": lambda: {"covariance": torch.randn(8, 8), "F": torch.randn(6, 2), "G": torch.randn(2, 8)},
}  # fmt: skip

TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "longer": lambda t: torch.cat([t, t[:1]]) if t.dim() else torch.stack([t, t]),
    "shorter": lambda t: t[:-1] if t.dim() else t[None][:0],
    "wider": lambda t: torch.cat([t, t[..., :1]], -1) if t.dim() else t[None, None],
    "narrower": lambda t: t[..., :-1] if t.dim() else t.new_zeros(0),
    "one more dimension": lambda t: t[None],
    "one vector": lambda t: t.flatten() if t.dim() != 1 else t[0],
    "one number": lambda t: t.flatten()[0] if t.dim() else t[None],
    "without entries": lambda t: t.new_zeros(0),
    "transposed": lambda t: t.mT if t.dim() > 1 else t[None],
    "int32": lambda t: t.int(),
    "complex64": lambda t: t + 0j,
    "float16": lambda t: t.half(),
    "float64": lambda t: t.double(),
    "bool": lambda t: t.bool(),
    "on meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "None": lambda t: None,
    "in a list": lambda t: [t],
    "a float": lambda t: 1.0,
    "a string": lambda t: "x",
}


def wrongs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield from ((name, change(value)) for name, change in TENSORS.items())
    elif isinstance(value, list):
        yield "one too many", [*value, value[0]]
        yield "one too few", value[:-1]
        yield "none", []
        yield "one value", value[0]
        if isinstance(value[0], torch.Tensor):
            yield from ((f"first {name}", [change(value[0]), *value[1:]]) for name, change in TENSORS.items())
    elif value is not None:
        yield "a tensor", torch.ones(3)
        yield "a string", "x"


def outcome(op: str, arguments: dict[str, Any]) -> str:
    try:
        getattr(OPS, op)(*arguments.values())
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return ACCEPTED


def fake(op: str, arguments: dict[str, Any]) -> str:
    """The outcome of the fake kernel."""
    with FakeTensorMode() as mode:

        def of(value: Any) -> Any:
            if isinstance(value, list):
                return [of(one) for one in value]
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        return outcome(op, {name: of(value) for name, value in arguments.items()})


def main(backend: str) -> None:
    logging.disable()  # of fake kernels that raise
    torch.manual_seed(0)
    with gk.use_backend(backend):
        for op, good in GOOD.items():
            print(json.dumps([op, "", "", outcome(op, good()), fake(op, good())]), flush=True)
            for argument, value in good().items():
                for change, wrong in wrongs(value):
                    print(json.dumps([op, argument, change]), flush=True)
                    arguments = {**good(), argument: wrong}
                    results = [fake(op, arguments), outcome(op, arguments)]
                    print(json.dumps([op, argument, change, *reversed(results)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
