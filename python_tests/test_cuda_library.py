"""The CUDA kernels as a library: whether it answers without a driver, and what it says of wrong arguments."""

from __future__ import annotations

import cuda_on_cpu
import pytest
import torch
from backends import automatic, cuda_kernels  # noqa: F401

from guardspace_kernels import dispatch
from guardspace_kernels.ops import _cuda, covariance_update_


def test_triton_is_preferred():
    assert dispatch.BACKENDS.index("triton") < dispatch.BACKENDS.index("cuda") < dispatch.BACKENDS.index("cpu")


@pytest.mark.skipif(_cuda.library is None, reason="the CUDA kernels are not built")
def test_without_a_driver_the_backend_says_so(monkeypatch):
    if not (reason := _cuda.no_driver()):
        pytest.skip("there is a CUDA driver")
    assert "driver" in reason
    for op, count in (("covariance", 2), ("null_projection", 2), ("projected_lora", 5)):
        ok, why = dispatch.can_use(op, *[torch.zeros(2, 2)] * count, backend="cuda")
        assert (ok, why) == (False, f"no CUDA driver: {reason}")
    monkeypatch.setenv("GUARDSPACE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was requested but cannot run covariance: no CUDA driver: CUDA "):
        covariance_update_(torch.zeros(2, 2), torch.zeros(3, 2))


@pytest.mark.skipif(_cuda.library is not None, reason="the CUDA kernels are built")
def test_without_the_library_the_backend_says_so():
    ok, why = dispatch.can_use("covariance", torch.zeros(2, 2), torch.zeros(3, 2), backend="cuda")
    assert not ok and "not built" in why and "guardspace env" in why


needs_shim = pytest.mark.skipif(bool(cuda_on_cpu.why_not()), reason=cuda_on_cpu.why_not() or "there is a compiler")


@pytest.fixture(scope="module")
def loaded():
    return cuda_on_cpu.kernels()


def update(loaded, workspace_bytes=0, **change):
    """The text of the error of a call that is right but for ``change``."""
    C, x = torch.zeros(4, 4), torch.zeros(3, 4)
    fields = {
        "covariance": C.data_ptr(), "x": x.data_ptr(), "mask": 0, "tokens": 3, "width": 4, "stride_covariance": 4,
        "stride_x": 4, "dtype": 1,
    }  # fmt: skip
    items = _cuda.packed([tuple({**fields, **change}.values())])
    error = loaded.guardspace_cuda_covariance_update(items, 1, 1.0, None, workspace_bytes, None)
    text = loaded.guardspace_cuda_error_text(error).decode() if error else ""
    if change:
        assert (loaded.guardspace_cuda_covariance_workspace(items, 1) == -1) == ("workspace" not in text and error < 0)
    return text


@needs_shim
@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(
    "change, text",
    [
        ({}, ""),
        ({"dtype": 0}, "items[0]: dtype is 0; 1 (float32), 2 (float16) or 3 (bfloat16) was expected"),
        ({"x": 0}, "items[0]: x is at (nil); it must be a multiple of its entries' 4 bytes, and not NULL"),
        ({"covariance": 6}, "items[0]: covariance is at 0x6; it must be a multiple of its entries' 4 bytes"),
        ({"tokens": -1}, "items[0]: x is (-1, 4); sizes must be from 0 to 2000000000"),
        ({"width": 2**31}, "items[0]: x is (3, 2147483648); sizes must be from 0 to 2000000000"),
        ({"stride_x": -4}, "items[0]: x is (3, 4) with a row stride of -4; from 0 to 2000000000 was expected"),
        ({"stride_covariance": 3}, "items[0]: covariance is (4, 4) with a row stride of 3; from 4 to 2000000000 was"),
        ({"tokens": 4000}, "workspace has 0 bytes at (nil), 192 were expected"),
    ],
)
def test_wrong_covariance_updates_are_named(loaded, change, text):
    got = update(loaded, **change)
    assert got.startswith("covariance_update: " + text) if text else got == ""


BUFFER = torch.zeros(4096)
AT = BUFFER.data_ptr()
#: Calls that are right, by their fields in the order of guardspace_cuda.h: matrices of 4 × 8 at most.
CALLS = {
    "null_project": {
        "out": AT, "g": AT, "basis": AT + 4096, "rows": 4, "width": 8, "rank": 3, "stride_out": 8, "stride_g": 8,
        "stride_basis": 3, "out_dtype": 1, "dtype": 1, "complement": 1,
    },
    "projected_adamw": {
        "param": AT, "grad": AT + 256, "exp_avg": AT + 512, "exp_avg_sq": AT + 768, "step": AT + 1024,
        "basis": AT + 4096, "rows": 4, "width": 8, "rank": 3, "stride_param": 8, "stride_grad": 8, "stride_exp_avg": 8,
        "stride_exp_avg_sq": 8, "stride_basis": 3, "dtype": 1, "complement": 1,
    },
    "lora_linear": {
        "y": AT, "x": AT + 1024, "weight": AT + 2048, "bias": 0, "h": AT + 3072, "up": AT + 4096, "seed": 0,
        "tokens": 4, "inputs": 8, "outputs": 6, "rank": 2, "dropped": 0, "stride_y": 6, "stride_x": 8,
        "stride_weight": 8, "stride_h": 2, "stride_up": 6, "weight_columns": 0, "add": 0, "threshold": 0, "dtype": 1,
    },
    "lora_down": {
        "h": AT, "outer": AT + 1024, "x": AT + 2048, "down": AT + 3072, "e": AT + 4096, "seed": 0, "tokens": 4,
        "width": 8, "rank": 2, "outer_rank": 2, "stride_x": 8, "stride_down": 8, "stride_e": 2, "threshold": 0,
        "dtype": 3,
    },
    "lora_outer": {
        "outer": AT, "e": AT + 1024, "x": AT + 2048, "seed": 0, "tokens": 4, "width": 8, "rank": 2, "stride_e": 2,
        "stride_x": 8, "threshold": 0, "dtype": 1,
    },
}  # fmt: skip
SETTINGS = {"null_project": (), "projected_adamw": (1e-3, 0.9, 0.999, 1e-8, 0.0)}
NOTHING = {"null_project": "rows", "projected_adamw": "width", "lora_linear": "tokens", "lora_down": "width"}


def called(loaded, name, **change):
    """The text of the error of a call that is right but for ``change``."""
    items = _cuda.packed([tuple({**CALLS[name], **change}.values())])
    count = (1,) if name in SETTINGS else ()
    arguments = [items, *count, *SETTINGS.get(name, (1.0,))]
    if name != "lora_linear":
        bytes_ = getattr(loaded, f"guardspace_cuda_{name}_workspace")(items, *count)
        workspace = torch.empty(max(bytes_, 0) // 4)
        arguments += [workspace.data_ptr(), workspace.nbytes]
    error = getattr(loaded, f"guardspace_cuda_{name}")(*arguments, None)
    assert name == "lora_linear" or (bytes_ == -1) == (error != 0)
    return loaded.guardspace_cuda_error_text(error).decode() if error else ""


@needs_shim
@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("name", CALLS)
def test_wrong_dtypes_addresses_sizes_and_strides_are_named(loaded, name):
    assert called(loaded, name) == "" and called(loaded, name, **{NOTHING.get(name, "rank"): 0}) == ""
    prefix = f"{name}: items[0]: "
    assert called(loaded, name, dtype=4) == prefix + "dtype is 4; 1 (float32), 2 (float16) or 3 (bfloat16) was expected"
    for field in [field for field, value in CALLS[name].items() if field.startswith("stride")]:
        text = called(loaded, name, **{field: -1})
        assert text.startswith(prefix + field.removeprefix("stride_")) and "row stride of -1; from " in text
    addresses = [field for field, value in CALLS[name].items() if value >= AT]
    for field in addresses:
        assert called(loaded, name, **{field: 0}).startswith(f"{prefix}{field} is at (nil); it must be a multiple of ")
        assert called(loaded, name, **{field: AT + 1}).startswith(f"{prefix}{field} is at 0x")
    for field in {"rows", "width", "rank", "tokens", "inputs", "outputs"} & CALLS[name].keys():
        for size in (-1, 2**31):
            assert f"{size}" in called(loaded, name, **{field: size})


@needs_shim
@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(
    "name, change, text",
    [
        ("null_project", {"out_dtype": 0}, "items[0]: dtype is 0"),
        ("lora_linear", {"dropped": 3}, "dropped is 3; from 0 to rank = 2 was expected"),
        (
            "lora_linear",
            {"weight_columns": 1, "stride_weight": -1},
            "items[0]: weight is (8, 6) with a row stride of -1",
        ),
        ("lora_linear", {"threshold": 2**31}, "threshold is 2147483648; from 0 to 2147483647 was expected"),
        ("lora_outer", {"threshold": 5}, "seed is at (nil); it must be a multiple of 8 bytes, and not NULL"),
        ("lora_down", {"threshold": 5, "seed": AT}, "threshold must be 0 where e is given"),
        ("lora_down", {"dtype": 1}, "e has 2 columns; at most rank = 2, and none in float32, were expected"),
        ("lora_down", {"outer_rank": 3}, "e has 3 columns; at most rank = 2"),
    ],
)
def test_what_else_can_be_wrong_is_named(loaded, name, change, text):
    assert called(loaded, name, **change).startswith(f"{name}: {text}")


@needs_shim
@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("name", [name for name in CALLS if name != "lora_linear"])
def test_too_little_workspace_is_named(loaded, name):
    fields = {**CALLS[name], "width": 600, "rank": 2, "tokens": 1600, "dtype": 1, "outer_rank": 0}
    fields = {field: 600 if field.startswith("stride") else fields[field] for field in CALLS[name]}
    items, count = _cuda.packed([tuple(fields.values())]), ((1,) if name in SETTINGS else ())
    needed = getattr(loaded, f"guardspace_cuda_{name}_workspace")(items, *count)
    assert needed > 0
    for size, address in ((needed - 1, AT), (needed, None)):
        error = getattr(loaded, f"guardspace_cuda_{name}")(
            items, *count, *SETTINGS.get(name, (1.0,)), address, size, None
        )
        text = loaded.guardspace_cuda_error_text(error).decode()
        assert error == -1 and text.startswith(f"{name}: workspace has {size} bytes at ")
        assert text.endswith(f", {needed} were expected")


@needs_shim
@pytest.mark.cuda_on_cpu
def test_a_call_that_fails_is_an_error_in_python(monkeypatch, loaded):
    monkeypatch.setattr(_cuda, "library", loaded)
    with pytest.raises(RuntimeError, match=r"guardspace_cuda_symmetrize: error -1: .*covariance is \(-3, -3\)"):
        _cuda.call("symmetrize", torch.device("cpu"), 0, -3, 4)
    with pytest.raises(RuntimeError, match=r"guardspace_cuda_covariance_workspace: .*dtype is 7"):
        _cuda.workspace("covariance_workspace", torch.device("cpu"), _cuda.packed([(0, 0, None, 1, 1, 1, 1, 7)]), 1)


@needs_shim
@pytest.mark.cuda_on_cpu
def test_nothing_to_do_is_no_error(loaded):
    assert update(loaded, tokens=0, x=0) == "" and update(loaded, width=0, x=0, covariance=0) == ""
    assert loaded.guardspace_cuda_covariance_update(b"", 0, 1.0, None, 0, None) == 0
    assert loaded.guardspace_cuda_symmetrize(None, 0, 0, None) == 0


def test_every_declared_function_is_known_to_python():
    header = (cuda_on_cpu.SOURCES / "guardspace_cuda.h").read_text(encoding="utf-8")
    declared = {word.split("(")[0] for word in header.split("guardspace_cuda_")[1:] if "(" in word.split()[0]}
    assert declared == set(_cuda._FUNCTIONS)
