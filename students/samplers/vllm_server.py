"""Rollouts by a vLLM server: the engine on its own GPUs or machines. `student.rollouts: {type: vllm_server, ...}`

Tokens go in and tokens come out, so nothing is ever cut into tokens again (trap R4). Weights are pushed through a folder
that this process and the server both see under the same name. The server must run with `VLLM_SERVER_DEV_MODE=1`, which opens
`/collective_rpc` and `/reset_prefix_cache` to anyone who reaches it: keep it on a private network. Its routes for tensors
over NCCL (`/init_weight_transfer_engine`, `/update_weights`) need no folder, but GPUs on both sides; they are not used here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import httpx
import tenacity
from pydantic import Field, field_validator

from omniopd.chat import first_line
from omniopd.errors import ConfigError, StudentError
from omniopd.registry import SAMPLERS
from students.engine import Asked, EngineSampler, EngineSettings, Written
from students.policy import Policy

BUSY = frozenset({408, 429, 502, 503, 504})  # worth another try
WAIT = tenacity.wait_exponential_jitter(initial=0.5, max=20.0)


class VllmServerRollouts(EngineSettings):
    """Settings of `type: vllm_server`. The key, where the server wants one, is read from the environment only."""

    type: Literal["vllm_server"] = "vllm_server"
    base_url: str = Field(description="the server's address, as http://10.0.0.5:8000")
    model: str = Field(description="the name that the server gives the model (--served-model-name)")
    weights: Path = Field(
        description="folder that pushed weights pass through, which the server sees under the same name"
    )
    api_key_env: str | None = Field(default=None, description="environment variable that holds the server's key")
    concurrency: int = Field(default=64, ge=1, description="responses asked for at the same time")
    timeout_s: float = Field(default=600.0, gt=0, description="for one response, or one push")
    attempts: int = Field(default=5, ge=1, description="tries of a call that does not get through")

    @field_validator("base_url")
    @classmethod
    def _address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"needs an address like http://127.0.0.1:8000, got '{url}'")
        return url.rstrip("/").removesuffix("/v1")


@SAMPLERS.register("vllm_server")
class VllmServerSampler(EngineSampler):
    """A vLLM server with a copy of the policy's weights, for all processes of the run."""

    Config = VllmServerRollouts
    name = "the vLLM server"
    shared = True

    def __init__(self, config: VllmServerRollouts, policy: Policy, seed: int) -> None:
        """Raises:
        ConfigError: the key is not in the environment.
        """
        super().__init__(config, policy, seed, config.weights.absolute())
        self._config = config
        self._headers = {}
        if config.api_key_env:
            if not (key := os.environ.get(config.api_key_env)):
                raise ConfigError(f"student.rollouts.api_key_env: the variable {config.api_key_env} is not set")
            self._headers["Authorization"] = f"Bearer {key}"

    @cached_property
    def _client(self) -> httpx.Client:
        client = httpx.Client(
            base_url=self._config.base_url,
            headers=self._headers,
            timeout=httpx.Timeout(self._config.timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=self._config.concurrency),
        )
        self._open.callback(lambda: self.__dict__.pop("_client").close())
        return client

    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Written]]:
        """See `EngineSampler`."""
        pool = ThreadPoolExecutor(self._config.concurrency, "rollouts")
        try:
            calls = {pool.submit(self._one, one): place for place, one in enumerate(asked)}
            for call in as_completed(calls):
                yield calls[call], call.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def load(self, folder: Path) -> None:
        """See `EngineSampler`."""
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        if self._post("/reset_prefix_cache", {}).get("success") is False:
            raise StudentError("student.rollouts: the vLLM server keeps its prefix cache; is somebody else using it?")

    def _one(self, asked: Asked) -> Written:
        said = self._post(
            "/v1/completions",
            {
                "model": self._config.model,
                "prompt": list(asked.prompt_ids),
                **self.sampling(asked),
                "return_token_ids": True,
                "skip_special_tokens": False,
            },
        )
        return _written(said)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer's JSON, or {} where there is none; tried again where the call did not get through.

        Raises:
            StudentError: the server can't be reached, or refuses.
        """
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda problem: isinstance(problem, httpx.TransportError))
            | tenacity.retry_if_result(lambda response: response.status_code in BUSY),
            stop=tenacity.stop_after_attempt(self._config.attempts),
            wait=WAIT,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        try:
            response: httpx.Response = again(self._client.post, path, json=body)
        except httpx.TransportError as problem:
            raise StudentError(
                f"student.rollouts.base_url: {self._config.base_url} does not answer: "
                f"{type(problem).__name__} {first_line(problem)}".rstrip()
            ) from None
        if response.is_success:
            return response.json() if response.content else {}
        raise StudentError(self._refusal(path, response))

    def _refusal(self, path: str, response: httpx.Response) -> str:
        """What the server does not do, and the mend, in one line."""
        what = f"the vLLM server answers {response.status_code} to {path}"
        said = " ".join(response.text.split())[:300]
        match response.status_code:
            case 401 | 403:
                return f"student.rollouts.api_key_env: {what}; name the variable that holds its key"
            case 404 if path != "/v1/completions":
                return (
                    f"student.rollouts: {what}, so no weights can be pushed; start it with VLLM_SERVER_DEV_MODE=1 in its "
                    "environment"
                )
            case 404:
                return f"student.rollouts.model: {what}: {said}"
        if path == "/collective_rpc":
            return f"student.rollouts.weights: {what}: {said}; does it see the folder under the same name?"
        return f"student.rollouts: {what}: {said}"


def _written(said: dict[str, Any]) -> Written:
    """The one completion of an answer, by ids."""
    one = said["choices"][0]
    if one.get("token_ids") is None:
        raise StudentError("student.rollouts: the vLLM server returns no token ids; use vLLM 0.11 or later")
    if one["finish_reason"] not in ("stop", "length"):
        raise StudentError(f"student.rollouts: the vLLM server ended a response with '{one['finish_reason']}'")
    ids, logprobs = tuple(one["token_ids"]), tuple(one["logprobs"]["token_logprobs"])
    if len(ids) != len(logprobs):
        raise StudentError(f"student.rollouts: the vLLM server returns {len(logprobs)} log-probs of {len(ids)} tokens")
    return Written(ids, logprobs, one["finish_reason"])
