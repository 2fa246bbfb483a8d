"""The operators that have Triton kernels, as a table: what tools that inspect, measure and tune them go through."""

from collections.abc import Mapping

from ._launch import Operator
from .geglu import OPERATOR as GEGLU

OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in (GEGLU,)}
