"""The referee: order, controls, refusals, resumption, and what is written after every run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from folders import leave

import omniopd.compare.referee as referee
from omniopd.cli import main
from omniopd.compare import compare
from omniopd.compare.panels import mean_curve
from omniopd.compare.results import gain_per_million, pooled
from omniopd.compare.runs import read, run
from omniopd.compare.variants import config_of, read_variants
from omniopd.compare.words import difference
from omniopd.config import RunConfig, load_config
from omniopd.errors import ConfigError
from omniopd.report.formats import points
from omniopd.unloaded import misfit

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
SOURCE: dict[str, Any] = {
    "student": {"path": str(DEMO / "student"), "max_new_tokens": 32},
    "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
    "task": {"type": "arithmetic", "train_size": 64, "heldout_size": 40},
    "train": {"steps": 4, "prompts_per_step": 8, "learning_rate": 1e-4},
    "eval": {"problems": 40, "every": 2, "every_problems": 20},
}
Fake = Callable[[RunConfig], str]


def answers(config: RunConfig) -> list[bool]:
    """`dense` is right more often than `sampled`, whose verdicts are a coin's."""
    coin = random.Random(f"{config.seed}")
    share = 0.9 if getattr(config.method, "form", "") == "dense" else 0.5
    return [coin.random() < share for _ in range(40)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Runs that leave their folder at once; those that were started: method, control, seed."""
    started: list[tuple[str, str, int]] = []

    def fake(config: RunConfig) -> str:
        if read(config)["status"] == "finished":
            return ""
        parts = [part.name for part in config.method.parts]
        started.append((config.method.name, "length" if "horizon" in parts else config.method.control, config.seed))
        if config.method.name == "gndpo" and config.seed == 1:
            leave(config.output, answers(config), status="failed")
            return "the disk is full"
        leave(config.output, answers(config), learned=60 if config.method.name == "fire" else 80)
        return ""

    monkeypatch.setattr(referee, "run", fake)
    return started


def compared(tmp_path: Path, methods: str, **settings: Any) -> dict[str, Any]:
    return compare({**SOURCE, "output": str(tmp_path / "out")}, [], methods, **settings)


def of(found: dict[str, Any], label: str) -> dict[str, Any]:
    return next(one for one in found["variants"] if one["label"] == label)


def test_each_seed_runs_all_methods_and_their_controls_before_the_next(
    tmp_path: Path, runs: list[tuple[str, str, int]]
) -> None:
    found = compared(tmp_path, "opd,fire", seeds=2)
    first = [("opd", "none", 0), ("fire", "none", 0), ("fire", "shuffled", 0), ("opd", "length", 0)]
    assert runs == [*first, *((name, control, 1) for name, control, _ in first)]
    assert [one["label"] for one in found["variants"]] == ["opd", "fire", "fire (shuffled)", "fire (length)"]
    assert found["whole"]
    assert of(found, "fire (length)")["settings"]["method"]["parts"] == [
        {"name": "horizon", "tokens": 8}
    ]  # 60 / 8 rounded


def test_each_method_is_measured_against_each_other(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    found = compared(tmp_path, "opd,{name: opd, form: dense},fire", seeds=2)
    labels = [(one["label"], one["than"]) for one in found["pairs"]]
    assert labels == [("opd form=dense", "opd"), ("fire", "opd"), ("fire", "opd form=dense")]  # no controls
    last = found["pairs"][-1]
    own, dense = ([run["correct"]["after"] for run in of(found, label)["runs"]] for label in ("fire", "opd form=dense"))
    shares = [one.count("1") / len(one) - other.count("1") / len(other) for one, other in zip(own, dense, strict=True)]
    assert last["mean"] == pytest.approx(sum(shares) / 2)
    assert last["low"] < last["mean"] < last["high"] < 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert f'title="fire less opd form=dense: {difference(last)}">{points(last["mean"])}</td>' in page
    turned = {"mean": -last["mean"], "low": -last["high"], "high": -last["low"]}
    assert f'class="above" title="opd form=dense less fire: {difference(turned)}">' in page
    accuracy = {one["label"]: -one["after"] for one in found["variants"] if not one["control"]}
    for place, label in enumerate(sorted(accuracy, key=accuracy.__getitem__), 1):  # the best first
        assert f'<th scope="row">{place} {label}</th>' in page


def test_without_controls_there_are_none(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    compared(tmp_path, "opd,fire", seeds=1, controls=False)
    assert [control for _, control, _ in runs] == ["none", "none"]


def test_a_method_as_long_as_the_baseline_has_no_length_control(
    tmp_path: Path, runs: list[tuple[str, str, int]]
) -> None:
    compared(tmp_path, "opd,{name: opd, form: dense},alm", seeds=1)
    assert len(runs) == 3


def test_finished_runs_are_kept(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    first = compared(tmp_path, "opd,fire", seeds=1)
    runs.clear()
    again = compared(tmp_path, "opd,fire", seeds=2)
    assert {seed for _, _, seed in runs} == {1}
    assert of(again, "fire")["runs"][0] == of(first, "fire")["runs"][0]


def test_a_misfit_is_a_row_with_its_reason_and_the_others_go_on(
    tmp_path: Path, runs: list[tuple[str, str, int]]
) -> None:
    found = compared(tmp_path, "opd,ropd,scope,{name: fire, parts: [{name: whiten, clip: -1}]},oopd,gndpo", seeds=1)
    assert {name for name, _, _ in runs} == {"opd", "gndpo"}
    refused = {one["label"]: one["refused"] for one in found["variants"] if one["refused"]}
    assert len(refused) == 4
    assert "rollouts_per_prompt" in refused["scope"]
    assert "did you mean 'opd'" in refused["oopd"]
    assert "greater than 0" in refused["fire parts=[whiten clip=-1]"]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "did you mean &#x27;opd&#x27;" in page


def test_a_baseline_that_does_not_fit_ends_it(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    with pytest.raises(ConfigError, match="against which the others are measured"):
        compared(tmp_path, "scope,opd", seeds=1)
    assert not runs


def test_a_run_that_stops_is_a_row_and_its_seed_is_left_out(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    found = compared(tmp_path, "opd,gndpo", seeds=3, controls=False)
    gndpo = of(found, "gndpo")
    assert [run["status"] for run in gndpo["runs"]] == ["finished", "failed", "finished"]
    assert gndpo["runs"][1]["reason"] == "the disk is full"
    assert (gndpo["finished"], len(gndpo["against"]["each"])) == (2, 2)
    assert not found["whole"]
    assert "Not all runs are finished" in (tmp_path / "out" / "compare.html").read_text()


def test_both_files_are_whole_after_every_run(
    tmp_path: Path, runs: list[tuple[str, str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = referee.run
    seen: list[int] = []

    def looking(config: RunConfig) -> str:
        path = tmp_path / "out" / "compare.json"
        if path.exists():
            seen.append(sum(len(one["runs"]) for one in json.loads(path.read_text())["variants"]))
            assert (tmp_path / "out" / "compare.html").read_text().endswith("</html>\n")
        return inner(config)

    monkeypatch.setattr(referee, "run", looking)
    compared(tmp_path, "opd,gndpo", seeds=2, controls=False)
    assert seen == [1, 2, 3]


def test_what_is_kept_of_a_run(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    found = compared(tmp_path, "opd", seeds=1)
    (run,) = of(found, "opd")["runs"]
    assert [at["step"] for at in run["course"]] == [0, 2, 4]
    assert [at["n"] for at in run["course"]] == [40, 20, 40]
    last = run["course"][-1]
    assert (last["seconds"], last["student_tokens"], last["trained_tokens"]) == (8.0, 288.0, 320.0)
    assert (last["teacher_read"], last["teacher_written"]) == (400.0, 80.0)
    assert run["course"][0]["teacher_read"] == 0
    assert len(run["correct"]["after"]) == 40
    assert gain_per_million(of(found, "opd")) == pytest.approx(
        100 * (of(found, "opd")["after"] - 0.5) / 480 * 1e6, rel=1e-9
    )


def test_a_method_that_is_better_is_said_to_be(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    found = compared(tmp_path, "opd,{name: opd, form: dense},alm", seeds=3, controls=False)
    dense, alm = of(found, "opd form=dense"), of(found, "alm")
    assert dense["against"]["low"] > 0.1
    assert alm["against"]["mean"] == 0  # the very same coin
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Beyond noise above opd: opd form=dense." in page
    assert "No clear difference: alm." in page


def test_the_difference_is_paired_by_seed_and_problem() -> None:
    def row(digits: str) -> dict[str, Any]:
        return {"status": "finished", "correct": {"after": digits}}

    rows = {"a": {0: row("1100"), 1: row("0000"), 2: row("1111")}, "b": {0: row("1110"), 1: row("0011")}}
    found = pooled(rows, "a", "b", 0)
    assert found is not None
    assert found["mean"] == pytest.approx((1 + 2) / 8)
    assert found["each"] == [0.25, 0.5]
    assert pooled(rows, "a", "c", 0) is None


def test_a_mean_curve_goes_as_far_as_all_seeds() -> None:
    assert mean_curve([[(0, 0.2), (10, 0.4), (20, 0.5)], [(0, 0.4), (30, 0.6)]]) == [(0, pytest.approx(0.3)), (20, 0.5)]


def test_labels_and_reasons_are_escaped(tmp_path: Path, runs: list[tuple[str, str, int]]) -> None:
    path = tmp_path / "methods.yaml"
    path.write_text('"<script>alert(\'a\')</script>": opd\n"<b>": gndpo\n"<i>": \'<img src=x>\'\n')
    compared(tmp_path, str(path), seeds=2, controls=False)
    page = (tmp_path / "out" / "compare.html").read_text()
    for markup in ("<script", "<b>", "<i>", "<img"):
        assert markup not in page
    assert "&lt;b&gt;" in page
    assert "script-src" not in page


def test_a_misfit_is_told_without_loading_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*args: Any, **settings: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    base = load_config({**SOURCE, "teacher": {"type": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}})
    opd, omniopd = (config_of(base, one, 0, tmp_path) for one in read_variants("opd,{name: omniopd, chunk_tokens: 6}"))
    assert "needs same tokenizer and score" in misfit(opd)
    assert misfit(omniopd) == ""


def test_what_was_begun_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def began(command: list[str], **settings: Any) -> Any:
        commands.append(command)
        return CompletedProcess(
            command, 2, "", "note\nomniopd: the disk is full; mend that, then continue with --resume\n"
        )

    monkeypatch.setattr("omniopd.compare.runs.subprocess.run", began)
    (opd,) = read_variants("opd")
    config = config_of(load_config(SOURCE), opd, 0, tmp_path / "opd" / "seed-0")
    assert run(config) == "the disk is full; mend that, then continue with --resume"
    leave(config.output, [True] * 40, status="interrupted")
    run(config)
    assert [command[-1] for command in commands] == [str(tmp_path / "opd" / "seed-0.yaml"), "--resume"]
    assert load_config(tmp_path / "opd" / "seed-0.yaml") == config
    leave(config.output, [True] * 40)
    assert run(config) == ""
    assert len(commands) == 2


@pytest.mark.slow
def test_two_real_methods_are_compared_by_the_command_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "160")
    small = [
        "train.steps=2",
        "train.prompts_per_step=2",
        "eval.problems=8",
        "eval.every=0",
        f"output={tmp_path / 'out'}",
    ]
    command = [
        "compare",
        "examples/compare/same_tokenizer.yaml",
        "--methods",
        "opd,gndpo",
        "--seeds",
        "1",
        "--workers",
        "2",
    ]
    assert main([*command, *small]) == 0
    out = capsys.readouterr().out
    assert "against opd" in out
    assert "compare.html" in out
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert len(kept) == 2
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    opd, gndpo = (of(found, name)["runs"][0] for name in ("opd", "gndpo"))
    assert opd["correct"]["before"] == gndpo["correct"]["before"]  # the same weights and problems
    assert opd["totals"]["student_tokens"] > 0 and opd["totals"]["teacher_read"] > 0
    first = [json.loads((Path(run["folder"]) / "metrics.jsonl").read_text().splitlines()[1]) for run in (opd, gndpo)]
    assert first[0]["mean_length"] == first[1]["mean_length"]  # of the same prompts and draws
    assert main([*command, *small]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
