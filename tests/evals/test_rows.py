"""Loading rows: what is wrong with a file is said in one line that names the place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from evals.data import load
from omniopd.errors import DataError


def _fails(path: Path | str, **where: str) -> str:
    with pytest.raises(DataError) as caught:
        load(str(path), **where)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n\r\n{"x": "\xc3\xa9"}')
    rows = load(str(path))
    assert [row.columns["x"] for row in rows] == [1, "é"]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"x": 1}, {"x": 2}]), path)
    rows = load(str(path))
    assert [row.columns["x"] for row in rows] == [1, 2] and rows[1].where == f"{path}, row 2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"x": 1}\n{"x": \n', "line 2: not JSON (Expecting value, column"),
        (b'{"x": 1}\n\n[1]\n', "line 3: holds a list, not an object"),
        (b"3\n", "line 1: holds a number, not an object"),
        (b'{"x": 1}\n{"x": "\xff"}\n', "line 2: not UTF-8 (byte 8); save"),
        (b"1" * 5000 + b"\n", "line 1: not JSON (Exceeds the limit"),
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
    ],
)
def test_malformed_jsonl(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    message = _fails(path)
    assert message.startswith(str(path)) and said in message


def test_malformed_and_empty_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    assert f"{path}: not a Parquet file" in _fails(path)
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([], pyarrow.int64())}), path)
    assert "holds no rows" in _fails(path)


def test_missing_and_unfit_paths(tmp_path: Path) -> None:
    assert "no such file; check the path" in _fails(tmp_path / "a.jsonl")
    assert "no such file" in _fails("data/a.jsonl")
    assert "is a folder; name a .jsonl or .parquet file in it" in _fails(tmp_path)
    other = tmp_path / "a.csv"
    other.write_text("x\n1\n")
    assert "unknown kind of file; give a .jsonl or .parquet file" in _fails(other)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, int]]:
        asked.append((args, kwargs))
        return [{"x": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = load("owner/name", "main", "test")
    assert asked == [(("owner/name", "main"), {"split": "test"})]
    assert row.where == "owner/name (split test), row 1"


def test_a_hub_that_can_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto the hub " + "x" * 500)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = _fails("owner/name")
    assert message.startswith("owner/name (split train): no such local file, and the hub doesn't give it (Connection")
    assert "no route to the hub" in message and len(message) < 450
    assert message.endswith("give the path of a local .jsonl or .parquet file")


def test_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"promt": "a", "n": 1, "none": None, "blank": " ", "yes": True}))
    (row,) = load(str(path))
    assert row.text("promt") == "a"
    for column, said in [
        ("prompt", "line 1: no column 'prompt'; did you mean 'promt'? known: blank, n, none, promt, yes"),
        ("n", "column 'n' holds a number, not text"),
        ("none", "column 'none' holds nothing, not text"),
        ("yes", "holds true or false, not text"),
        ("blank", "column 'blank' is empty"),
    ]:
        with pytest.raises(DataError) as caught:
            row.text(column)
        assert said in str(caught.value)
