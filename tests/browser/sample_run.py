"""Makes run folders like those of real runs, for the report's tests."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = "<script>alert(1)</script></script><img src=x onerror=\"document.title='owned'\">\u2028&amp; '\"`\u202e"
ASTRAL = "🧮🤔 "  # two characters that JavaScript counts as two units each

TEXTS = [
    ("12+7=19. 19*3=57. 57-8=49.\n#### 49", "49", ["19*3=57. ", "57-8=49"]),
    (ASTRAL + "He has 4*6=24 eggs.\nHe sells 24-9=16 of them.\n#### 16", "15", ["24 eggs", "24-9=16"]),
    ("First, 5 bags hold 5*12=60 apples. Then 60/4=15 each.\n#### 15", "15", ["5*12=60", "60/4=15 each"]),
]


def write_run(folder: Path, steps: int = 60, rollouts: int = 12, hostile: bool = False, seed: int = 0) -> Path:
    """A finished run of `steps` steps with `rollouts` kept rollouts; `hostile` puts markup into every text."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval": _eval(0.503)}, *(_metrics(step, steps, draw) for step in range(1, steps + 1))]
    _write_lines(folder / "metrics.jsonl", rows)
    _write_lines(folder / "audits.jsonl", [_rollout(index, steps, hostile, draw) for index in range(rollouts)])
    (folder / "summary.json").write_text(json.dumps(_summary(rows, steps, hostile)), encoding="utf-8")
    (folder / "config.yaml").write_text(
        f"seed: 0\nmethod:\n  name: omniopd\n  chunks: 3\n  tokens: 6\n# {HOSTILE if hostile else 'resolved'}\n",
        encoding="utf-8",
    )
    (folder / "manifest.json").write_text(
        json.dumps({"omniopd": "0.1.0", "torch": "2.8.0"}, indent=2), encoding="utf-8"
    )
    return folder


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _eval(accuracy: float, n: int = 300) -> dict[str, Any]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    return {"accuracy": accuracy, "ci95": [accuracy - half, accuracy + half], "n": n}


def _metrics(step: int, steps: int, draw: random.Random) -> dict[str, Any]:
    done = step / steps
    row: dict[str, Any] = {
        "step": step,
        "loss": 1.4 - 0.6 * done + draw.gauss(0, 0.06),
        "value_loss": 0.9 - 0.4 * done + draw.gauss(0, 0.05),
        "branch_loss": 0.5 - 0.2 * done + draw.gauss(0, 0.03),
        "kl": float("nan") if step == steps // 2 else 0.08 * done + abs(draw.gauss(0, 0.005)),
        "grad_norm": 1.1 + draw.gauss(0, 0.2),
        "learning_rate": 1e-4,
        "coverage": 0.42 + draw.gauss(0, 0.03),
        "audited_tokens": 550,
        "chunks": 96,
        "drops": {"too_few_replies": draw.randint(0, 5), "no_room": draw.randint(2, 9)},
        "rejects": {"empty": draw.randint(0, 9), "refusal": draw.randint(0, 3), "timeout": draw.randint(0, 1)},
        "mean_score": 0.55 + 0.25 * done + draw.gauss(0, 0.02),
        "chance_floor": 0.12 + draw.gauss(0, 0.01),
        "n_eff": 5.4 + draw.gauss(0, 0.1),
        "duplicate_rate": 0.3 + 0.2 * done,
        "mean_entropy": 0.6 - 0.25 * done + draw.gauss(0, 0.02),
        "mean_length": 38 + draw.gauss(0, 2),
        "finished_share": min(1.0, 0.9 + 0.1 * done),
        "teacher_calls": 96,
        "teacher_cached_calls": 11,
        "teacher_prompt_tokens": draw.randint(7_000, 8_500),
        "teacher_completion_tokens": draw.randint(3_000, 3_600),
        "cost_usd": 0.0021,
        "seconds_rollout": 0.8 + draw.random() * 0.1,
        "seconds_evidence": 1.9 + draw.random() * 0.9,
        "seconds_wait": 0.7 + draw.random() * 0.3,
        "lag": {"0": 32} if step == 1 else {"1": 32},
        "seconds_update": 0.6 + draw.random() * 0.1,
    }
    if step % 10 == 0 and step < steps:
        row["eval"] = _eval(round(0.503 + 0.27 * (1 - math.exp(-3 * done)), 3))
    return row


def _summary(rows: list[dict[str, Any]], steps: int, hostile: bool) -> dict[str, Any]:
    before, after = _eval(0.503), _eval(0.76)

    def total(key: str) -> float:
        return float(sum(row.get(key, 0) for row in rows))

    return {
        "method": HOSTILE if hostile else "omniopd",
        "score": "token_agreement",
        "signals": ["likelihood", "survival"],
        "seed": 0,
        "steps": steps,
        "wall_seconds": 3.6 * steps,
        "wait_share": 0.31,
        "status": "finished",
        "eval": {
            "before": before,
            "after": after,
            "difference": {"mean": 0.257, "low": 0.191, "high": 0.316},
            "teacher": _eval(0.927),
        },
        "teacher": {
            "calls": total("teacher_calls"),
            "cached_calls": total("teacher_cached_calls"),
            "prompt_tokens": total("teacher_prompt_tokens"),
            "completion_tokens": total("teacher_completion_tokens"),
            "cost_usd": total("cost_usd"),
            "name": HOSTILE if hostile else "wordy-teacher-1m",
        },
        "signal": {"coverage": 0.423},
        "drops": {HOSTILE if hostile else "no_room": 331, "too_few_replies": 149},
        "rejects": {"empty": 270, "refusal": 88, "timeout": 30},
        "student": {"path": "examples/demo/student", "parameters": 712_000},
    }


def _rollout(index: int, steps: int, hostile: bool, draw: random.Random) -> dict[str, Any]:
    text, reference, spans = TEXTS[index % len(TEXTS)]
    if hostile:
        text += HOSTILE
        spans = [*spans, HOSTILE]
    answer = text.split("#### ")[1].split("<")[0].strip()
    return {
        "step": 1 + index * (steps - 1) // 12,
        "prompt_id": HOSTILE if hostile else f"train/{100 + index}",
        "prompt": [
            {"role": "system", "content": "Solve the problem. End with #### and the number."},
            {"role": "user", "content": "A farmer packs eggs into boxes of twelve. How many are left over?"},
        ],
        "text": text,
        "reference": reference,
        "correct": answer == reference,
        "finish": "stop" if index % 5 else "length",
        "chunks": [_chunk(text, span, number, hostile, draw) for number, span in enumerate(spans)],
    }


def _chunk(text: str, span: str, number: int, hostile: bool, draw: random.Random) -> dict[str, Any]:
    start = len(text[: text.index(span)].rstrip())
    span = text[start : text.index(span) + len(span)]
    tokens = [span[at : at + 2] for at in range(0, len(span), 2)]
    dropped = "too_few_replies" if draw.random() < 0.15 else None
    replies = [] if dropped else [_reply(tokens, hostile, draw) for _ in range(6)]
    matches = sum(reply["score"] for reply in replies)
    return {
        "start": 4 + 9 * number,
        "end": 4 + 9 * number + len(tokens),
        "char_start": start,
        "char_end": start + len(span),
        "prefix_end": start,
        "text": span,
        "entropy": 0.4 + 2 * draw.random(),
        "k": matches,
        "n_eff": len(replies),
        "score": None if dropped else matches / len(replies),
        "weight": None if dropped else (matches + 0.3) / (len(replies) + 1),
        "values": [draw.gauss(0, 1) for _ in tokens],
        "tokens": tokens,
        "replies": replies,
        "rejected": {"empty": 5} if dropped else {"empty": draw.randint(0, 1)},
        "dropped": dropped,
    }


def _reply(tokens: list[str], hostile: bool, draw: random.Random) -> dict[str, Any]:
    same = draw.choice([len(tokens), len(tokens), len(tokens) // 2, 0])
    rest = "" if same == len(tokens) else draw.choice(["so we add the two numbers", "18, and that is it", "= ?"])
    text = "".join(tokens[:same]) + rest + (HOSTILE if hostile else "")
    return {"text": text, "finish": draw.choice(["stop", "length"]), "score": same / len(tokens), "agreed": same}
