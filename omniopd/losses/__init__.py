"""The objective's pure functions on tensors: likelihood, divergences, how terms are averaged, and the pass over slices."""

from omniopd.losses.chunked import Head, LossOf, frozen_head, slice_bounds, slice_size, sum_over_slices
from omniopd.losses.divergence import Divergence, forward_kl, generalised_jsd, reverse_kl
from omniopd.losses.likelihood import entropy, importance_ratio, log_probs, logp_at, token_logp, token_nll
from omniopd.losses.reduction import reduction_scales

__all__ = [
    "Divergence",
    "Head",
    "LossOf",
    "entropy",
    "forward_kl",
    "frozen_head",
    "generalised_jsd",
    "importance_ratio",
    "log_probs",
    "logp_at",
    "reduction_scales",
    "reverse_kl",
    "slice_bounds",
    "slice_size",
    "sum_over_slices",
    "token_logp",
    "token_nll",
]
