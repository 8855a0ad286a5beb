"""GSM8K, from a small folder always and from the whole data where it is at hand."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from evals.tasks.gsm8k import Gsm8k
from omniopd.errors import DataError
from omniopd.registry import TASKS

_SHARED = Path(os.environ.get("OMNIOPD_SHARED", Path(__file__).resolve().parents[3] / "shared"))
_WHOLE = _SHARED / "data" / "gsm8k"
_ROW = {"question": "How many?", "answer": "They have 1,000+80=<<1000+80=1080>>1,080.\n#### 1,080"}


def _folder(path: Path, train: int = 3, test: int = 2, row: dict[str, str] = _ROW) -> Path:
    for name, count in (("train", train), ("test", test)):
        lines = [json.dumps({**row, "question": f"{name} {n}: {row['question']}"}) for n in range(count)]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    return path


def test_a_folder(tmp_path: Path) -> None:
    task = TASKS.get("gsm8k")(Gsm8k.Config(path=str(_folder(tmp_path)), train_size=2))
    assert [prompt.id for prompt in task.train] == ["gsm8k/train/0", "gsm8k/train/1"]
    assert [prompt.id for prompt in task.heldout] == ["gsm8k/test/0", "gsm8k/test/1"]
    prompt = task.heldout[0]
    assert prompt.reference == "1080" and prompt.extras["solution"] == _ROW["answer"]
    assert [message.role for message in prompt.messages] == ["user"]
    assert task.check(prompt, _ROW["answer"]) and task.check(prompt, "the answer is $1080.")
    assert not task.check(prompt, "#### 1,081")


def test_a_system_message(tmp_path: Path) -> None:
    task = Gsm8k(Gsm8k.Config(path=str(_folder(tmp_path)), system="End with #### N."))
    assert [message.role for message in task.train[0].messages] == ["system", "user"]


def test_a_single_file_keeps_a_tenth_apart(tmp_path: Path) -> None:
    path = _folder(tmp_path, train=30) / "train.jsonl"
    task = Gsm8k(Gsm8k.Config(path=str(path)))
    assert len(task.train) == 27 and len(task.heldout) == 3
    assert not {p.messages for p in task.train} & {p.messages for p in task.heldout}


def test_a_solution_without_its_mark_names_the_line(tmp_path: Path) -> None:
    folder = _folder(tmp_path, row={**_ROW, "answer": "1080"})
    with pytest.raises(DataError, match=r"train.jsonl, line 1: column 'answer' does not end in '#### NUMBER'"):
        Gsm8k(Gsm8k.Config(path=str(folder)))


def test_a_folder_without_the_test_file(tmp_path: Path) -> None:
    (_folder(tmp_path) / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test.jsonl: no such file"):
        Gsm8k(Gsm8k.Config(path=str(tmp_path)))


@pytest.mark.skipif(not _WHOLE.is_dir(), reason=f"no {_WHOLE}; set OMNIOPD_SHARED")
def test_every_published_solution_is_right_and_every_changed_one_is_wrong() -> None:
    task = Gsm8k(Gsm8k.Config(path=str(_WHOLE)))
    assert (len(task.train), len(task.heldout)) == (7473, 1319)
    for prompt in [*task.train, *task.heldout]:
        solution = prompt.extras["solution"]
        number = int(prompt.reference or "")
        body, mark, _ = solution.rpartition("####")
        assert task.check(prompt, solution), solution
        assert task.check(prompt, f"{body}The answer is {number}."), solution
        for wrong in (number + 1, -number if number else 1, number * 10 + 1):
            assert not task.check(prompt, f"{body}{mark} {wrong:,}"), (wrong, solution)


@pytest.mark.skipif(not _WHOLE.is_dir(), reason=f"no {_WHOLE}; set OMNIOPD_SHARED")
def test_the_published_splits_share_no_question() -> None:
    task = Gsm8k(Gsm8k.Config(path=str(_WHOLE)))
    spaces = re.compile(r"\s+")
    train = {spaces.sub(" ", prompt.messages[-1].content) for prompt in task.train}
    assert not [p.id for p in task.heldout if spaces.sub(" ", p.messages[-1].content) in train]
