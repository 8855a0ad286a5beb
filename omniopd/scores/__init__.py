"""How much a teacher's continuation resembles what the student wrote: one score function per file, found by name.

A score takes pairs of (`Chunk`, `Reply`) and returns one number in [0, 1] for each. The pairs come cut to equal length
(see `omniopd.verification.text.comparable`). A score without settings may be a plain function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omniopd.verification.audit import Score


def as_score(component: Callable[..., Any], config: object) -> Score:
    """The score of a registered component: a class is built from its config, a plain function is one already."""
    return component(config) if isinstance(component, type) else component
