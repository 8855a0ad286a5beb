"""Ends a run that learns nothing: whose teacher is silent, or speaks about too few of the student's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omniopd.errors import ConfigError, OmniError, TeacherError
from omniopd.folder import Record
from omniopd.summary import reasons


class Watch:
    """Looks at every step of a run in `place`; `patience` steps in a row without a signal, or with too thin a one, end it."""

    def __init__(self, patience: int, min_coverage: float, place: Path) -> None:
        self.patience, self.min_coverage, self.place = patience, min_coverage, place
        self._silent = self._thin = 0

    def check(self, row: Mapping[str, Any], record: Record) -> None:
        """Look at a step's row.

        Raises:
            ConfigError: the method finds nothing to ask about.
            TeacherError: it was one step too many.
        """
        self._silent = self._silent + 1 if row["coverage"] == 0 and not row.get("branch_tokens") else 0
        self._thin = self._thin + 1 if row["coverage"] < self.min_coverage else 0
        if self._silent >= self.patience:
            raise self._silence(record)
        if self._thin >= self.patience:
            raise TeacherError(
                f"method.min_coverage: the teacher spoke about {row['coverage']:.0%} of the tokens, less than "
                f"{self.min_coverage:.0%}, for several steps ({reasons(record)}); lower it if that is expected; "
                f"{self._kept(record)}"
            )

    def _silence(self, record: Record) -> OmniError:
        if not record.drops and not record.rejects:
            return ConfigError(
                f"method: {self._silent} steps in a row had no response that a chunk fits into; lower its size; "
                f"{self._kept(record)}"
            )
        return TeacherError(
            f"teacher: {self._silent} steps in a row gave no signal ({reasons(record)}); {self._kept(record)}"
        )

    def _kept(self, record: Record) -> str:
        return f"the checkpoint of step {record.step} is kept in {self.place}"


def unheard(teachers: Iterable[str], record: Record) -> list[str]:
    """Of several teachers those that have had no share so far (trap S8)."""
    return [name for name in teachers if not record.teachers.get(name, {}).get("tokens")]
