"""Covariance accumulation by the C++ kernels: half the products, no float32 copy of X, all pairs in one call."""

from __future__ import annotations

from typing import Any

import torch

from guardspace_kernels.ops._cpu import accepts_written, extension, register, view
from guardspace_kernels.ops._library import rows, written
from guardspace_kernels.ops.covariance.reference import Update


def covariance_update_(updates: list[Update]) -> None:
    covariances = [covariance.data_ptr() for covariance, *_ in updates]
    if len(set(covariances)) < len(covariances):  # one accumulator twice: one after the other
        for update in updates:
            covariance_update_([update])
        return
    items, alive = [], []
    for covariance, x, mask, scale in updates:
        x = rows(x)
        flat = None if mask is None else mask.reshape(-1)
        if flat is not None:
            flat = (flat if flat.dtype == torch.bool else flat != 0).contiguous()
        items.append((view(covariance), view(x), 0 if flat is None else flat.data_ptr(), scale))
        alive += [x, flat]
    extension.covariance_update(items, torch.get_num_threads())
    written(*(covariance for covariance, *_ in updates))


def covariance_update_direct(covariance: Any, x: Any, mask: Any, scale: Any) -> bool:
    """One call into C++ for a covariance or all of a list, whose tensors it reads and checks."""
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    if not extension.covariance_update_tensors(covariance, x, mask, scale, grad, threads):
        return False
    written(*((covariance,) if isinstance(covariance, torch.Tensor) else covariance))
    return True


def symmetrize_(covariance: torch.Tensor) -> None:
    extension.symmetrize(view(covariance), torch.get_num_threads())
    written(covariance)


def squared_drift(covariance: torch.Tensor, F: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
    G = G.double()
    weighted = (F.T.double() @ F.double()) @ G
    energy = extension.quadratic_form(view(covariance), view(G), view(weighted), torch.get_num_threads())
    return torch.tensor(energy, dtype=torch.float64, device="cpu")


register(
    "covariance",
    accepts_written,
    covariance_update_=covariance_update_,
    covariance_update_direct=covariance_update_direct,
    symmetrize_=symmetrize_,
    squared_drift=squared_drift,
)
