"""Teachers: one file per back end.

    Query ──▶ asks (rendered request, keys) ──▶ store? ──▶ transport ──▶ wire of the back end
                                                   │                        │
    Evidence ◀── ladder (valid? why not?) ◀────────┴──── stored first ◀─────┘

`client.ApiTeacher` is that picture. A back end adds a `transport.Wire` (how a request looks, how a reply is read, what
an error means) and registers a class with a `Config`; see `openai.py`. `ladder.py` holds the pure rules for going on
from a prefix; `replay.py` answers from a recorded store.
"""
