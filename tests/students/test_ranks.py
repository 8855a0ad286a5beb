"""Two processes learn what one learns, whole weights (DDP) and sharded ones (FSDP2): real processes, gloo, a time limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from ranked import SCENARIOS

from omniopd.errors import ConfigError
from omniopd.types import Distributions
from omniopd.vocabulary import Vocabulary
from students.parcels import Parcels
from students.ranks import Ranks

SHARDED = [name for name in SCENARIOS if name != "lora"]
Results = Callable[[str], list[dict[str, Any]]]


def results_of(folder: Path, place: Path, names: list[str], **environment: str) -> Results:
    script = str(Path(__file__).with_name("ranked.py"))
    for code, _, errors in processes.finish(
        processes.start([script, str(folder), str(place), *names], **environment), timeout=150
    ):
        assert code == 0, errors
    return lambda name: [torch.load(place / f"{name}-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def whole_weights(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(llama_folder, tmp_path_factory.mktemp("ddp"), list(SCENARIOS))


@pytest.fixture(scope="module")
def sharded_weights(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(llama_folder, tmp_path_factory.mktemp("fsdp"), SHARDED, **processes.FSDP2)


def check(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Both processes found what one finds alone."""
    for one in found:
        assert one.keys() == expected.keys()
        assert one.get("texts") == expected.get("texts")
        for name in {"gradient", "weights"} & expected.keys():
            torch.testing.assert_close(one[name], expected[name], atol=1e-5, rtol=1e-5)
        for mine, alone in zip(one.get("metrics", []), expected.get("metrics", []), strict=True):
            assert mine == pytest.approx(alone, abs=1e-5, rel=1e-5)
    assert float(expected["weights"].abs().sum()) > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_s3_o12_two_processes_learn_what_one_learns(name: str, llama_folder: Path, whole_weights: Results) -> None:
    check(whole_weights(name), SCENARIOS[name](llama_folder, Ranks()))


@pytest.mark.parametrize("name", SHARDED)
def test_s3_o14_two_processes_with_shards_learn_what_one_learns(
    name: str, llama_folder: Path, sharded_weights: Results
) -> None:
    check(sharded_weights(name), SCENARIOS[name](llama_folder, Ranks()))


def test_vocabularies_travel_once_and_distributions_not_at_all() -> None:
    here, there = Parcels(), Parcels()
    vocabulary = Vocabulary(tiny.byte_level())
    distributions = Distributions(torch.ones(7, 3), torch.nn.Linear(3, 5))
    first = here.pack([vocabulary, distributions])
    again = here.pack({"the same": vocabulary, "numbers": (1, torch.ones(2))})
    assert len(again) < 1000 < len(first)
    known, shape = there.open(first)
    assert known.digest == vocabulary.digest and known.bytes_of == vocabulary.bytes_of
    assert shape.hidden.shape == (7, 3)
    with pytest.raises(RuntimeError, match="another process"):
        shape.head(shape.hidden)
    opened = there.open(again)
    assert opened["the same"] is known and opened["numbers"][1].tolist() == [1, 1]


def test_one_process_is_all_of_them() -> None:
    ranks = Ranks()
    with ranks.alike():
        assert ranks.main and not ranks.sharded
        assert ranks.mine("abc") == [(0, "a"), (1, "b"), (2, "c")]
        assert ranks.all("x") == ["x"] and ranks.most(3) == 3 and ranks.from_main(lambda: 4) == 4


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        Ranks()


FAILS = """
import sys
from omniopd.errors import BudgetSpent
from students.ranks import Ranks
ranks = Ranks(60)
try:
    with ranks.alike():
        ranks.all(None)
        if ranks.index == int(sys.argv[1]):
            raise BudgetSpent("all of it")
        ranks.all(None)
except BudgetSpent as error:
    print(error, error.said)
"""


@pytest.mark.parametrize("first", [0, 1])
def test_s3_an_error_reaches_who_waits_at_once_and_one_says_it(first: int) -> None:
    ends = processes.finish(
        processes.start(["-c", FAILS, str(first)]), timeout=45
    )  # less than the first one's patience
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(output for _, output, _ in ends) == ["all of it False\n", "all of it True\n"]
