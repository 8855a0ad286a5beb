"""What a run would do and cost, without spending anything: `omniopd train CONFIG --dry-run`.

The student is local and free, so the forecast samples a few rollouts from it and counts what the method would ask about
them, instead of guessing lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omniopd.ledger import Ledger, Price, read_prices
from omniopd.registry import TEACHERS
from omniopd.run import Run
from omniopd.store import Store
from omniopd.types import ContinueQuery, Query, Usage
from teachers.probe import disproved

SAMPLED = 16  # rollouts that the forecast is made from


@dataclass(frozen=True)
class Forecast:
    """Teacher use of a whole run, and where the numbers are from.

    Without a pilot, tokens are counted with the student's tokenizer (the teacher's may differ), and a prompt cache is not
    reckoned with. With one (`omniopd probe`), they are what the first queries of this very run really used.
    """

    calls: int
    prompt_tokens: int
    completion_tokens_limit: int  # if every reply runs into its token limit
    completion_tokens_expected: int
    cost_limit_usd: float | None
    cost_expected_usd: float | None
    measured: bool = False


def forecast(run: Run, price: Price | None = None, pilot: Mapping[str, float] | None = None) -> Forecast:
    """Count what the method asks about a few rollouts, and scale it up to all steps.

    Args:
        pilot: calls and tokens that one query really used, from a probe's record.
    """
    train = run.config.train
    count = min(SAMPLED, train.prompts_per_step, len(run.task.train))
    prompts = run.prompts(1)[:count]
    rollouts = run.sampler.sample(prompts, 1) if run.method.on_policy else run.sampler.unwritten(prompts)
    queries = run.method.audit(rollouts, 1)
    scale = train.steps * train.prompts_per_step / count
    asked = len(queries) * scale
    limit = sum(query.n * query.max_tokens for query in queries) * scale
    if pilot is None:
        calls = asked
        expected = Usage(
            prompt_tokens=round(sum(_prompt_tokens(run, query) for query in queries) * scale),
            completion_tokens=round(sum(query.n * _expected_tokens(query) for query in queries) * scale),
        )
    else:
        calls = pilot["calls"] * asked
        expected = Usage(
            prompt_tokens=round(pilot["prompt"] * asked),
            completion_tokens=round(pilot["completion"] * asked),
            cache_read_tokens=round(pilot["cache_read"] * asked),
            cache_write_tokens=round(pilot["cache_write"] * asked),
        )
    worst = Usage(prompt_tokens=expected.prompt_tokens, completion_tokens=round(limit))
    return Forecast(
        calls=round(calls),
        prompt_tokens=expected.prompt_tokens,
        completion_tokens_limit=round(limit),
        completion_tokens_expected=expected.completion_tokens,
        cost_limit_usd=price.cost(worst) if price else None,
        cost_expected_usd=price.cost(expected) if price else None,
        measured=pilot is not None,
    )


def known_of(run: Run) -> tuple[Price | None, dict[str, Any] | None]:
    """The teacher's price and the last probe's record, from the config and the run's store, with nothing sent."""
    config = run.config
    prices = read_prices(config.prices) if config.prices else None
    if not config.store_path.exists():
        price = getattr(config.teacher, "price", None)
        return price or (prices.find(getattr(config.teacher, "model", "")) if prices else None), None
    store = Store(config.store_path)
    try:
        teacher = TEACHERS.build(config.teacher, store, Ledger(store, prices=prices))
        return getattr(teacher, "price", None), getattr(teacher, "probe", None)
    finally:
        store.close()


def _prompt_tokens(run: Run, query: Query) -> int:
    prefix = query.chunk.start if isinstance(query, ContinueQuery) else 0
    return len(run.policy.prompt_ids(query.prompt)) + prefix


def _expected_tokens(query: Query) -> int:
    """A continuation nearly always runs into its limit; an answer is as long as it likes, half of it as a guess."""
    return query.max_tokens if isinstance(query, ContinueQuery) else query.max_tokens // 2


def memory_gb(run: Run) -> dict[str, float]:
    """Estimated device memory of training, by what takes it, in GB (1e9 bytes)."""
    student = run.config.student
    model = run.policy.causal_lm
    width = 2 if student.dtype == "bfloat16" else 4
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad)
    config = model.config.get_text_config()
    per_layer = 2 if student.gradient_checkpointing else 34  # numbers kept per token and hidden unit
    activations = student.micro_batch_tokens * config.hidden_size * config.num_hidden_layers * per_layer * width
    parts = {
        "student weights": weights * width,
        "frozen reference": 0 if student.lora or run.config.method.anchor.beta == 0 else weights * width,
        "gradients and AdamW": trained * 3 * width,
        "activations of a micro-batch": activations,
        "logits of a slice": 4 * student.slice_tokens * config.vocab_size * 4,
    }
    return {name: amount / 1e9 for name, amount in parts.items()}


def describe(run: Run) -> Sequence[tuple[str, str]]:
    """The plan as rows of (what, value)."""
    config, method = run.config, run.config.method
    price, probed = known_of(run)
    ahead = forecast(run, price, (probed or {}).get("pilot"))
    memory = memory_gb(run)
    signals = [signal.name for signal in getattr(method, "signals", [])]
    score = getattr(getattr(method, "score", None), "name", None)
    money = (
        "no price is known (teacher.price, or a file in prices), so no price forecast"
        if ahead.cost_expected_usd is None
        else f"${ahead.cost_expected_usd:,.2f} expected, ${ahead.cost_limit_usd:,.2f} at most (without any cache discount)"
    )
    if config.budget_usd is not None:
        money += f"; budget ${config.budget_usd:g}"
    source = "measured by the probe's pilot" if ahead.measured else "estimated; omniopd probe measures it"
    rows = [
        (
            "student",
            f"{config.student.path}, {'LoRA' if config.student.lora else 'full fine-tuning'}, {config.student.dtype}",
        ),
        ("teacher", f"{config.teacher.type}: {getattr(config.teacher, 'model', '')}"),
        ("method", f"{method.name}, anchor beta {method.anchor.beta:g}, {method.reduction}"),
        (
            "signal",
            " + ".join(signals) + (f" (score {score})" if score else "") if signals else "the teacher's own answers",
        ),
        ("data", f"{len(run.task.train)} training prompts, {len(run.heldout)} held-out problems to measure with"),
        (
            "steps",
            f"{config.train.steps} of {config.train.prompts_per_step} prompts, lr {config.train.learning_rate:g}",
        ),
        ("teacher calls", f"{ahead.calls:,}"),
        (
            "teacher tokens",
            f"{ahead.prompt_tokens:,} in, {ahead.completion_tokens_expected:,} out ({source}); at most "
            f"{ahead.completion_tokens_limit:,} out",
        ),
        ("price", money),
        ("memory", f"about {sum(memory.values()):.2f} GB: " + ", ".join(f"{n} {gb:.2f}" for n, gb in memory.items())),
        ("output", str(config.output)),
    ]
    if config.eval.teacher:
        limit = len(run.heldout) * config.eval.teacher_tokens
        rows.insert(9, ("eval.teacher", f"{len(run.heldout)} more calls, up to {limit:,} tokens out"))
    rows += [("probe", f"{probed['at']}: continuation {probed['rung']}")] if probed else []
    rows += [("refused", sentence) for sentence in disproved(config.teacher, probed)] if probed else []
    return rows + [("caution", caution) for caution in run.cautions()]
