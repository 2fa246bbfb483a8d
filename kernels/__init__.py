"""The fused operators. Imports the standard library, torch and triton, nothing else: copy this folder anywhere."""

# pyproject.toml reads it from here, without importing.
__version__ = "0.1.0"

from . import layers
from ._conv3x3_torch import pack_phases
from ._dispatch import KernelUnsupported
from ._launch import Chip, Launch, Operator, chip_of, planned_for, tuned_table
from .attention import MAX_HEAD_DIM, attention, attention_ref
from .conv3x3 import conv3x3, conv3x3_backend, conv3x3_ref, conv3x3_separate
from .geglu import geglu, geglu_ref
from .group_norm import group_norm_silu, group_norm_silu_ref
from .layer_norm import layer_norm, layer_norm_ref
from .linear import linear, linear_ref, linear_separate
from .modules import GEGLU, Attention, GroupNormSiLU
from .operators import OPERATORS
from .philox import INITIAL_NOISE, STEP_NOISE, philox_normal, seed_tensor
from .residual_add import residual_add, residual_add_ref
from .sampler_update import sampler_update, sampler_update_ref

__all__ = [
    "GEGLU",
    "INITIAL_NOISE",
    "MAX_HEAD_DIM",
    "OPERATORS",
    "STEP_NOISE",
    "Attention",
    "Chip",
    "GroupNormSiLU",
    "KernelUnsupported",
    "Launch",
    "Operator",
    "__version__",
    "attention",
    "attention_ref",
    "chip_of",
    "conv3x3",
    "conv3x3_backend",
    "conv3x3_ref",
    "conv3x3_separate",
    "geglu",
    "geglu_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "layer_norm",
    "layer_norm_ref",
    "layers",
    "linear",
    "linear_ref",
    "linear_separate",
    "pack_phases",
    "philox_normal",
    "planned_for",
    "residual_add",
    "residual_add_ref",
    "sampler_update",
    "sampler_update_ref",
    "seed_tensor",
    "tuned_table",
]
