"""OmniOPD: distil language models on-policy from any teacher.

`distill(load_config(path))` runs a configuration; `Run` is the same in pieces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omniopd.version import __version__

if TYPE_CHECKING:
    from omniopd.config import RunConfig, load_config
    from omniopd.run import Run, distill

__all__ = ["Run", "RunConfig", "__version__", "distill", "load_config"]


def __getattr__(name: str) -> Any:
    """Public names, imported when asked for: the types alone should not load torch's whole training stack."""
    if name in ("RunConfig", "load_config"):
        from omniopd import config

        return getattr(config, name)
    if name in ("Run", "distill"):
        from omniopd import run

        return getattr(run, name)
    raise AttributeError(f"module 'omniopd' has no attribute '{name}'")
