"""The tests that need vLLM in their own process, run by the Python of vLLM's environment.

What the project needs and vLLM does not (peft, accelerate, pytest) comes from the environment that runs this test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import servers

HERE = Path(__file__).parent
RUN = "import sys; sys.path += sys.argv[1].split(':'); import pytest; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.timeout(1200, func_only=True)
@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here: they run by themselves")
@pytest.mark.parametrize("file", ["test_vllm_local.py", "test_vllm_rollouts.py"])
def test_with_vllm_in_the_same_process(file: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("needs_vllm")
    python = servers.environment("vllm") / "bin" / "python"
    ours = ":".join(path for path in sys.path if path.endswith("site-packages"))
    settings = {**servers.VLLM_SETTINGS, "OMNIOPD_CONTRACT": "vllm"}
    done = subprocess.run(
        [python, "-c", RUN, ours, str(HERE / file), "-p", "no:cacheprovider", "-rs", "--show-capture=no"],
        cwd=servers.ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
