"""docs/adding-a-teacher.md, followed to the letter: its package is installed, its test passes, its config trains."""

from __future__ import annotations

import hashlib
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

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-a-teacher.md").read_text(encoding="utf-8")
KEY = "polly-wants-no-cracker"
SAYINGS = "who's a clever bird then pieces of eight walk the plank land ahoy shiver my timbers polly put the kettle on"


def blocks() -> dict[str, str]:
    """The page's files by name: code blocks whose first line is a comment with a file name."""
    found = re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return dict(found)


class Parrot:
    """The provider."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.heard.append(body)
                status, payload = outer.squawk(self.path, self.headers.get("X-Parrot-Key"), body)
                raw = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def squawk(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/v1/squawk" or key != KEY:
            return 403, {"squawk": "go away"}
        if body["bird"] != "polly-2":
            return 404, {"squawk": "no such bird"}
        last = body["heard"][-1]["what"]
        begun, opening = body.get("begun", ""), ""
        if piece := re.search(r"<begun>\n(.*)\n</begun>\n<last_piece>(.*)</last_piece>", last, re.DOTALL):
            begun, opening = piece[1], piece[2]
        whole = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" if "from 1 to 10" in last else SAYINGS
        draw = json.dumps([last, begun, body.get("dice")]) if body["wildness"] else ""
        words = SAYINGS.split()
        turn = int(hashlib.sha256(draw.encode()).hexdigest(), 16) % len(words) if draw else 0
        wild = " " + " ".join(words[turn:] + words[:turn])
        says = whole[len(begun) :] if whole.startswith(begun) and (not draw or whole is not SAYINGS) else wild
        tokens = re.findall(r"\s*\S{1,4}", opening + says)
        said = tokens[: body["most"]]
        usage = {"in": len(last) // 4 + len(begun) // 4, "out": len(said)}
        why = "full" if len(tokens) > len(said) else "done"
        return 200, {"bird": "polly-2-0915", "says": "".join(said), "why": why, "crumbs": usage}


@pytest.fixture(scope="module")
def parrot() -> Iterator[Parrot]:
    parrot = Parrot()
    yield parrot
    parrot.server.shutdown()
    parrot.server.server_close()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, installed as a stranger would; returns the folder that it is installed in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "parrot_teacher.py"):
        (source / name).write_text(blocks()[name])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=120)
    return target


def run(package: Path, *command: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """A program that finds the installed package."""
    environment = {**os.environ, "PYTHONPATH": f"{package}:{ROOT}", "PARROT_API_KEY": key, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def config(parrot: Parrot, tmp_path: Path) -> list[str]:
    """The page's config, with this server's address and a smaller run."""
    path = tmp_path / "parrot.yaml"
    path.write_text(blocks()["parrot.yaml"])
    small = ["train.steps=2", "task.train_size=16", "task.heldout_size=2", "eval.problems=0"]
    return [str(path), f"teacher.base_url={parrot.url}", f"output={tmp_path / 'run'}", *small]


def test_the_adapter_is_short() -> None:
    code = [line for line in blocks()["parrot_teacher.py"].splitlines() if line.strip()]
    assert len(code) < 62
    assert set(blocks()) == {"parrot_teacher.py", "pyproject.toml", "parrot.yaml", "test_parrot.py"}


def test_the_pages_own_test_passes(package: Path, tmp_path: Path) -> None:
    (tmp_path / "test_parrot.py").write_text(blocks()["test_parrot.py"])
    done = run(package, "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path / "test_parrot.py"))
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_it_is_probed_and_trained_with_through_the_command_line(
    package: Path, parrot: Parrot, config: list[str], tmp_path: Path
) -> None:
    probed = run(package, "omniopd.cli", "probe", "--yes", "--json", *config)
    assert probed.returncode == 0, probed.stderr
    verdicts = {finding["name"]: finding["verdict"] for finding in json.loads(probed.stdout)["findings"]}
    shown = re.search(r"Of Parrot it finds:\n\n```\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    said = dict(line.split() for line in shown[1].splitlines())
    assert len(said) > 10
    assert {name: {"confirmed": "yes", "refuted": "no"}.get(verdicts[name], "?") for name in said} == said
    trained = run(package, "omniopd.cli", "train", *config)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["teacher"]["name"]) == (2, "polly-2")
    assert summary["signal"]["coverage"] > 0
    assert summary["teacher"]["spent_usd"] > 0
    fields = {"bird", "heard", "begun", "most", "wildness", "dice"}
    unknown = [body for body in parrot.heard if body.keys() - fields]
    assert [set(body) - fields for body in unknown] == [{"omniopd_unknown_field"}]
    continued = [body for body in parrot.heard if "begun" in body and body["most"] == 13]
    assert len(continued) >= 2 * 8 * 2 * 4 / 2  # two chunks, eight prompts, four draws; short answers have fewer chunks
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written
    assert all(KEY.encode() not in path.read_bytes() for path in written)


def test_a_refused_key_is_one_line(package: Path, config: list[str]) -> None:
    done = run(package, "omniopd.cli", "train", *config, key="wrong-key-1234")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("omniopd: ")]
    assert done.returncode == 2
    assert "PARROT_API_KEY" in line
    assert "wrong-key" not in done.stderr + done.stdout


def test_a_wrong_setting_is_named(package: Path, config: list[str]) -> None:
    done = run(package, "omniopd.cli", "train", *config, "teacher.modle=x")
    assert done.returncode == 2
    assert "teacher.modle: unknown key 'modle'; did you mean 'model'?" in done.stderr
