"""Rows of data from local JSONL and Parquet files and from data sets on the hub, each knowing where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniopd.errors import DataError
from omniopd.registry import nearest

_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
_SUFFIXES = (".jsonl", ".parquet")
_KINDS: dict[type, str] = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it stands ("train.jsonl, line 17"), so that a complaint can say so."""

    columns: Mapping[str, Any]
    where: str

    def cell(self, column: str, mend: str = "") -> Any:
        """The value of a column; `mend` ends the complaint if there is none.

        Raises:
            DataError: the row lacks the column.
        """
        if column not in self.columns:
            known = nearest(column, [str(key) for key in self.columns])
            raise DataError(f"{self.where}: no column '{column}'; {known}{mend}")
        return self.columns[column]

    def text(self, column: str, mend: str = "") -> str:
        """The value of a column that must hold text; `mend` ends the complaint if it doesn't.

        Raises:
            DataError: the row lacks the column, or it holds something else, or nothing but white space.
        """
        value = self.cell(column)
        if not isinstance(value, str):
            raise self.wrong(column, f"holds {kind_of(value)}, not text{mend}")
        if not value.strip():
            raise self.wrong(column, "is empty; fill it in or delete the row")
        return value

    def wrong(self, column: str, complaint: str) -> DataError:
        """The error to raise about the value of a column."""
        return DataError(f"{self.where}: column '{column}' {complaint}")


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return "nothing" if value is None else _KINDS.get(type(value), "an object")


def load(path: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """The rows of a local file, or else of a data set on the hub (`subset` and `split` are for the hub only).

    Raises:
        DataError: the file or data set is missing, malformed or empty.
    """
    place = Path(path).expanduser()
    if place.exists() or not _HUB_ID.fullmatch(path) or place.suffix in _SUFFIXES:
        rows = _load_file(place)
    else:
        rows = _load_hub(path, subset, split)
    if not rows:
        raise DataError(f"{path}: holds no rows; give a file with at least one")
    return rows


def _load_file(path: Path) -> list[Row]:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a .jsonl or .parquet file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path (relative paths start at {Path.cwd()})")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: unknown kind of file; give a .jsonl or .parquet file")
    try:
        return _parquet(path) if path.suffix == ".parquet" else list(_jsonl(path))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or _line(error)}); check its permissions") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                columns = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
            except (ValueError, RecursionError) as error:  # beside bad syntax: numbers of 5,000 digits, endless nesting
                reason = (
                    f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else _line(error)
                )
                raise DataError(f"{where}: not JSON ({reason}); mend or delete the line") from error
            if not line:
                continue
            if not isinstance(columns, dict):
                raise DataError(f"{where}: holds {kind_of(columns)}, not an object; write {{...}} with a key a column")
            yield Row(columns, where)


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({_line(error)}); write it again") from error
    return [Row(columns, f"{path}, row {number}") for number, columns in enumerate(rows, start=1)]


def _load_hub(path: str, subset: str | None, split: str) -> list[Row]:
    name = f"{path} (split {split})"
    try:
        from datasets import load_dataset

        rows = load_dataset(path, subset, split=split)
    except Exception as error:  # the hub's client fails in a dozen ways: network, name, access, script, split
        raise DataError(
            f"{name}: no such local file, and the hub doesn't give it ({type(error).__name__}: {_line(error)}); "
            "check the name and the network, or give the path of a local .jsonl or .parquet file"
        ) from error
    return [Row(columns, f"{name}, row {number}") for number, columns in enumerate(rows, start=1)]


def _line(error: BaseException) -> str:
    """The error's message as one line of bearable length."""
    line = " ".join(str(error).split())
    return line if len(line) <= 160 else line[:157] + "..."
