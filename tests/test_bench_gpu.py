"""The benchmark on a GPU, at a size that a CPU runs: both sides train, and floors are what they say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "examples" / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    pytest.importorskip("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("costs", "floors", "gpu", "compare")})


@pytest.fixture(scope="module")
def found(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes for the tiny shape."""
    out = tmp_path_factory.mktemp("bench") / "new" / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        flags = "--shape tiny --device cpu --dtype float32 --prompts 4 --new-tokens 6 --steps 2 --json"
        patch.setattr("sys.argv", ["gpu.py", *flags.split(), str(out)])
        patch.setenv("ACCELERATE_USE_CPU", "true")  # set by the command; taken back here
        bench.gpu.main()
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_stage_of_both_sides_has_its_rate_and_floor(found: dict[str, Any]) -> None:
    stages = {side: list(each["stages"]) for side, each in found["sides"].items()}
    assert stages == {
        "omniopd": ["rollout", "evidence", "update", "evidence + update", "step"],
        "TRL": ["rollout", "evidence + update", "step"],
    }
    for each in found["sides"].values():
        for stage in each["stages"].values():
            assert len(stage["seconds_all"]) == 3  # the warm-up too
            assert stage["tokens_per_second"] == pytest.approx(4 * 6 / stage["seconds"])
            assert stage["floor_share"] == pytest.approx(stage["floor_seconds"] / stage["seconds"])
    assert {"device", "cpu", "threads", "torch", "trl"} <= set(found["machine"])
    assert found["shapes"] == ["tiny student", "tiny teacher"]


def test_the_weights_are_of_the_shape_and_every_row_has_its_full_length(bench: SimpleNamespace, tmp_path: Path) -> None:
    from omniopd.run import Run

    setting = bench.gpu.Setting(device="cpu")
    paths = [bench.gpu.save_model(shape, tmp_path / shape.name, setting) for shape in bench.gpu.SHAPES["tiny"]]
    options = SimpleNamespace(dtype="float32", new_tokens=5, device="cpu", prompts=3)
    run = Run(bench.gpu.config_of(paths, options, tmp_path / "run"))
    shape = bench.gpu.SHAPES["tiny"][0]
    norms = sum(p.numel() for name, p in run.policy.model.named_parameters() if "norm" in name)
    assert run.policy.parameters == shape.parameters + norms
    run.policy.end_ids = frozenset(range(shape.vocab))  # a student that ends at once
    assert {len(rollout) for rollout in run.sampler.sample(run.prompts(1), 1)} == {1}
    written: list[int] = []
    sample = run.sampler.sample

    def noted(*args: Any) -> Any:
        rollouts = sample(*args)
        written.extend(len(rollout) for rollout in rollouts)
        return rollouts

    run.sampler.sample = noted  # type: ignore[method-assign]
    stages = bench.gpu.ours(run, 2, "cpu")
    assert written == [5] * 6
    assert {name: len(seconds) for name, seconds in stages.items()} == {"rollout": 2, "evidence": 2, "update": 2}
    assert run.trainer.updates == 2


def test_the_first_step_is_warm_up_and_the_others_medians_count(bench: SimpleNamespace) -> None:
    stages = {"rollout": [90.0, 1.0, 2.0, 6.0], "evidence": [90.0, 1.0, 1.0, 1.0], "update": [90.0, 3.0, 5.0, 4.0]}
    least = {"rollout": 1.0, "evidence": 0.5, "update": 2.0}
    found = bench.gpu.summary(stages, least, tokens=100)
    assert {name: stage["seconds"] for name, stage in found.items()} == {
        "rollout": 2.0,
        "evidence": 1.0,
        "update": 4.0,
        "evidence + update": 5.0,
        "step": 8.0,
    }
    assert (found["step"]["tokens_per_second"], found["step"]["floor_share"]) == (12.5, 3.5 / 8)


def test_the_rollouts_floor_is_a_sum_over_its_token_steps(bench: SimpleNamespace) -> None:
    shapes = bench.gpu.SHAPES["tiny"]
    student, teacher = shapes
    rows, prompt, response = 3, 7, 5
    least = bench.floors.floors(shapes, rows, prompt, response, 2, {"bytes_per_second": 10.0, "flops_per_second": 1e30})
    matrices = 2 * (student.body + student.head)
    reads = [matrices + student.kv_bytes(rows * (prompt + step), 2) for step in range(1, response + 1)]
    assert least["rollout"] == pytest.approx(sum(reads) / 10)
    least = bench.floors.floors(shapes, rows, prompt, response, 2, {"bytes_per_second": 1e30, "flops_per_second": 10.0})
    seen = range(1, prompt + response + 1)
    hidden = rows * sum(teacher.forward_flops(1, context, 0) for context in seen)
    assert least["evidence"] == pytest.approx(hidden / 10)
    own = rows * sum(student.forward_flops(1, context, context > prompt) for context in seen)
    assert least["update"] == pytest.approx((3 * own + rows * response * 2 * teacher.head) / 10)


def test_rates_are_of_the_work_that_is_timed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.floors, "_fastest", lambda work, device: work() is None or 0.5)
    found = bench.floors.rates(bench.gpu.Setting(dtype="bfloat16"))
    assert found == {"bytes_per_second": 2 * 2**24 * 2 / 0.5, "flops_per_second": 2 * 1024**3 / 0.5}


def test_the_other_side_is_cut_into_equal_micro_batches(bench: SimpleNamespace) -> None:
    assert bench.gpu.micro_batches(64, 544, 16_384) == 4  # 3 do not divide 64
    assert bench.gpu.micro_batches(4, 10, 40) == 1
    assert bench.gpu.micro_batches(4, 100, 40) == 4


def test_tables_and_comparison(bench: SimpleNamespace, found: dict[str, Any]) -> None:
    table = bench.gpu.table(found)
    assert table.count("| omniopd, ") == 5 and table.count("| TRL, ") == 3
    earlier = json.loads(json.dumps(found))
    earlier["sides"]["TRL"]["stages"]["step"]["tokens_per_second"] *= 2
    del earlier["sides"]["omniopd"]["stages"]["evidence"]
    text = bench.compare.comparison(earlier, found, bench.gpu.figures)
    line = next(line for line in text.splitlines() if "TRL, step" in line)
    assert line.split("|")[4].strip() == "0.50"
    assert "In one of the two runs only: 1 " in text
