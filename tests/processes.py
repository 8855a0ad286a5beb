"""Several real processes of one run on this machine, each with the environment that a launcher would give it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def alone(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """`python COMMAND`, which finds what the tests find."""
    paths = map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "students"))
    common = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **common, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(command: Sequence[str], count: int = 2, *, nodes: int = 1, **environment: str) -> list[subprocess.Popen[str]]:
    """`python COMMAND` once per process of a run, dealt out to so many machines by name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        **environment,
    }
    return [
        alone(command, **common, RANK=str(rank), LOCAL_RANK=str(rank // nodes), GROUP_RANK=str(rank % nodes))
        for rank in range(count)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each, within the time limit; none of them outlives it."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
