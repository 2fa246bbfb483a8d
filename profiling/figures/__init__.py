"""Numbers derived from record sets, their statistics and conditions, and how people read them. Pure functions."""

from .derived import overview

__all__ = ["overview"]
