from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from guardspace_kernels.demo.training import Example

from .base import Method


class Replay(Method):
    """Refusals among the task's rows (Bianchi et al., arXiv 2309.07875): ``L = L_task + L_refusals``.

    Each step adds `knob` of the calibration requests with the aligned model's own refusals: the data that GuardSpace
    calibrates on, with the answers learnt. The papers mix in 3% to 10% of the rows; 1 of 8 is the nearest.
    """

    name = "replay"
    knobs = (1, 2, 4)

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.step = 0

    def loss(self, model: nn.Module, batch: Sequence[Example]) -> Tensor:
        rows = self.safety_rows(round(self.knob), self.step)
        self.step += 1
        return self.cross_entropy(model, batch) + self.cross_entropy(model, rows)
