"""The benchmarks: their rows agree, their figures are what they say, their JSON, tables and pages are whole."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "examples" / "bench"
ROW = {"name", "peak_bytes", "memory_ratio", "seconds", "seconds_all", "time_ratio"}
ROW |= {"loss", "loss_difference", "gradient_difference", "why_not"}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of examples/bench, which import one another as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        names = ("rows", "measuring", "compare", "page", "throughput", "plot", "loss", "growth", "quickstart_time")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def found(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on tiny shapes writes. No processes of their own for the peaks, which are made up."""
    out = tmp_path_factory.mktemp("bench") / "loss.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.loss, "peak", made_up(bench))
        flags = ["--shape", "50,16,300", "--repeats", "2", "--threads", "1", "--json", str(out)]
        patch.setattr("sys.argv", ["loss.py", *flags])
        bench.loss.main()
    return json.loads(out.read_text(encoding="utf-8"))


def made_up(bench: SimpleNamespace) -> Callable[..., int]:
    """A peak that needs no measuring, of a row that runs."""

    def peak(case: str, row: str, shape: Any, setting: Any) -> int:
        bench.measuring.once(bench.rows.CASES[case][row].loss, setting.inputs(shape))
        return 2000 if row == "dense" else 100

    return peak


def test_every_row_that_runs_has_the_loss_and_gradient_of_dense(found: dict[str, Any]) -> None:
    for case in found["cases"]:
        rows = {row["name"]: row for row in case["rows"]}
        assert rows["omniopd"]["why_not"] is None
        for row in rows.values():
            if row["why_not"] is None:
                assert row["loss_difference"] < 1e-5 * max(1, abs(row["loss"])), row["name"]
                assert row["gradient_difference"] < 1e-5, row["name"]


def test_ours_is_cut_into_several_slices_with_a_ragged_last_one(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.rows, "slice_size", lambda vocabulary: 7)
    inputs = bench.measuring.Setting().inputs(bench.rows.Shape(50, 16, 300))
    for rows in bench.rows.CASES.values():
        dense, ours = (bench.measuring.once(rows[name].loss, inputs) for name in ("dense", "omniopd"))
        for own, theirs in ((ours.loss, dense.loss), (ours.hidden, dense.hidden), (ours.weight, dense.weight)):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-7)


def test_the_json_is_whole(found: dict[str, Any]) -> None:
    assert {"device", "cpu", "cores", "threads", "torch", "trl", "liger-kernel"} <= set(found["machine"])
    assert found["machine"]["threads"] == 1
    assert [case["name"] for case in found["cases"]] == ["reverse KL", "several terms"]
    for case in found["cases"]:
        for row in case["rows"]:
            if row["why_not"] is None:
                assert set(row) == ROW
                assert row["seconds"] > 0 and len(row["seconds_all"]) == 2
    dense = found["cases"][0]["rows"][0]
    assert (dense["name"], dense["memory_ratio"], dense["time_ratio"]) == ("dense", 1.0, 1.0)
    assert found["cases"][0]["rows"][1]["memory_ratio"] == 0.05


def test_another_library_that_cannot_run_is_a_row_with_its_reason(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(inputs: object) -> torch.Tensor:
        raise ModuleNotFoundError("No module named 'elsewhere'")

    monkeypatch.setattr(bench.loss, "peak", made_up(bench))
    rows = {**bench.rows.CASES["reverse KL"], "absent": bench.rows.Row(absent, foreign=True)}
    monkeypatch.setitem(bench.rows.CASES, "reverse KL", rows)
    shape, setting = bench.rows.Shape(8, 4, 20), bench.measuring.Setting()
    result = bench.loss.measure("reverse KL", {name: rows[name] for name in ("dense", "absent")}, shape, setting, 1)
    assert result[1]["why_not"] == "does not run on this device (ModuleNotFoundError: No module named 'elsewhere')"
    rows["absent"] = bench.rows.Row(absent)
    with pytest.raises(ModuleNotFoundError):  # our own may not fail quietly
        bench.loss.measure("reverse KL", {"absent": rows["absent"]}, shape, setting, 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks on a CPU are read from Linux' /proc")
def test_peak_memory_is_that_of_the_pass(bench: SimpleNamespace) -> None:
    shape = bench.rows.Shape(256, 8, 100_000)
    logits = shape.tokens * shape.vocab * 4
    setting = bench.measuring.Setting(threads=1)
    dense, ours = (bench.measuring.peak("reverse KL", name, shape, setting) for name in ("dense", "omniopd"))
    assert 4 * logits < dense < 7 * logits
    assert ours < dense


def test_a_row_that_would_not_fit_is_left_out(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.loss, "memory", lambda name: 1e9)
    row = bench.rows.Row(bench.rows.dense, fulls=6)
    result = bench.loss._peak(
        "reverse KL", "dense", row, bench.rows.Shape(4096, 1024, 151936), bench.measuring.Setting()
    )
    assert result == {"peak_bytes": None, "why_not": "needs about 17 GB, 1 GB are free"}


def test_tables_and_comparison_show_every_row(bench: SimpleNamespace, found: dict[str, Any]) -> None:
    table = bench.page.tables(found)
    assert table.count("| dense |") == 2 and table.count("| omniopd |") == 2
    before = json.loads(json.dumps(found))
    before["cases"][0]["rows"][0]["seconds"] = 2 * found["cases"][0]["rows"][0]["seconds"]
    text = bench.compare.comparison(before, found, bench.loss.figures)
    line = next(line for line in text.splitlines() if "reverse KL: dense" in line and ", s |" in line)
    assert line.split("|")[4].strip() == "0.50"
    assert "only:" not in text
    before["cases"][0]["shape"]["tokens"] += 1
    text = bench.compare.comparison(before, found, bench.loss.figures)
    assert "reverse KL: dense" not in text and "several terms: dense" in text
    running = sum(row["why_not"] is None for row in found["cases"][0]["rows"])
    assert f"In one of the two runs only: {2 * 2 * running} figures" in text


def test_what_is_asked_for_is_checked_before_anything_is_measured(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    bench.compare.add_options(parser)
    assert parser.parse_args(["--json", str(tmp_path / "new" / "a.json")]).json.parent.is_dir()
    with pytest.raises(SystemExit):
        parser.parse_args(["--compare", str(tmp_path / "absent.json")])
    assert "is no JSON of an earlier run" in capsys.readouterr().err


def test_growth_fits_slopes_and_draws_them(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def point(case: str, row: str, shape: Any, setting: Any, repeats: int) -> dict[str, Any]:
        peak = 4 * shape.vocab * (shape.tokens if row == "dense" else 100)
        return {**asdict(shape), "seconds": 1e-9 * shape.tokens**2 * shape.vocab, "peak_bytes": peak}

    monkeypatch.setattr(bench.growth, "point", point)
    monkeypatch.setattr("sys.argv", ["growth.py", "--out", str(tmp_path)])
    bench.growth.main()
    result = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert result["tokens"]["slopes"]["dense"] == {"seconds": pytest.approx(2), "peak_bytes": pytest.approx(1)}
    assert result["tokens"]["slopes"]["omniopd"]["peak_bytes"] == pytest.approx(0)
    assert result["vocabulary"]["slopes"]["omniopd"] == {"seconds": pytest.approx(1), "peak_bytes": pytest.approx(1)}
    assert [len(result["tokens"]["points"][row]) for row in ("omniopd", "dense")] == [6, 5]  # dense has no room for 16k
    assert "dense, slope 2.00" in (tmp_path / "growth-time-tokens.svg").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"growth-{quantity}-{axis}.svg" for quantity in ("time", "memory") for axis in ("tokens", "vocabulary")
    }


def test_the_page_says_whether_what_is_asked_for_holds(bench: SimpleNamespace, found: dict[str, Any]) -> None:
    slow = json.loads(json.dumps(found))
    for run, ratio in ((found, 1.1), (slow, 1.3)):
        run["cases"][0]["rows"][1] |= {"time_ratio": ratio, "memory_ratio": 0.1}
    text = bench.page.page({"loss.json": found, "loss-slow.json": slow}, None)
    assert "time 1.10: holds." in text and "time 1.30: **does not hold**." in text
    assert "No GPU was at hand" in text and "[loss-slow.json](bench/loss-slow.json)" in text


@pytest.fixture(scope="module")
def quickstart(bench: SimpleNamespace) -> dict[str, Any]:
    """What the quickstart's benchmark writes, from runs that are made up: `after` takes half as long, turn for turn."""
    turns: list[str] = []

    def run(tree: Path, overrides: list[str], output: Path) -> dict[str, float]:
        turns.append(tree.name)
        seconds = len(turns) * (2.0 if tree.name == "old" else 1.0)
        return {"seconds": seconds, "cpu_seconds": seconds, "training_seconds": seconds / 2, "accuracy": 0.5}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.quickstart_time, "run", run)
        trees = {"before": Path("old"), "after": Path("new")}
        runs = bench.quickstart_time.bench(trees, [], 3, Path("runs"))
    assert turns == ["old", "new", "new", "old", "old", "new"]
    facts = bench.measuring.machine(bench.measuring.Setting())
    commits = {"before": "1234567", "after": "89abcde"}
    summary = bench.quickstart_time.summary(runs)
    return {"machine": facts, "commits": commits, "overrides": ["train.steps=3"], "rounds": 3, **summary}


def test_the_quickstarts_ratio_is_taken_within_a_round(bench: SimpleNamespace, quickstart: dict[str, Any]) -> None:
    assert [run["seconds"] for run in quickstart["runs"]["before"]] == [2, 8, 10]
    assert [run["seconds"] for run in quickstart["runs"]["after"]] == [2, 3, 6]
    assert quickstart["medians"]["before"]["seconds"] == 8
    assert quickstart["ratios"]["seconds"] == pytest.approx(6 / 10)  # of 2/2, 3/8 and 6/10
    table = bench.quickstart_time.table(quickstart)
    assert "| before (1234567) | 8 |" in table and "| after / before | 0.60 |" in table
    alone = bench.quickstart_time.summary({"after": quickstart["runs"]["after"]})
    assert alone["ratios"] == {} and "after / before" not in bench.quickstart_time.table(quickstart | alone)
    assert "quickstart train.steps=3: after, wall, s" in bench.quickstart_time.figures(quickstart)


@pytest.mark.skipif(not (BENCH.parents[1] / ".git").exists(), reason="no repository")
def test_an_earlier_tree_is_unpacked_and_an_unknown_one_is_refused(bench: SimpleNamespace, tmp_path: Path) -> None:
    tree = bench.quickstart_time.unpack("HEAD", tmp_path / "tree")
    assert (tree / "examples" / "quickstart.py").is_file()
    with pytest.raises(SystemExit, match="--before: .*name a commit"):
        bench.quickstart_time.unpack("no-such-commit", tmp_path / "other")


def test_a_tree_that_would_import_anothers_packages_is_refused(bench: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="would import"):
        bench.quickstart_time.run(tmp_path, [], tmp_path / "out")


def test_the_pages_are_what_their_script_writes(bench: SimpleNamespace, quickstart: dict[str, Any]) -> None:
    text = bench.throughput.page({"quickstart_time": quickstart})
    assert "Not measured yet: `make bench-gpu`." in text and "| after / before | 0.60 |" in text
    folder = bench.page.DOCS / "bench"
    made = bench.throughput.page(bench.throughput.load(folder))
    written = (bench.page.DOCS / "throughput.md").read_text(encoding="utf-8")
    assert made == written, "run: python examples/bench/page.py"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_runs_every_benchmark_or_the_one_that_flags_are_given_for() -> None:
    def scripts(*words: str) -> list[str]:
        command = ["make", "--dry-run", "--directory", str(BENCH.parents[1]), *words]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.findall(r"examples/bench/(.*)", said)

    written = [f"{name}.py --json docs/results/bench/{name}.json" for name in ("loss", "steps", "timeline")]
    written.append("quickstart_time.py --before HEAD --json docs/results/bench/quickstart_time.json")
    assert [" ".join(line.split()) for line in scripts("bench", "BEFORE=HEAD")] == [*written, "page.py"]
    assert [" ".join(line.split()) for line in scripts("bench", "BENCH=--shape 1,2,3")] == [
        "loss.py --shape 1,2,3",
        "page.py",
    ]
    assert scripts("bench-gpu", "BENCH=--shape tiny") == ["gpu.py  --shape tiny "]
    compared = scripts("bench-loss", "COMPARE=docs/results/bench")
    assert compared[0].endswith("--json docs/results/bench/loss.json --compare docs/results/bench/loss.json")
