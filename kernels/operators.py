"""The operators that have Triton kernels, as a table for the tools that inspect, measure and tune them."""

from collections.abc import Mapping

from ._launch import Operator
from .attention import OPERATOR as ATTENTION
from .conv3x3 import OPERATOR as CONV3X3
from .geglu import OPERATOR as GEGLU
from .group_norm import OPERATOR as GROUP_NORM_SILU
from .layer_norm import OPERATOR as LAYER_NORM
from .linear import OPERATOR as LINEAR
from .residual_add import OPERATOR as RESIDUAL_ADD
from .sampler_update import OPERATOR as SAMPLER_UPDATE
from .transformer_front import OPERATOR as TRANSFORMER_FRONT
from .transformer_tail import OPERATOR as TRANSFORMER_TAIL

OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        ATTENTION,
        GROUP_NORM_SILU,
        LAYER_NORM,
        LINEAR,
        CONV3X3,
        GEGLU,
        RESIDUAL_ADD,
        SAMPLER_UPDATE,
        TRANSFORMER_FRONT,
        TRANSFORMER_TAIL,
    )
}
