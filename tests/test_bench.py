"""The benchmark of the losses: its rows agree, its figures are what they say, its JSON and tables are whole."""

from __future__ import annotations

import importlib
import json
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
        names = ("rows", "measuring", "page", "plot", "loss", "growth")
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
    line = next(line for line in bench.page.comparison(before, found).splitlines() if "reverse KL: dense" in line)
    assert line.split("|")[4].strip() == "0.50"


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
