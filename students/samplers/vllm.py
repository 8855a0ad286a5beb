"""Rollouts by vLLM in this process: an engine's speed on the student's own machine. `student.rollouts: vllm`

The package is imported when the first rollout is written. vLLM starts processes of its own, so a script that trains with it
needs the usual `if __name__ == "__main__":`. Pushed weights pass through a folder in memory: saved as a model, read again by
`reload_weights`, and nothing that the prefix cache holds of the old ones stays (trap S6). Engines that take tensors over NCCL
or CUDA IPC do without the folder; they need one GPU topology each, and are not used here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from omniopd.chat import first_line
from omniopd.errors import StudentError
from omniopd.registry import SAMPLERS
from omniopd.vllm import load_engine, load_package, on_cpu
from students.engine import Asked, EngineSampler, EngineSettings, Written
from students.policy import Policy


class VllmRollouts(EngineSettings):
    """Settings of `type: vllm`; see vLLM's own for what the engine's mean."""

    type: Literal["vllm"] = "vllm"
    gpu_memory_utilization: float = Field(
        default=0.3, gt=0, le=1, description="share of the GPU's memory that vLLM takes; the trainer needs the rest"
    )
    max_model_len: int | None = Field(default=None, ge=1, description="null: the student's context")
    tensor_parallel_size: int = Field(default=1, ge=1)
    enforce_eager: bool = False
    engine: dict[str, Any] = Field(default_factory=dict, description="more arguments of vllm.LLM")
    weights: Path | None = Field(
        default=None, description="folder that pushed weights pass through; null: one in memory where there is room"
    )

    @field_validator("engine")
    @classmethod
    def _nothing_said_elsewhere(cls, engine: dict[str, Any]) -> dict[str, Any]:
        elsewhere = {*cls.model_fields, "model", "dtype", "logprobs_mode", "trust_remote_code"}
        if taken := sorted(elsewhere & engine.keys()):
            raise ValueError(f"'{taken[0]}' has its own field or is settled by the student; leave it out")
        return engine


class Repacking:
    """Mixed into vLLM's workers on a CPU, which compute the logits with a packed copy of the head.

    Where the head is the embedding, `reload_weights` (0.32) brings the embedding up to date and leaves the copy as it was:
    the logits would be those of the first weights for ever. On GPUs both are one tensor.
    """

    model_runner: Any

    def repack_head(self) -> None:
        """Pack the head again."""
        for layer in self.model_runner.get_model().modules():
            if type(layer).__name__ == "ParallelLMHead":
                layer.quant_method.process_weights_after_loading(layer)


@SAMPLERS.register("vllm")
class VllmSampler(EngineSampler):
    """vLLM's scheduler, stepped from here so that each response is heard of as soon as it ends."""

    Config = VllmRollouts
    name = "vLLM"

    def __init__(self, config: VllmRollouts, policy: Policy, seed: int) -> None:
        """Raises:
        ConfigError: vLLM is not there.
        """
        super().__init__(config, policy, seed, config.weights)
        self._config = config
        self._vllm = load_package("student.rollouts", "vllm")
        self._extension = {"worker_extension_cls": f"{__name__}.{Repacking.__name__}"} if on_cpu(self._vllm) else {}

    @cached_property
    def _llm(self) -> Any:
        config, student = self._config, self.policy.settings
        with _on_this_gpu(self.policy):
            llm = load_engine(
                self._vllm,
                "student.path",
                student.path,
                dtype=student.compute_dtype,
                gpu_memory_utilization=config.gpu_memory_utilization,
                max_model_len=config.max_model_len,
                tensor_parallel_size=config.tensor_parallel_size,
                enforce_eager=config.enforce_eager,
                **{**self._extension, **config.engine},
            )
        self._open.callback(self._end)
        return llm

    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Written]]:
        """See `EngineSampler`."""
        params = [self._vllm.SamplingParams(**self.sampling(one), detokenize=False) for one in asked]
        prompts = [{"prompt_token_ids": list(one.prompt_ids)} for one in asked]
        names = self._llm.enqueue(prompts, params, use_tqdm=False)
        # Outputs go by the number that opens the name; what may follow it is the engine's own.
        place_of = {name.partition("-")[0]: place for place, name in enumerate(names)}
        while place_of:
            for output in self._llm.llm_engine.step():
                if output.finished:
                    yield place_of.pop(output.request_id), _written(output.outputs[0])

    def load(self, folder: Path) -> None:
        """See `EngineSampler`."""
        llm = self._llm
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            if self._extension:
                llm.collective_rpc("repack_head")
        except Exception as problem:  # of any type, from any layer below
            raise StudentError(f"student.rollouts: vLLM can't load the pushed weights: {first_line(problem)}") from None
        if not llm.reset_prefix_cache():
            raise StudentError("student.rollouts: vLLM keeps its prefix cache, which is of the old weights")

    def _end(self) -> None:
        self.__dict__.pop("_llm").llm_engine.engine_core.shutdown()


def _written(one: Any) -> Written:
    """A completion of vLLM's, whose log-probs are of the written tokens, by id."""
    if one.finish_reason not in ("stop", "length"):
        raise StudentError(f"student.rollouts: vLLM ended a response with '{one.finish_reason}'")
    ids = tuple(one.token_ids)
    logprobs = tuple(float(place[token].logprob) for token, place in zip(ids, one.logprobs, strict=True))
    return Written(ids, logprobs, one.finish_reason)


@contextmanager
def _on_this_gpu(policy: Policy) -> Iterator[None]:
    """Engine processes started in the block see the policy's GPU first: with several trainers, each has its own engine."""
    device = policy.model.device
    if device.type != "cuda" or not device.index:
        yield
        return
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    visible = before.split(",") if before else [str(index) for index in range(device.index + 1)]
    os.environ[name] = ",".join(visible[device.index :])
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
