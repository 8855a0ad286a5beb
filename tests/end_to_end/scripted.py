"""A scripted teacher behind real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def scripted(body: dict[str, Any]) -> tuple[int, Any]:
    """Continuations made from a hash of the request, the same for the same request and draw: a recorded teacher."""
    choices = []
    for draw in range(body.get("n", 1)):
        name = json.dumps([body["messages"], body["seed"] + draw])
        digits = str(int(hashlib.sha256(name.encode()).hexdigest(), 16))
        choices.append({"message": {"content": f"{digits[0]}. {digits[1:3]}+{digits[3]}"}, "finish_reason": "length"})
    used = {"prompt_tokens": 50, "completion_tokens": 8 * len(choices)}
    return 200, {"model": "scripted", "choices": choices, "usage": used}


class ScriptedTeacher:
    """Counts calls and keeps bodies and headers; `answer` and `latency` may be changed while it serves."""

    def __init__(self) -> None:
        self.answer: Answer = scripted
        self.latency = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(outer.latency)
                status, payload = outer.answer(body)
                with outer.lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except (BrokenPipeError, ConnectionResetError):  # a killed client
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
