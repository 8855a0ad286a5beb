"""A teacher in this process, drawn from by vLLM: local weights at a server's speed, without the server. `type: vllm_local`.

The package is imported when such a teacher is built, and not before. It starts processes of its own, so a script that
builds one needs the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field
from transformers import AutoConfig

from omniopd.chat import ChatTemplate
from omniopd.registry import TEACHERS
from omniopd.sampling import Request
from omniopd.threads import DeviceThread
from omniopd.types import Capabilities, Usage
from omniopd.vllm import UNCHANGED, load_engine, load_package
from teachers.backend import offers_of
from teachers.engine import Drawn, Engine, Given
from teachers.in_process import InProcessBackend, InProcessConfig, InProcessTeacher
from teachers.scoring import Scores, likeliest

MOST_LOGPROBS = 100  # the most that `teacher.logprobs` and the likeliest tokens of given text may ask for
GREEDY = 1e-5  # vLLM takes the likeliest token below this temperature, and then refuses n > 1


class VllmLocalConfig(InProcessConfig):
    """Settings of `type: vllm_local`; see vLLM's own for what they mean.

    `gpu_memory_utilization` is the share of the GPU's memory that vLLM takes for itself, and keeps: the default leaves
    half of it to the student. Code that comes with weights is never run.
    """

    type: Literal["vllm_local"] = "vllm_local"
    max_model_len: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    enforce_eager: bool = False


class VllmEngine(Engine):
    """vLLM's own scheduler behind the queue."""

    most_rows = 8192  # the scheduler cuts batches itself
    written = 1

    def __init__(self, config: VllmLocalConfig, chat: ChatTemplate) -> None:
        """Load the model.

        Raises:
            ConfigError: vLLM is not there, or can't load it.
        """
        vllm = load_package("teacher.type", "vllm_local")
        thread = DeviceThread("vllm")
        self._llm: Any = thread.submit(
            partial(_load, vllm, config)
        ).result()  # on a CPU it must have as many helpers later
        super().__init__(chat, self._llm.llm_engine.model_config.max_model_len, thread)
        self._params = vllm.SamplingParams

    def draw_batch(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        """See `Engine`."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._sampling(request) for request in requests],
            use_tqdm=False,
        )
        drawn = []
        for request, output in zip(requests, outputs, strict=True):
            texts = [_drawn(one, request.top) for one in output.outputs]
            drawn.append(texts * request.draws if request.temperature < GREEDY else texts)
        return drawn

    def score_batch(self, rows: Sequence[Given]) -> list[Scores]:
        """See `Engine`."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(row.ids)} for row in rows],
            [self._sampling(Request(row.ids, 0, self.written), row.top) for row in rows],
            use_tqdm=False,
        )
        return [_scores(row, output.prompt_logprobs) for row, output in zip(rows, outputs, strict=True)]

    def close(self) -> None:
        """End vLLM's processes and free its memory."""
        super().close()
        self._llm.llm_engine.engine_core.shutdown()

    def _sampling(self, request: Request, prompt_top: int | None = None) -> Any:
        """Every field that moves a distribution is stated: the model's own defaults count for none of them.

        vLLM gives draw i of a request the seed `seed + i`. `prompt_top` asks for the likeliest tokens at each place of the
        prompt, too.
        """
        return self._params(
            n=1 if request.temperature < GREEDY else request.draws,
            temperature=request.temperature,
            top_p=request.top_p,
            **UNCHANGED,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            logprobs=request.top or None,
            prompt_logprobs=prompt_top,
            detokenize=False,
        )


def _load(vllm: Any, config: VllmLocalConfig) -> Any:
    return load_engine(
        vllm,
        "teacher.path",
        config.path,
        dtype=_stored_dtype(config.path) if config.dtype == "auto" else config.dtype,
        max_model_len=config.max_model_len,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager,
        max_logprobs=MOST_LOGPROBS,
    )


def _stored_dtype(path: str) -> str:
    """The type that the weights are stored in; vLLM's own `auto` would halve the precision of float32."""
    stored = AutoConfig.from_pretrained(path).dtype
    return "auto" if stored is None else str(stored).removeprefix("torch.")


def _drawn(one: Any, top: int) -> Drawn:
    """A completion of vLLM's. Where log-probs were asked for, it holds the token itself and the `top` best by id."""
    if one.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a text with '{one.finish_reason}'")
    ids = tuple(one.token_ids)
    if not top:
        return Drawn(ids, one.finish_reason)
    logprobs = tuple(float(place[token].logprob) for token, place in zip(ids, one.logprobs, strict=True))
    ranked = [sorted(place.items(), key=lambda entry: entry[1].rank)[:top] for place in one.logprobs]
    best = tuple(tuple((token, float(entry.logprob)) for token, entry in place) for place in ranked)
    return Drawn(ids, one.finish_reason, logprobs, best)


def _scores(row: Given, said: Sequence[Any]) -> Scores:
    """What vLLM says of each place of a prompt: nothing of the first, of others the token itself and the `top` best by id."""
    places = [{token: float(entry.logprob) for token, entry in (place or {}).items()} for place in said]
    own = (place.get(token) for place, token in zip(places, row.ids, strict=True))
    scores = Scores(tuple(own), tuple(likeliest(place, row.top) for place in places))
    return replace(scores.since(row.start), usage=Usage(prompt_tokens=len(row.ids), completion_tokens=1))


class VllmLocalBackend(InProcessBackend):
    """vLLM as a back end in this process."""

    config: VllmLocalConfig

    @classmethod
    def capabilities(cls, config: InProcessConfig, chat: ChatTemplate) -> Capabilities:
        """See `InProcessBackend`."""
        return offers_of(chat, config, "raw", MOST_LOGPROBS)

    def load(self, chat: ChatTemplate) -> VllmEngine:
        """See `InProcessBackend`."""
        return VllmEngine(self.config, chat)


@TEACHERS.register("vllm_local")
class VllmLocalTeacher(InProcessTeacher):
    """A `Teacher` of local weights, drawn from by vLLM."""

    Config = VllmLocalConfig
    Backend = VllmLocalBackend
