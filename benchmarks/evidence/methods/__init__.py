"""The methods by name; each is a file of its own."""

from __future__ import annotations

from .asft import AsFT
from .base import Method
from .guardspace import GuardSpace
from .lora_null import LoraNull
from .projected import ProjectedAfterwards
from .replay import Replay
from .safe_lora import SafeLora
from .safegrad import SafeGrad
from .sbr import SafetyAnchor
from .small_rate import SmallRate

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Method, SmallRate, Replay, AsFT, SafeLora, SafetyAnchor, LoraNull, SafeGrad, ProjectedAfterwards, GuardSpace,
    )
}  # fmt: skip

__all__ = ["METHODS", "Method"]
