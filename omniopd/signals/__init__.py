"""What a verdict on a chunk says about its tokens: one signal per file, found by name.

`likelihood_weight` is the signal of OmniOPD (Zhou et al. 2026): one weight per chunk. `survival` gives each token an
advantage of its own, and `continuation_likelihood` learns from the teacher's texts instead; both are ours. All three
read the same continuations, and none is differentiable: values multiply -log p in the loss.
"""

from __future__ import annotations

from pydantic import Field

from omniopd.settings import Settings


class SignalConfig(Settings):
    """What every signal's `Config` has: its share where several signals are used together."""

    name: str
    weight: float = Field(default=1.0, gt=0, description="multiplies this signal's term of the loss")
