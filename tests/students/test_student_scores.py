from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from students import scoring
from students.policy import Policy
from students.scoring import score

KINDS = [("byte_level", "llama"), ("pieces", "qwen3"), ("byte_level", "gemma2")]  # the last one caps its logits


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def student(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> Policy:
    attention = "eager" if request.param[1] == "gemma2" else "sdpa"
    return tiny.policy(tiny_folder(*request.param), micro_batch_tokens=64, slice_tokens=7, attention=attention)


def texts(student: Policy, lengths: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    dice = random.Random(0)
    words = len(student.tokenizer)
    return [tuple([dice.randrange(words) for _ in range(n)] for n in pair) for pair in lengths]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_are_those_of_a_dense_pass(student: Policy, dtype: torch.dtype) -> None:
    student.model.to(dtype)
    given = texts(student, [(3, 9), (1, 1), (20, 30), (5, 0), (7, 16), (40, 60), (2, 3)])
    for (prompt, ids), (logprobs, entropy) in zip(given, score(student, given), strict=True):
        if not ids:
            assert (logprobs, entropy) == ((), ())
            continue
        whole = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            logp = student.model(input_ids=whole).logits[0].to(dtype).log_softmax(-1)[len(prompt) - 1 : -1]
        close: Any = {"atol": 1e-6 if dtype == torch.float32 else 1e-12, "rtol": 1e-6}
        own = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs, dtype=dtype), own, **close)
        torch.testing.assert_close(torch.tensor(entropy, dtype=dtype), -(logp.exp() * logp).sum(-1), **close)


def test_no_texts_and_texts_of_no_tokens_have_no_numbers(student: Policy) -> None:
    assert score(student, []) == []
    assert score(student, [([3, 4], []), ([5], [])]) == [((), ()), ((), ())]


def test_batches_keep_to_the_budget_and_logits_to_slices(student: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[tuple[int, int]] = []
    slices: list[int] = []
    states, logp = student.states, scoring.token_logp

    def watched_states(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        widths.append(tuple(inputs["input_ids"].shape))  # type: ignore[arg-type]
        return states(model, inputs)

    def watched_logp(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        slices.append(len(logits))
        return logp(logits, ids)

    monkeypatch.setattr(student, "states", watched_states)
    monkeypatch.setattr(scoring, "token_logp", watched_logp)
    given = texts(student, [(3, 9), (4, 8), (30, 50), (5, 7), (6, 12), (10, 20), (9, 21)])
    score(student, given)
    assert max(slices) <= 7 and sum(slices) == sum(len(ids) for _, ids in given)
    assert all(rows == 1 or rows * width <= 64 for rows, width in widths)
    assert widths == sorted(widths, key=lambda shape: -shape[1])
    assert len(widths) < len(given)  # some share a pass


def test_nothing_is_kept_for_a_gradient(student: Policy) -> None:
    student.model.requires_grad_(True)
    score(student, texts(student, [(3, 9)]))
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_an_adapter_counts(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder, lora={"rank": 2})
    given = texts(student, [(3, 9)])
    plain = score(student, given)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    ((logprobs, _),) = score(student, given)
    own, _ = tiny.dense(student.model, *given[0])
    assert logprobs != plain[0][0]
    torch.testing.assert_close(torch.tensor(logprobs), own, atol=1e-5, rtol=1e-5)
