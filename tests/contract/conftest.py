"""Contract tests ask real servers. They are collected only if `OMNIOPD_CONTRACT` names some: `make contract` does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import servers

CHOSEN = {part.strip() for part in os.environ.get("OMNIOPD_CONTRACT", "").split(",") if part.strip()}
if not set(servers.PARTS) >= CHOSEN:
    raise pytest.UsageError(f"OMNIOPD_CONTRACT knows {', '.join(servers.PARTS)}; it is {','.join(sorted(CHOSEN))}")

collect_ignore_glob = [] if CHOSEN else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract: needs a real server in an environment of its own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(servers.HERE):
            item.add_marker("contract")
            # the first test of a server waits until it is installed and started, which is no fault of the test
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300, func_only=True))


@pytest.fixture(scope="session")
def running_vllm() -> Iterator[str]:
    """vLLM's base URL, whoever needs it: a test of its own or the proxy in front of it."""
    with servers.vllm() as url:
        yield url


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    """Skips where `OMNIOPD_CONTRACT` does not name vLLM."""
    _need("vllm")


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest) -> str:
    """Base URL of vLLM (no key)."""
    _need("vllm")
    return request.getfixturevalue("running_vllm")


@pytest.fixture(scope="session")
def litellm(request: pytest.FixtureRequest) -> Iterator[str]:
    """Base URL of LiteLLM's proxy in front of vLLM; its key is `servers.LITELLM_KEY`."""
    _need("litellm")
    with servers.litellm(request.getfixturevalue("running_vllm")) as url:
        yield url


@pytest.fixture(scope="session")
def llamacpp() -> Iterator[str]:
    """Base URL of llama.cpp's server (no key)."""
    _need("llamacpp")
    with servers.llamacpp() as url:
        yield url


def _need(part: str) -> None:
    if part not in CHOSEN:
        pytest.skip(f"OMNIOPD_CONTRACT does not name {part}")
