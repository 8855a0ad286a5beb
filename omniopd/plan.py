"""What a run would do and cost, without spending anything: `omniopd train CONFIG --dry-run`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from omniopd.chat import first_line
from omniopd.errors import ConfigError
from omniopd.ledger import Ledger, Price, read_prices
from omniopd.losses import slice_size
from omniopd.pilot import Counter, Pilot, queries_of, run_digest
from omniopd.registry import TEACHERS
from omniopd.run import Run
from omniopd.store import Store
from omniopd.types import AnswerQuery, Query, Usage
from teachers.findings import disproved
from teachers.in_process import InProcessTeacher

SAMPLED = 128  # rollouts that the forecast is made from, spread over the steps
UNWRITTEN = 4096  # the same for a method whose student writes nothing, so that they cost nothing


@dataclass(frozen=True)
class Forecast:
    """What a whole run asks of its teacher: `expected`, and `most` if every text runs into its limit and no cache helps.

    `measured`: scaled up from what a pilot really used; else counted with the student's tokenizer (the teacher's may
    differ), as if one call brought all draws of a query, and without a prompt cache.
    """

    expected: Usage
    most: Usage
    measured: bool


def forecast(run: Run, record: Mapping[str, Any] | None = None) -> Forecast:
    """Count what the method asks about some rollouts of the untrained student, and scale it up to all steps.

    Args:
        record: of the last probe of this teacher; its pilot counts if it was one of this very run.
    """
    queries, scale = sampled(run)
    pilot = Pilot(**record["pilot"]) if record and record["pilot"] else None
    if pilot is not None and (pilot.run != run_digest(run) or not pilot.counted):
        pilot = None
    counter = Counter(run, pilot.rung if pilot else record["rung"] if record else None)
    read = sum(counter.read(query) for query in queries) * scale
    written = sum(counter.most(query) for query in queries) * scale
    if pilot is not None:
        asked, longer = len(queries) * scale / pilot.queries, read / pilot.counted
        expected = Usage(
            calls=round(pilot.calls * asked),
            prompt_tokens=round(pilot.prompt_tokens * longer),
            completion_tokens=round(pilot.completion_tokens * asked),
            cache_read_tokens=round(pilot.cache_read_tokens * longer),
            cache_write_tokens=round(pilot.cache_write_tokens * longer),
        )
        most = replace(expected, completion_tokens=round(written), cache_read_tokens=0, cache_write_tokens=0)
        return Forecast(expected, most, True)
    together = getattr(run.config.teacher, "n", True)  # false: a call for each draw; auto: that may turn out
    alone = sum(query.n * counter.read(query) for query in queries) * scale
    calls = sum(query.n if together is False else 1 for query in queries) * scale
    expected = Usage(
        calls=round(calls),
        prompt_tokens=round(alone if together is False else read),
        completion_tokens=round(sum(counter.expected(query) for query in queries) * scale),
    )
    most = replace(expected, prompt_tokens=round(read if together is True else alone), completion_tokens=round(written))
    return Forecast(expected, most, False)


def sampled(run: Run) -> tuple[list[Query], float]:
    """Queries of steps spread over the run, and how many times as many the whole run has."""
    train = run.config.train
    steps, size = train.steps, train.prompts_per_step * train.rollouts_per_prompt
    rollouts = min(size, SAMPLED)
    count = min(steps, max(1, (SAMPLED if run.method.on_policy else UNWRITTEN) // size))
    picked = [1 + i * steps // count for i in range(count)]
    queries = [query for step in picked for query in queries_of(run, step, rollouts)]
    return queries, steps * size / (count * rollouts) if count else 0.0


def teacher_eval(run: Run) -> Usage:
    """The most that `eval.teacher` uses: a whole answer to every held-out problem."""
    limit, counter = run.config.eval.teacher_tokens, Counter(run)
    queries = [AnswerQuery(prompt, row, 1, limit, 0) for row, prompt in enumerate(run.heldout)]
    read, written = sum(map(counter.read, queries)), sum(map(counter.most, queries))
    return Usage(calls=len(queries), prompt_tokens=read, completion_tokens=written)


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
        try:
            return getattr(teacher, "price", None), getattr(teacher, "probe", None)
        finally:
            asyncio.run(teacher.close())
    finally:
        store.close()


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
        "logits of a slice": 4 * (student.slice_tokens or slice_size(config.vocab_size)) * config.vocab_size * 4,
        "teacher weights": sum(
            map(weight_bytes, getattr(run.config.teacher, "teachers", {"": run.config.teacher}).values())
        ),
    }
    return {name: amount / 1e9 for name, amount in parts.items()}


def weight_bytes(teacher: Any) -> int:
    """What a teacher's weights take in this process, without loading them; 0 for one that has none here."""
    if not issubclass(TEACHERS.get(teacher.type), InProcessTeacher):
        return 0
    try:
        config = AutoConfig.from_pretrained(teacher.path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # the library raises a different type for every way in which this fails
        raise ConfigError(
            f"teacher.path: '{teacher.path}' is no causal language model: {first_line(problem)}"
        ) from None
    stored = getattr(config, "dtype", None) or torch.float32
    dtype = stored if teacher.dtype == "auto" else getattr(torch, teacher.dtype)
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def describe(run: Run) -> Sequence[tuple[str, str]]:
    """The plan as rows of (what, value)."""
    config, method = run.config, run.config.method
    memory = memory_gb(run)
    return [
        (
            "student",
            f"{config.student.path}, {'LoRA' if config.student.lora else 'full fine-tuning'}, {config.student.dtype}",
        ),
        ("teacher", f"{config.teacher.type}: {getattr(config.teacher, 'model', '')}"),
        *_judging(run),
        ("method", f"{method.name}, anchor beta {method.anchor.beta:g}, {method.reduction}"),
        ("signal", run.signal),
        ("data", f"{len(run.task.train)} training prompts, {len(run.heldout)} held-out problems to measure with"),
        (
            "steps",
            f"{config.train.steps} of {config.train.prompts_per_step} prompts, lr {config.train.learning_rate:g}"
            + (f", rollouts up to {config.train.max_lag} updates old" if config.train.max_lag else ""),
        ),
        *_asked(run),
        ("memory", f"about {sum(memory.values()):.2f} GB: " + ", ".join(f"{n} {gb:.2f}" for n, gb in memory.items())),
        ("output", str(config.output)),
        *(("caution", caution) for caution in run.cautions()),
    ]


def _judging(run: Run) -> list[tuple[str, str]]:
    """The row about a judge of its own, if it is asked anything."""
    judge = run.config.judge
    if judge is None or "judge" not in run.method.needs:
        return []
    return [("judge", f"{judge.type}: {getattr(judge, 'model', '')}; what it is asked is not in the forecast")]


def _asked(run: Run) -> list[tuple[str, str]]:
    """The rows about the teacher: what it will be asked, what that costs, and what a probe found of it."""
    config = run.config
    price, probed = known_of(run)
    ahead, measuring = forecast(run, probed), Usage()
    source = "measured by the probe's pilot" if ahead.measured else "estimated; omniopd probe measures it"
    rows = [
        ("teacher calls", f"{ahead.expected.calls:,}"),
        (
            "teacher tokens",
            f"{ahead.expected.prompt_tokens:,} in, {ahead.expected.completion_tokens:,} out ({source}); at most "
            f"{ahead.most.completion_tokens:,} out",
        ),
    ]
    if run.method.asks_again:
        rows.append(("asked again", "not in the forecast: the method asks more once it has the first replies"))
    if config.eval.teacher:
        measuring = teacher_eval(run)
        rows.append(
            (
                "eval.teacher",
                f"{measuring.calls:,} more calls, {measuring.prompt_tokens:,} in, up to {measuring.completion_tokens:,} out",
            )
        )
    money = "no price is known (teacher.price, or a file in prices), so no price forecast"
    if price is not None:
        most = ahead.most + measuring
        expected, most_usd = (
            price.cost(ahead.expected + measuring),
            price.most(most.prompt_tokens, most.completion_tokens),
        )
        money = f"${expected:,.2f} expected, ${most_usd:,.2f} at most (without any cache discount)"
    if config.budget_usd is not None:
        money += f"; budget ${config.budget_usd:g}"
    rows.append(("price", money))
    if probed:
        rows.append(("probe", f"{probed['at']}: continuation {probed['rung']}"))
        rows += [("refused", sentence) for sentence in disproved(config.teacher, probed)]
    return rows
