"""The referee: several methods over one loop, on the same prompts, in the same order, from the same weights and seeds."""

from omniopd.compare.referee import compare

__all__ = ["compare"]
