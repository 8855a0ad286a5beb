"""Pure functions between the student's words and the teacher's: where to ask, how to cut, who agrees, what it weighs.

    chunks.py     which spans of a rollout to audit, and a span as text
    text.py       characters completed by tokens, cutting text, a chunk and a reply cut to one length
    agreement.py  how far a reply agrees with a chunk, token by token
    weights.py    smoothing, calibration, survival: counts to numbers on tokens
    audit.py      chunks with their verdicts, judged in one batch, and the placebo controls

A chunk becomes a signal in this order: `select_starts`, `cut_chunk`, (the teacher), `judge_all`, a signal's `read`.
"""
