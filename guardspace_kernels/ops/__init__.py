"""The three ops, also reachable as ``torch.ops.guardspace.*``."""

from guardspace_kernels.ops.covariance import covariance_update_, squared_drift, symmetrize_
from guardspace_kernels.ops.null_projection import null_project_, projected_adamw_
from guardspace_kernels.ops.projected_lora import projected_lora

__all__ = ["covariance_update_", "null_project_", "projected_adamw_", "projected_lora", "squared_drift", "symmetrize_"]
