"""Symbolic equality of two expressions by math-verify, in a process of its own.

math-verify bounds its time by SIGALRM, which only the main thread may use and which would disturb the timers of
whoever calls us; without the bound an answer such as 9^9^9^9 runs for ever. A helper process can be stopped from any
thread. It runs `symbolic_worker.py`, starts at the first expression that needs it, and ends with us.
"""

from __future__ import annotations

import atexit
import json
import logging
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from omniopd.errors import RunError

_WORKER = Path(__file__).with_name("symbolic_worker.py")
_START_SECONDS = 120.0
_log = logging.getLogger(__name__)


class Verifier:
    """The helper process: one question at a time, from any thread, each answered or given up after `seconds`."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, reference: str, answer: str) -> bool | None:
        """Whether the two LaTeX (or plain) expressions are equal; None if that can't be decided in time.

        Raises:
            RunError: the helper process can't be started.
        """
        with self._lock:
            process = self._running()
            reply = _ask(process, json.dumps([reference, answer]), self.seconds)
            if reply is None:
                self._stop()
                _log.warning(
                    "answer %r: not decided in %g s; wrong when measured, no verdict to learn from",
                    answer,
                    self.seconds,
                )
                return None
            return reply == "true"

    def close(self) -> None:
        """End the helper process; the next question starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -P keeps our folder off the helper's import path, where our file names could hide other packages
        command = [sys.executable, "-P", str(_WORKER)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True, encoding="utf-8")
        if _ask(self._process, '["1", "1"]', _START_SECONDS) != "true":
            self._stop()
            raise RunError("answer checking: math-verify doesn't start; try: python -c 'import math_verify'")
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # unsent words for a process that is gone
                    pipe.close()


def _ask(process: subprocess.Popen[str], line: str, seconds: float) -> str | None:
    """Send one line and wait for one. A process that is too slow is killed, which ends the wait: None."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip() or None
    except OSError:
        return None
    finally:
        timer.cancel()


_VERIFIER = Verifier()
atexit.register(_VERIFIER.close)


@lru_cache(maxsize=4096)  # a batch repeats its answers, and a slow one should be slow only once
def equal(reference: str, answer: str) -> bool | None:
    """`Verifier.equal` of the process that this program shares.

    Raises:
        RunError: the helper process can't be started.
    """
    return _VERIFIER.equal(reference, answer)
