"""Servers written by others, each in a virtual environment of its own, all serving the demo teacher as model `demo`.

`python tests/contract/servers.py vllm` (or `litellm`, `llamacpp`) makes the environment if it is missing, starts the
server and keeps it until it is interrupted. Everything lies in the folder that `OMNIOPD_CONTRACT_HOME` names, by default
`.contract/`: one folder per counterpart with its environment and the logs of its servers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
from padded import padded

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TEACHER = ROOT / "examples" / "demo" / "teacher"
HOME = Path(os.environ.get("OMNIOPD_CONTRACT_HOME") or ROOT / ".contract").absolute()
PARTS = ("vllm", "litellm", "llamacpp")
MODEL = "demo"
LITELLM_KEY = "sk-contract"  # the only key that the proxy accepts; the other servers ask for none
PATIENCE = 300.0  # seconds for a server to answer, on a machine that may be busy
LLAMA_CPP = "0.3.36"  # the release of llama-cpp-python whose source distribution carries the llama.cpp we build
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # after 5 s by default, in the face of a client that still sends
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # or the first request for log-probabilities takes ten seconds
}
LLAMA_SERVER = HOME / "llamacpp" / "bin" / f"llama-server-{LLAMA_CPP}"


class ServerError(RuntimeError):
    """A server that did not start; the message ends with its last lines."""


def environment(part: str) -> Path:
    """The folder of a counterpart's virtual environment, made from its requirements unless it is there already."""
    folder = HOME / part
    wanted = (HERE / f"requirements-{part}.txt").read_text()
    done = folder / "installed.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with (HOME / f"{part}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it
        if not done.exists() or done.read_text() != wanted:
            _install(part, folder)
            done.write_text(wanted)
        if part == "llamacpp" and not LLAMA_SERVER.exists():
            _build_llama_server(folder / "bin")
    return folder


def _install(part: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "--requirement", HERE / f"requirements-{part}.txt"], check=True)
    if part == "vllm":
        # They come along as CUDA builds, which cannot be imported beside a PyTorch for the CPU.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)


def _build_llama_server(programs: Path) -> None:
    """Compile `llama-server` (some minutes) without what is no use here: web page, TLS, this machine's instructions."""
    off = "BUILD_SHARED_LIBS GGML_NATIVE GGML_OPENMP LLAMA_OPENSSL LLAMA_BUILD_UI LLAMA_USE_PREBUILT_UI"
    off += " LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES"
    # -O1 spares a quarter of the time to compile; a model of a million parameters does not feel it
    options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-DCMAKE_{x}_FLAGS_RELEASE=-O1 -DNDEBUG" for x in ("C", "CXX"))]
    options += [f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", *(f"-D{name}=OFF" for name in off.split())]
    with tempfile.TemporaryDirectory() as folder:
        pip = [programs / "python", "-m", "pip", "--quiet", "download", "--no-deps", "--dest", folder]
        package = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA_CPP}"]
        subprocess.run([*pip, *package], check=True)
        shutil.unpack_archive(next(Path(folder).glob("*.tar.gz")), folder)
        source, build = next(Path(folder).glob("*/vendor/llama.cpp")), Path(folder) / "build"
        configure = [programs / "cmake", "-S", source, "-B", build, "-G", "Ninja", *options]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([programs / "ninja", "-C", build, "--quiet", "llama-server"], check=True)
        shutil.copy(build / "bin" / "llama-server", LLAMA_SERVER)


@contextmanager
def vllm(folder: Path = TEACHER) -> Iterator[str]:
    """A demo teacher by vLLM on the CPU: OpenAI's routes under `/v1`, Anthropic's `/v1/messages`, `/tokenize`.

    Yields the base URL.

    A last assistant message is continued unless `chat_template_kwargs: {"open_turn": false}` asks for the closed turn
    of the teacher's own template: see `open_turn.jinja`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = padded(folder, Path(scratch) / "teacher")
        options = ["--chat-template", HERE / "open_turn.jinja", "--enable-prompt-tokens-details"]
        with _vllm(model, options, {}) as url:
            yield url


@contextmanager
def vllm_student(folder: Path, dev_mode: bool = True) -> Iterator[str]:
    """A student by vLLM on the CPU, which takes new weights in its development mode. Yields the base URL."""
    with _vllm(folder, [], {"VLLM_SERVER_DEV_MODE": str(int(dev_mode))}) as url:
        yield url


@contextmanager
def _vllm(model: Path, options: Sequence[str | Path], settings: Mapping[str, str]) -> Iterator[str]:
    python = environment("vllm") / "bin" / "python"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", MODEL]
    command += ["--dtype", "float32", "--enforce-eager", "--disable-log-stats", "--disable-uvicorn-access-log"]
    command += ["--block-size", "32"]  # what the prefix cache keeps at least; the default exceeds our prompts
    # On the CPU a request with a seed whose prompt is read in two pieces kills the engine.
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192", *options]
    with _serving("vllm", command, "/health", {**VLLM_SETTINGS, **settings}) as url:
        yield url


@contextmanager
def litellm(upstream: str) -> Iterator[str]:
    """LiteLLM's proxy in front of vLLM: Gemini's `/v1beta`, OpenAI's and Anthropic's routes, key `LITELLM_KEY`."""
    program = environment("litellm") / "bin" / "litellm"
    model = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{upstream}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": model}],
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},  # every error reaches the caller
    }
    settings = {"LITELLM_MASTER_KEY": LITELLM_KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)  # JSON is YAML too
        file.flush()
        command = [program, "--config", file.name, "--telemetry", "False"]
        with _serving("litellm", command, "/health/liveliness", settings) as url:
            yield url


@contextmanager
def llamacpp() -> Iterator[str]:
    """llama.cpp's `llama-server`: its own `/completion`, `/tokenize`, `/apply-template`, and the routes of others."""
    python = environment("llamacpp") / "bin" / "python"
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "teacher.gguf"
        subprocess.run([python, HERE / "gguf_of.py", TEACHER, model], check=True)
        command = [LLAMA_SERVER, "--model", model, "--alias", MODEL, "--offline", "--no-ui"]
        # 32 calls at a time of 1,024 tokens each; its threads wait for each other busily, which a second one does not pay
        command += ["--parallel", "32", "--ctx-size", "32768", "--threads", "1", "--cache-ram", "0"]
        command += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--log-verbosity", "1"]
        with _serving("llamacpp", command, "/health", {}) as url:
            yield url


@contextmanager
def _serving(part: str, command: Sequence[str | Path], health: str, settings: Mapping[str, str]) -> Iterator[str]:
    """Run one server on a free port of this machine until the block ends; its output goes to a file of that port."""
    port = _free_port()
    log = HOME / part / "logs" / f"{port}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its helpers join its process group, and are ended with it
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await(process, url + health, log)
        yield url
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return once the server answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    how = f"gave no answer in {PATIENCE:.0f} s" if process.poll() is None else f"ended with status {process.returncode}"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise ServerError(f"{process.args[0]} {how}; the end of {log}:\n{last}")  # type: ignore[index]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then make it."""
    for request in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 15
        with suppress(ProcessLookupError):
            os.killpg(process.pid, request)
            while time.monotonic() < deadline:
                process.poll()  # a child whose end was not noticed would count as running
                os.killpg(process.pid, 0)
                time.sleep(0.1)


def main(part: str) -> None:
    """Serve until interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), ExitStack() as running:
        if part == "litellm":
            url = running.enter_context(litellm(running.enter_context(vllm())))
        else:
            url = running.enter_context({"vllm": vllm, "llamacpp": llamacpp}[part]())
        print(url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1])
