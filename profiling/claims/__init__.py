"""The claims of the paper as pure functions over records; planning under a budget."""

from .judge import judge

__all__ = ["judge"]
