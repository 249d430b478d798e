"""What a method may change of a fine-tuning run; without an override it is plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import peft
import torch
from torch import Tensor, nn

from guardspace_kernels.demo.training import Example, answer_logits

from ..setting import ALPHA, RANK, Setting

LEARNING_RATE = 4e-4
SCALE = ALPHA / RANK


class Method:
    """Plain LoRA (Hu et al. 2021, arXiv 2106.09685): ``ΔW = s B A`` on every linear layer.

    A method is made for one run, with its knob and the run's seed, and may hold state.

    Attributes:
        name: in cells and tables. version: raised where a change of code may change results.
        knobs: values that were tried on the validation prompts; the first is the paper's setting, or the usual one.
        after: the method whose trained adapter this one changes; such a method trains nothing itself.
    """

    name: ClassVar[str] = "plain LoRA"
    version: ClassVar[int] = 1
    knobs: ClassVar[Sequence[float]] = (LEARNING_RATE,)
    after: ClassVar[str | None] = None

    def __init__(self, setting: Setting, knob: float, seed: int) -> None:
        self.setting, self.knob, self.seed = setting, knob, seed

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATE

    def build(self) -> nn.Module:
        """The model with adapters at their start."""
        torch.manual_seed(self.seed)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(self.setting.load(), config)

    def loss(self, model: nn.Module, batch: Sequence[Example]) -> Tensor:
        """Of one step; by default the mean over the answers' tokens."""
        return self.cross_entropy(model, batch)

    def cross_entropy(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        return nn.functional.cross_entropy(*answer_logits(model, examples, self.setting.pad))

    def change_gradients(self, model: nn.Module) -> None:
        """Between the backward pass and clipping."""

    def change_trained(self, model: nn.Module) -> None:
        """After the last step, before the adapter is merged into the weights."""

    def safety_rows(self, count: int, step: int) -> list[Example]:
        """Some of the refusals, in turn through all of them in an order of this seed."""
        rows = self.setting.refusals
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [rows[order[(step * count + i) % len(rows)]] for i in range(count)]


def factors(model: Any) -> Mapping[str, tuple[nn.Parameter, nn.Parameter]]:
    """Layer -> (A, B) of a plain PEFT model."""
    return {
        name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
