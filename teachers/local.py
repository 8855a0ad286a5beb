"""A teacher server as a process of its own, for the quickstart, the controls and tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniopd.errors import TeacherError


@contextmanager
def local_server(model: str | Path, *, seconds: float = 120.0) -> Iterator[str]:
    """Serve a model folder on a free loopback port while the context lasts; yields the base URL.

    Raises:
        TeacherError: it did not start in time; the message ends with what it said last.
    """
    command = [sys.executable, "-m", "omniopd.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    said: list[str] = []
    found = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith("serving "):
                found.set()
        found.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        deadline = time.monotonic() + seconds
        found.wait(max(0.0, deadline - time.monotonic()))
        url = next(
            (m[0] for line in said if (m := re.search(r"http://\S+", line)) and line.startswith("serving ")), None
        )
        if url is None:
            last = said[-1] if said else "it said nothing"
            raise TeacherError(f"{model}: the teacher server did not start within {seconds:.0f} s; it said: {last}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
