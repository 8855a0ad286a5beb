"""An engine with a copy of a student's weights, behind what we use of the package vLLM and of its server.

It draws as `omniopd.sampling` does, so that its rollouts are known; and it can be broken in the ways that real ones break.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM

from omniopd.sampling import Draw, Request, sample

FIELDS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass
class Copy:
    """The engine. What it computed of a prompt it keeps until its prefix cache is reset.

    Attributes:
        offset: added to every log-prob that it tells.
        deaf: whether it takes no new weights, without a word.
        forgets: whether a reset of its prefix cache does anything.
        fault: what loading raises.
    """

    offset: float = 0.0
    deaf: bool = False
    forgets: bool = True
    fault: Exception | None = None
    loaded: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    model: Any = None
    prefixes: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def load(self, folder: str) -> None:
        if self.fault:
            raise self.fault
        assert (Path(folder) / "model.safetensors").exists()
        self.loaded.append(folder)
        if self.model is None or not self.deaf:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def reset(self) -> bool:
        if self.forgets:
            self.prefixes.clear()
        return True

    def draw(self, prompt_ids: Sequence[int], fields: Mapping[str, Any]) -> Draw:
        assert {name: fields[name] for name in FIELDS} == FIELDS and fields["repetition_penalty"] == 1.0
        assert fields["n"] == 1 and fields["logprobs"] == 0 and fields["ignore_eos"] is True
        self.asked.append(dict(fields))
        prompt = tuple(prompt_ids)
        model = self.prefixes.setdefault(prompt, self.model)
        request = Request(prompt, fields["seed"], fields["max_tokens"], temperature=fields["temperature"])
        return sample(model, [request], fields["stop_token_ids"])[0][0]


def package(copy: Copy, built: list[Any], cpu: bool = False) -> ModuleType:
    """The package. Engines that are built join `built`; they end the last request first."""

    class LLM:
        def __init__(self, **settings: Any) -> None:
            built.append(self)
            self.settings, self.shut, self.called = settings, 0, list[str]()
            copy.load(settings["model"])
            core = SimpleNamespace(shutdown=self._end)
            self.llm_engine = SimpleNamespace(step=self._step, engine_core=core)
            self._waiting: list[tuple[str, Any, Any]] = []
            self._number = 0

        def enqueue(self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool) -> list[str]:
            assert not use_tqdm
            names = [f"{self._number + i}-a1b2" for i in range(len(prompts))]
            self._number += len(prompts)
            self._waiting += zip(names, prompts, params, strict=True)
            return names

        def _step(self) -> list[Any]:
            name, prompt, fields = self._waiting.pop()
            draw = copy.draw(prompt["prompt_token_ids"], fields)
            assert fields["detokenize"] is False
            told = [
                {token: SimpleNamespace(logprob=logp + copy.offset)}
                for token, logp in zip(draw.ids, draw.logprobs, strict=True)
            ]
            text = SimpleNamespace(token_ids=list(draw.ids), logprobs=told, finish_reason=draw.finish)
            number = name.partition("-")[0]
            return [
                SimpleNamespace(request_id="none", finished=False),
                SimpleNamespace(request_id=number, finished=True, outputs=[text]),
            ]

        def collective_rpc(self, method: str, kwargs: Mapping[str, Any] | None = None) -> None:
            self.called.append(method)
            if method == "reload_weights":
                assert kwargs is not None
                copy.load(kwargs["weights_path"])

        def reset_prefix_cache(self) -> bool:
            return copy.reset()

        def _end(self) -> None:
            self.shut += 1

    module = ModuleType("vllm")
    platform = SimpleNamespace(is_cpu=lambda: cpu)
    module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    module.platforms = SimpleNamespace(current_platform=platform)  # type: ignore[attr-defined]
    return module


def server(
    copy: Copy,
    first: Sequence[httpx.Response | Exception] = (),
    says: Callable[[str], httpx.Response | None] | None = None,
) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """vLLM's server as a transport, and the requests that reach it.

    Args:
        first: what the first calls get instead of an answer.
        says: what calls to a path get instead of an answer; None: the answer.
    """
    requests: list[httpx.Request] = []
    ahead = list(first)

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if ahead:
            if isinstance(said := ahead.pop(0), Exception):
                raise said
            return said
        if says and (said := says(request.url.path)):
            return said
        body = json.loads(request.content)
        match request.url.path:
            case "/collective_rpc":
                assert body["method"] == "reload_weights"
                copy.load(body["kwargs"]["weights_path"])
                return httpx.Response(200, json={"results": [None]})
            case "/reset_prefix_cache":
                return httpx.Response(200, json={"success": copy.reset()})
        assert request.url.path == "/v1/completions" and body["return_token_ids"] is True
        draw = copy.draw(body["prompt"], body)
        logprobs = {"token_logprobs": [value + copy.offset for value in draw.logprobs]}
        one = {"text": "?", "token_ids": list(draw.ids), "logprobs": logprobs, "finish_reason": draw.finish}
        return httpx.Response(200, json={"choices": [one]})

    return httpx.MockTransport(handle), requests
