"""Every launch configuration of the Triton kernels: launches take their rows from here, checks compile the same rows.

Nothing here imports Triton. A kernel is named ``<op>.<function>`` and stands in ``ops/<op>/<module>.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The chips that rows are compiled for, by Triton's names without the underscore.
NVIDIA = ("sm80", "sm89", "sm90", "sm100", "sm120")
AMD = ("gfx942",)

#: How many items one launch serves at most (``_triton_launch.table``).
GROUP = 256


@dataclass(frozen=True)
class Kernel:
    """What a kernel is called with.

    Attributes:
        arguments: name -> type as in Triton's signatures, in the kernel's order. "*x" and "*y" are pointers to the
            dtypes that a call has: "bf16 fp32" for x and y.
        dtypes: those that occur.
        aligned: the arguments that are multiples of 16 where tensors are laid out well. Triton reads that off the
            arguments of a launch; compiled ahead of time it must be told.
        variants: constants that a call decides, not a row: every combination that occurs.
        descriptors: from those constants and the row's, the tiles of the arguments that are TMA descriptors of the
            dtype that "*x" stands for.
        module: in the op's folder.
    """

    arguments: dict[str, str]
    dtypes: tuple[str, ...]
    aligned: tuple[str, ...]
    variants: tuple[dict[str, Any], ...] = ({},)
    descriptors: Callable[[dict[str, Any]], dict[str, tuple[int, int]]] = lambda constants: {}
    module: str = "triton_kernels"


@dataclass(frozen=True)
class Row:
    """One way to launch a kernel.

    Attributes:
        targets: the chips it runs on. constants: tile sizes and the like. warps, stages: as in Triton.
        least: sizes, in an order that is the kernel's own, from which this row is the first choice; the rows of a
            kernel stand in order of preference, the last one for everything.
    """

    kernel: str
    targets: tuple[str, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    least: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Its name among the rows of its kernel, in files that remember choices."""
        sizes = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{sizes} warps={self.warps} stages={self.stages}"


_GROUPED: tuple[dict[str, Any], ...] = (
    {"GROUPED": False, "ALIGNED": False},  # one item: Triton sees its alignment by itself
    {"GROUPED": True, "ALIGNED": True},
    {"GROUPED": True, "ALIGNED": False},
)

_TILES = {
    "X": "*x", "C": "*fp32", "MASK": "*i32", "T": "i32", "d": "i32", "stride_x": "i64", "stride_c": "i64",
    "masked": "i32", "slices": "i32", "parts": "i64", "TABLE": "*i64", "n": "i32", "scale": "fp32", "PARTS": "*fp32",
}  # fmt: skip
# Operands that are not laid out well are copied: every launch is an aligned one.
_TILES_ALIGNED = ("X", "C", "d", "stride_x", "stride_c", "parts", "TABLE", "PARTS")

_LINEAR: dict[str, Any] = {
    "arguments": {
        "X": "*x", "W": "*x", "BIAS": "*x", "H": "*x", "UP": "*x", "Y": "*x", "SEED": "*i64", "T": "i32", "N": "i32",
        "K": "i32", "R": "i32", "dropped": "i32", "stride_x": "i64", "stride_w": "i64", "stride_h": "i64",
        "stride_up": "i64", "stride_y": "i64", "biased": "i32", "add": "i32", "threshold": "i32", "factor": "fp32",
    },
    "aligned": (
        "X", "W", "BIAS", "H", "UP", "Y", "N", "K", "R", "stride_x", "stride_w", "stride_h", "stride_up", "stride_y",
    ),
    "variants": ({"ROWS": True}, {"ROWS": False}),
}  # fmt: skip
_DOWN: dict[str, Any] = {
    "arguments": {
        "X": "*x", "DOWN": "*x", "E": "*x", "H": "*fp32", "OUT": "*fp32", "SEED": "*i64", "T": "i32", "d": "i32",
        "R": "i32", "r": "i32", "slices": "i32", "stride_x": "i64", "stride_down": "i64", "stride_e": "i64",
        "threshold": "i32", "factor": "fp32",
    },
    "aligned": ("X", "DOWN", "E", "H", "OUT", "d", "R", "r", "stride_x", "stride_down", "stride_e"),
    "variants": ({"OUTER": False}, {"OUTER": True}),
}  # fmt: skip
_OUTER: dict[str, Any] = {
    "arguments": {
        "E": "*x", "X": "*x", "OUT": "*fp32", "SEED": "*i64", "T": "i32", "d": "i32", "r": "i32", "slices": "i32",
        "stride_e": "i64", "stride_x": "i64", "threshold": "i32", "factor": "fp32",
    },
    "aligned": ("E", "X", "OUT", "d", "r", "stride_e", "stride_x"),
    "variants": ({"DROPOUT": False}, {"DROPOUT": True}),
}  # fmt: skip


def _linear_tma_tiles(c: dict[str, Any]) -> dict[str, tuple[int, int]]:
    t, n, k, r = (c[f"BLOCK_{name}"] for name in "TNKR")
    right = {"W": (n, k), "UP": (n, r)} if c["ROWS"] else {"W": (k, n), "UP": (r, n)}
    return {"X": (t, k), "H": (t, r), "Y": (t, n), **right}


KERNELS = {
    "null_projection.onto_basis": Kernel(
        arguments={
            "G": "*x", "BASIS": "*fp32", "r": "i32", "d": "i32", "k": "i32", "stride_g": "i64", "stride_b": "i64",
            "h": "i64", "TABLE": "*i64", "n": "i32", "H": "*fp32", "slices": "i32", "stride_h": "i64",
        },
        dtypes=("fp32", "fp16", "bf16"),
        aligned=("G", "d", "stride_g", "h", "TABLE", "H", "stride_h"),  # not k: the statistics decide it
        variants=_GROUPED,
    ),
    "null_projection.from_basis": Kernel(
        arguments={
            "G": "*x", "OUT": "*y", "BASIS": "*fp32", "r": "i32", "d": "i32", "k": "i32", "stride_g": "i64",
            "stride_out": "i64", "stride_b": "i64", "complement": "i32", "h": "i64", "TABLE": "*i64", "n": "i32",
            "H": "*fp32",
        },
        dtypes=("fp32 fp32", "fp16 fp16", "bf16 bf16", "fp32 fp16", "fp32 bf16"),
        aligned=("G", "OUT", "d", "stride_g", "stride_out", "h", "TABLE", "H"),
        variants=_GROUPED,
    ),
    "null_projection.adamw_from_basis": Kernel(
        arguments={
            "G": "*x", "A": "*x", "M": "*x", "V": "*x", "STEP": "*fp32", "BASIS": "*fp32", "r": "i32", "d": "i32",
            "k": "i32", "stride_g": "i64", "stride_a": "i64", "stride_m": "i64", "stride_v": "i64", "stride_b": "i64",
            "complement": "i32", "h": "i64", "TABLE": "*i64", "n": "i32", "H": "*fp32", "lr": "fp32", "decay": "fp32",
            "eps": "fp32", "rest1": "fp32", "rest2": "fp32", "log_beta1": "fp32", "log_beta2": "fp32",
        },
        dtypes=("fp32", "fp16", "bf16"),
        aligned=("G", "A", "M", "V", "d", "stride_g", "stride_a", "stride_m", "stride_v", "h", "TABLE", "H"),
        variants=_GROUPED,
    ),
    "covariance.add_tiles": Kernel(_TILES, ("fp16", "bf16"), _TILES_ALIGNED, _GROUPED[:2]),
    "covariance.add_tiles_float32": Kernel(_TILES, ("fp32",), _TILES_ALIGNED, _GROUPED[:2]),
    "covariance.add_parts": Kernel(
        arguments={
            "C": "*fp32", "d": "i32", "stride_c": "i64", "slices": "i32", "parts": "i64", "TABLE": "*i64", "n": "i32",
            "scale": "fp32", "PARTS": "*fp32",
        },
        dtypes=("fp32",),
        aligned=("C", "d", "stride_c", "parts", "TABLE", "PARTS"),
        variants=_GROUPED[:2],
    ),
    "covariance.mirror": Kernel({"C": "*fp32", "d": "i32", "stride_c": "i64"}, ("fp32",), aligned=()),
    "projected_lora.linear": Kernel(dtypes=("fp16", "bf16"), **_LINEAR),
    "projected_lora.linear_float32": Kernel(dtypes=("fp32",), **_LINEAR),
    "projected_lora.linear_tma": Kernel(
        arguments={
            "X": "*x", "W": "*x", "BIAS": "*x", "H": "*x", "UP": "*x", "Y": "*x", "T": "i32", "N": "i32", "K": "i32",
            "R": "i32", "programs": "i32", "biased": "i32",
        },
        dtypes=("fp16", "bf16"),
        aligned=("BIAS", "N", "K"),
        variants=({"ROWS": True}, {"ROWS": False}),
        descriptors=_linear_tma_tiles,
        module="triton_tma",
    ),
    "projected_lora.down": Kernel(dtypes=("fp16", "bf16"), **_DOWN),
    "projected_lora.down_float32": Kernel(dtypes=("fp32",), **{**_DOWN, "variants": ({"OUTER": False},)}),
    "projected_lora.outer": Kernel(dtypes=("fp16", "bf16"), **_OUTER),
    "projected_lora.outer_float32": Kernel(dtypes=("fp32",), **_OUTER),
}  # fmt: skip

# Products of float32 with the accuracy of float32: three of TF32 on NVIDIA's tensor cores; AMD's have float32 ones.
_EXACT = {NVIDIA: "tf32x3", AMD: "ieee"}


def _projection_rows(kernel: str) -> list[Row]:
    # Reading the basis is what takes time, once for each BLOCK_R rows. Larger tiles spill where k, and so the basis,
    # is not aligned, the high ones on sm120 in any case.
    rows = []
    if kernel != "null_projection.adamw_from_basis":
        high = {"BLOCK_R": 64, "BLOCK_K": 32, "BLOCK_D": 32, "PRECISION": _EXACT[NVIDIA]}
        rows.append(Row(kernel, ("sm80", "sm89", "sm90", "sm100"), high, warps=8, stages=3, least=(33,)))
    for targets, precision in _EXACT.items():
        block_d = 64 if kernel == "null_projection.from_basis" else 32
        stages = 2 if kernel == "null_projection.adamw_from_basis" else 3
        low = {"BLOCK_R": 16, "BLOCK_K": 32, "BLOCK_D": block_d, "PRECISION": precision}
        rows.append(Row(kernel, targets, low, 4, stages))
    return rows


def _covariance_rows() -> list[Row]:
    def row(kernel: str, targets: tuple[str, ...], block: int, block_t: int, warps: int) -> Row:
        precision = _EXACT[AMD if targets == AMD else NVIDIA]
        # On NVIDIA two tiles are on their way while one is multiplied, and the mask of the two after those.
        constants, stages = {"BLOCK": block, "BLOCK_T": block_t, "PRECISION": precision}, 2 if targets == AMD else 5
        least = (133,) if block == 128 else ()  # from a tile for each multiprocessor of an H100 on
        return Row(f"covariance.{kernel}", targets, constants, warps, stages, least)

    return [
        # Tiles of 128 spill on AMD; in float32 they do on chips whose tensor cores read registers only.
        row("add_tiles", NVIDIA, 128, 64, warps=8),
        *(row("add_tiles", targets, 64, 64, warps=4) for targets in (NVIDIA, AMD)),
        row("add_tiles_float32", ("sm90", "sm100"), 128, 32, warps=8),
        row("add_tiles_float32", ("sm90", "sm100"), 64, 32, warps=4),
        row("add_tiles_float32", ("sm80", "sm89", "sm120"), 64, 32, warps=8),
        row("add_tiles_float32", AMD, 64, 32, warps=4),
        Row("covariance.add_parts", NVIDIA + AMD, {"BLOCK": 32}, warps=4, stages=2),
        Row("covariance.mirror", NVIDIA + AMD, {"BLOCK": 64}, warps=4, stages=1),
    ]


def _lora_rows() -> list[Row]:
    def row(targets: tuple[str, ...], kernel: str, warps: int, least: tuple[int, ...] = (), **blocks: int) -> Row:
        constants = {**blocks, "PRECISION": _EXACT[targets]}
        return Row(f"projected_lora.{kernel}", targets, constants, warps, 3 if targets == NVIDIA else 2, least)

    rows = []
    for targets in _EXACT:
        rows += [
            # From as many tiles of 128 on as an H100 has multiprocessors.
            row(targets, "linear", warps=8, least=(0, 133), BLOCK_T=128, BLOCK_N=128, BLOCK_K=64),
            row(targets, "linear", warps=4, BLOCK_T=64, BLOCK_N=64, BLOCK_K=64),
            row(targets, "linear_float32", warps=8, BLOCK_T=128, BLOCK_N=64, BLOCK_K=32),
            # Bound by reading x or dy, whatever the rank: one width of tile.
            row(targets, "down", warps=8, BLOCK_T=128, BLOCK_R=64, BLOCK_D=64),
            row(targets, "down_float32", warps=4, BLOCK_T=64, BLOCK_R=32, BLOCK_D=32),
            row(targets, "outer", warps=4, BLOCK_T=64, BLOCK_R=64, BLOCK_D=64),
            row(targets, "outer_float32", warps=4, BLOCK_T=32, BLOCK_R=32, BLOCK_D=64),
        ]
    return rows


def _linear_tma_rows() -> list[Row]:
    """For ``python -m benchmarks.gpu_run`` to choose among: not timed yet, so no launch takes them by itself."""

    def row(target: str, stages: int, block_n: int, specialize: bool = False) -> Row:
        constants = {"BLOCK_T": 128, "BLOCK_N": block_n, "BLOCK_K": 64, "BLOCK_R": 32, "SPECIALIZE": specialize}
        return Row("projected_lora.linear_tma", (target,), constants, 8, stages)

    # Specialised for sm100 alone: Triton 3.8 leaves it out of eight warps on sm90, and fails on four. Tiles of 256
    # would take more shared memory than there is, those of 128 spill on sm100 with a fourth stage.
    return [
        row("sm90", 3, 256),
        row("sm90", 4, 128),
        row("sm100", 3, 256),
        row("sm100", 3, 128),
        row("sm100", 3, 128, specialize=True),
    ]


ROWS = [
    *_lora_rows(),
    *_linear_tma_rows(),
    *_projection_rows("null_projection.onto_basis"),
    *_projection_rows("null_projection.from_basis"),
    *_projection_rows("null_projection.adamw_from_basis"),
    *_covariance_rows(),
]


def rows_for(kernel: str, target: str) -> list[Row]:
    """In order of preference."""
    return [row for row in ROWS if row.kernel == kernel and target in row.targets]
