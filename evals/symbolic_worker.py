"""The helper process of `symbolic.py`: a script that imports nothing of ours, so that it needs no import path.

A JSON pair (reference, answer) a line in, `true` or `false` a line out, until the pipe closes.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from typing import TextIO


def serve(questions: TextIO, answers: TextIO) -> None:
    """Compare pair by pair. No time limits here: whoever asks stops a process that takes too long."""
    from math_verify import parse, verify

    for line in questions:
        reference, answer = (f"${_latex(text)}$" for text in json.loads(line))
        same = verify(parse(reference, parsing_timeout=None), parse(answer, parsing_timeout=None), timeout_seconds=None)
        print(json.dumps(bool(same)), file=answers, flush=True)


def _latex(text: str) -> str:
    """What math-verify would read otherwise than people write it: powers, and pi (for p times i)."""
    return re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])|π", r"\\pi ", text.replace("**", "^"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for our parent, who may still want to finish a batch
    _answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    serve(sys.stdin, _answers)
