"""`make quickstart`: start the demo teacher as a server of its own, distil the demo student from it, say what happened."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

# Models this small run fastest on one thread each; more only make student and teacher wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from omniopd.cli import main
from omniopd.errors import OmniError
from teachers.local import local_server

HERE = Path(__file__).parent


def quickstart(overrides: list[str]) -> int:
    """Run examples/quickstart.yaml against the demo teacher; returns the exit code."""
    began = time.monotonic()
    output = Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    try:
        with local_server(HERE / "demo" / "teacher") as url:
            print(f"the teacher serves text at {url}; the student starts to learn", flush=True)
            code = main(
                ["train", str(HERE / "quickstart.yaml"), f"teacher.base_url={url}", f"output={output}", *overrides]
            )
    except OmniError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{time.monotonic() - began:.0f} s in all")
    return code


if __name__ == "__main__":
    sys.exit(quickstart(sys.argv[1:]))
