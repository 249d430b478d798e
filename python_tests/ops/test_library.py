"""What all ops share: settings of the process that threads change at the same time."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import automatic
from oracle import orthonormal

import guardspace_kernels as gk
from guardspace_kernels.ops import covariance_update_, null_project_
from guardspace_kernels.ops._library import full_float32_products

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def precisions():
    return [backend.fp32_precision for backend in BACKENDS]


@automatic
@pytest.mark.parametrize("setting", ["highest", "medium", "bf16 for one backend"])
@pytest.mark.parametrize("first_out", [0, 1])
def test_no_thread_lets_reduced_products_in_while_another_is_inside(setting, first_out, matmul_precision):
    matmul_precision(setting)
    before = precisions()
    pools, stacks = [ThreadPoolExecutor(1) for _ in range(2)], [contextlib.ExitStack() for _ in range(2)]
    for pool, stack in zip(pools, stacks, strict=True):
        pool.submit(stack.enter_context, full_float32_products()).result()
        assert {"bf16", "tf32"}.isdisjoint(precisions())
    pools[first_out].submit(stacks[first_out].close).result()
    assert {"bf16", "tf32"}.isdisjoint(precisions())
    pools[1 - first_out].submit(stacks[1 - first_out].close).result()
    assert precisions() == before


@automatic
def test_reduced_products_allowed_meanwhile_are_not_let_in_by_the_next(matmul_precision):
    before = precisions()
    with full_float32_products():
        matmul_precision("medium")
        allowed = precisions()
        with full_float32_products():
            assert {"bf16", "tf32"}.isdisjoint(precisions())
    assert precisions() == allowed != before


@automatic
def test_many_threads_leave_the_setting_as_it_was(matmul_precision):
    matmul_precision("medium")
    before, wrong, together = precisions(), [], threading.Barrier(8)

    def work():
        together.wait()
        for _ in range(200):
            with full_float32_products():
                if not {"bf16", "tf32"}.isdisjoint(precisions()):
                    wrong.append(precisions())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and precisions() == before


@automatic
def test_an_error_inside_restores_the_setting(matmul_precision):
    matmul_precision("medium")
    before = precisions()
    with pytest.raises(KeyError), full_float32_products():
        raise KeyError
    assert precisions() == before


def test_a_default_device_is_not_where_tensors_on_another_compute():
    Q, x = orthonormal(12, 5, torch.float32), torch.randn(7, 12)
    G, C = x @ Q @ Q.T, torch.zeros(12, 12)
    plain = gk.nn.ProjectedLoraLinear(torch.randn(4, 12), None, torch.randn(2, 12), torch.randn(4, 2), Q, dropout=0.5)
    with torch.device("meta"):
        projector = gk.nn.NullSpaceProjector(Q)  # checks that Q is orthonormal
        null_project_(G, Q)
        covariance_update_(C, x)
        y = plain(x.requires_grad_())
        y.sum().backward()
    assert G.abs().max() < 1e-5 and projector.basis.device.type == y.device.type == x.grad.device.type == "cpu"
    torch.testing.assert_close(C.tril(), (x.T @ x).detach().tril())
