"""One exception tree. The command line prints any of these as one line and exits with its code, without a traceback."""

from __future__ import annotations


class OmniError(Exception):
    """A mistake or condition that the user can mend; the message names the field or file and the mend."""

    exit_code = 2
    said: bool | None = None  # whether another process of the run says it; None: nobody has settled that


class ConfigError(OmniError, ValueError):
    """The configuration is wrong; the message opens with the dotted field."""


class DataError(OmniError, ValueError):
    """A data file is missing, malformed or empty; the message names the file and, where it can, the line."""


class StudentError(OmniError, RuntimeError):
    """The student's model can't be loaded or can't do what the config asks."""


class TeacherError(OmniError, RuntimeError):
    """The teacher can't be reached, refuses the key or the request, or stays silent."""


class StoreError(OmniError, RuntimeError):
    """The answer store can't be read or written, or lacks an answer that a replay needs."""


class RunError(OmniError, RuntimeError):
    """The run folder can't be used (another run's, no checkpoint, full disk), or the run had to stop."""


class NonFiniteLoss(RunError, ArithmeticError):
    """The loss or its gradient is NaN or infinite; the step was not applied."""


class BudgetSpent(RunError):
    """The money that the run may spend is spent; raising `budget_usd` and resuming goes on where it stopped."""

    exit_code = 3
