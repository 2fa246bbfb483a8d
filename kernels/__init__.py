"""The fused operators. Imports the standard library, torch and triton, nothing else: copy this folder anywhere."""

# pyproject.toml reads it from here, without importing.
__version__ = "0.1.0"

from . import layers
from ._conv3x3_torch import Conv3x3Call, pack_phases
from ._dependent import dependent_launch_reasons, dependent_launches, dependent_launches_enabled
from ._dispatch import KernelUnsupported
from ._float8 import float8_rows
from ._launch import Chip, Launch, Operator, chip_of, planned_for, tuned_table
from ._statistics import channel_statistics, like_statistics
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
from .transformer_front import (
    TransformerFrontCall,
    transformer_front,
    transformer_front_backend,
    transformer_front_ref,
    transformer_front_separate,
)
from .transformer_tail import (
    TransformerTailCall,
    tail_statistics_tile,
    transformer_tail,
    transformer_tail_backend,
    transformer_tail_ref,
    transformer_tail_separate,
)

__all__ = [
    "GEGLU",
    "INITIAL_NOISE",
    "MAX_HEAD_DIM",
    "OPERATORS",
    "STEP_NOISE",
    "Attention",
    "Chip",
    "Conv3x3Call",
    "GroupNormSiLU",
    "KernelUnsupported",
    "Launch",
    "Operator",
    "TransformerFrontCall",
    "TransformerTailCall",
    "__version__",
    "attention",
    "attention_ref",
    "channel_statistics",
    "chip_of",
    "conv3x3",
    "conv3x3_backend",
    "conv3x3_ref",
    "conv3x3_separate",
    "dependent_launch_reasons",
    "dependent_launches",
    "dependent_launches_enabled",
    "float8_rows",
    "geglu",
    "geglu_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "layer_norm",
    "layer_norm_ref",
    "layers",
    "like_statistics",
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
    "tail_statistics_tile",
    "transformer_front",
    "transformer_front_backend",
    "transformer_front_ref",
    "transformer_front_separate",
    "transformer_tail",
    "transformer_tail_backend",
    "transformer_tail_ref",
    "transformer_tail_separate",
    "tuned_table",
]
