"""The helper process: it is stopped when it takes too long, and the next question finds another."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from evals import symbolic
from omniopd.errors import RunError


def test_an_endless_expression_is_not_decided_and_the_next_is_answered() -> None:
    verifier = symbolic.Verifier(seconds=1.0)
    try:
        assert verifier.equal("x+1", "1+x")
        began = time.perf_counter()
        assert verifier.equal("5", "9^{9^{9^{9}}}") is None
        assert time.perf_counter() - began < 10
        assert verifier.equal("x+2", "2+x")
    finally:
        verifier.close()


def test_a_helper_that_dies_is_replaced() -> None:
    verifier = symbolic.Verifier()
    try:
        assert verifier.equal("x+1", "1+x")
        process = verifier._process
        assert process is not None
        process.kill()
        process.wait()
        assert verifier.equal("x+1", "1+x")
    finally:
        verifier.close()


def test_a_helper_that_never_starts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(symbolic, "_WORKER", script)
    with pytest.raises(RunError, match="math-verify doesn't start; try"):
        symbolic.Verifier().equal("x", "y")
