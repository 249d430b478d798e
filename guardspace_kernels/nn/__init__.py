"""Drop-in modules for trainers without PEFT."""

from guardspace_kernels.nn.covariance_accumulator import CovarianceAccumulator
from guardspace_kernels.nn.null_space_projector import NullSpaceProjector
from guardspace_kernels.nn.projected_lora_linear import FusedProjectedLoraLinear, ProjectedLoraLinear

__all__ = ["CovarianceAccumulator", "FusedProjectedLoraLinear", "NullSpaceProjector", "ProjectedLoraLinear"]
