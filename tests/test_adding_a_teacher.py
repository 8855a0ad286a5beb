"""docs/adding-a-teacher.md, followed to the letter: its code becomes a package, and a student learns from its teacher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-a-teacher.md").read_text(encoding="utf-8")
KEY = "parrot-key-6d1f20"


def block(language: str) -> str:
    """The page's only block of code in that language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package of the page, installed into a folder of its own."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    (source / "parrot_teacher.py").write_text(block("python"))
    project = '[project]\nname = "parrot-teacher"\nversion = "1"\n[tool.setuptools]\npy-modules = ["parrot_teacher"]\n'
    build = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    (source / "pyproject.toml").write_text(build + project + block("toml"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=120)
    return target


class Parrot(BaseHTTPRequestHandler):
    """Counts, repeats what it was about to say, and refuses a wrong key."""

    protocol_version = "HTTP/1.1"
    heard: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.heard.append({"path": self.path, **body})
        if self.headers["x-parrot-key"] != KEY:
            self._say(401, {"squawk": f"who is {self.headers['x-parrot-key']}?"})
        elif body["lines"][-1]["said"].endswith("4,"):
            self._say(200, {"said": " 5, 6, 7", "ended": "done", "heard": 20, "spoken": 6, "bird": "polly-1"})
        else:
            self._say(200, {"said": " 12+7=19.", "ended": "breath", "heard": 30, "spoken": 8, "bird": "polly-1"})

    def _say(self, status: int, payload: dict[str, Any]) -> None:
        raw = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def parrot() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it heard."""
    heard: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Parrot,), {"heard": heard}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", heard
    server.shutdown()
    server.server_close()


def omniopd(target: Path, config: dict[str, Any], key: str = KEY) -> subprocess.CompletedProcess[str]:
    """`omniopd train` with the package at hand."""
    path = target.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(target), "PARROT_API_KEY": key, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "omniopd.cli", "train", str(path)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_student_learns_from_the_teacher_of_the_page(
    installed: Path, parrot: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, heard = parrot
    price = {"prompt": 1.0, "completion": 2.0}
    config = {
        "student": {"path": str(ROOT / "examples" / "demo" / "student"), "max_new_tokens": 48},
        "teacher": {"type": "parrot", "model": "polly", "base_url": url, "price": price},
        "task": {"type": "arithmetic", "train_size": 16, "heldout_size": 4},
        "method": {"name": "omniopd", "chunks": 1, "chunk_tokens": 6, "continuations": 2},
        "train": {"steps": 2, "prompts_per_step": 2},
        "eval": {"problems": 4},
        "output": str(tmp_path / "run"),
    }
    done = omniopd(installed, config)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["teacher"]["spent_usd"] == pytest.approx(summary["teacher"]["cost_usd"])
    asked = [body for body in heard if not body["lines"][-1]["said"].endswith("4,")]
    assert summary["teacher"]["completion_tokens"] == 8 * len(asked) + 6 * (len(heard) - len(asked))
    assert {body["path"] for body in heard} == {"/v1/speak"}
    assert all(body["lines"][-1]["who"] == "assistant" for body in asked)  # the look proved the rung prefill
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    assert json.loads(manifest)["teacher_fingerprint"].startswith("parrot/polly@localhost")

    refused = omniopd(installed, {**config, "output": str(tmp_path / "other")}, key="parrot-key-wrong")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "PARROT_API_KEY" in refused.stderr
    assert "parrot-key-wrong" not in refused.stderr


def test_the_adapter_of_the_page_is_short() -> None:
    assert len(block("python").splitlines()) <= 70
