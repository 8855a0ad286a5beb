"""Teachers: one file per back end, and what all of them share.

    Query ──▶ asks (rendered request, keys) ──▶ store? ──▶ ledger ──▶ Session.draw(ask, n, seed) of the back end
                                                   │                        │
    Evidence ◀── ladder (valid? why not?) ◀────────┴──── stored, booked ◀───┘

`client.ApiTeacher` is that picture. A back end registers a class with a `Config` and a `Backend`:

- behind HTTP, a `backend.HttpBackend`: how a request looks, how a reply is read, what an error means. `transport` sends,
  retries and times out, `pace` says when. `openai.py` is the model; docs/adding-a-teacher.md walks through a new one.
- in this process, an `in_process.InProcessBackend` over an `engine.Engine`, which `serve.py` puts behind HTTP too.

`ladder` holds the pure rules of going on from a prefix, `rung` the look that proves a rung. `probe` puts every other
question to a live teacher: the questions are in `checks`, `asker` asks and pays, `findings` is what came of it and what it
forbids. `replay` answers from a recorded store, `routed` asks several teachers.
"""
