"""What vLLM is asked, and how its answers are read: a scripted package in its place. See tests/contract for the real one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from omniopd.chat import ChatTemplate
from omniopd.errors import ConfigError, TeacherError
from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.types import Chunk, ContinueQuery, Message, Prompt, ScoreQuery
from teachers.vllm_local import VllmLocalConfig, VllmLocalTeacher

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "demo" / "teacher"
CHAT = ChatTemplate.load(str(TEACHER), "model")
PROMPT = Prompt("p", (Message("user", "What is 12+7?"),))
END = 2


def going_on(prefix: str = "It is", n: int = 3, row: int = 0, seed: int = 70) -> ContinueQuery:
    return ContinueQuery(PROMPT, Chunk(row, 3, 5, prefix, " AUDITED", (8, 8)), n, 9, seed)


@dataclass
class Scripted:
    """The package `vllm`. `write` makes the texts of one prompt from its sampling parameters."""

    write: Callable[[dict[str, Any]], list[Any]]
    built: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[list[Any], list[dict[str, Any]]]] = field(default_factory=list)
    shut: int = 0
    context: int = 100
    cpu: bool = False
    read: Callable[[list[int], int], list[Any]] | None = (
        None  # what it says of a prompt's ids, and the likeliest at each
    )

    def module(self) -> ModuleType:
        script = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                script.built.append(settings)
                core = SimpleNamespace(shutdown=script.end)
                self.llm_engine = SimpleNamespace(
                    model_config=SimpleNamespace(max_model_len=settings["max_model_len"] or script.context),
                    engine_core=core,
                )

            def generate(self, prompts: list[Any], params: list[dict[str, Any]], *, use_tqdm: bool) -> list[Any]:
                assert not use_tqdm
                script.asked.append((prompts, params))
                if script.read and params[0]["prompt_logprobs"] is not None:
                    asked = zip(prompts, params, strict=True)
                    said = [script.read(one["prompt_token_ids"], param["prompt_logprobs"]) for one, param in asked]
                    return [SimpleNamespace(prompt_logprobs=places) for places in said]
                return [SimpleNamespace(outputs=script.write(one)) for one in params]

        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
        platform = SimpleNamespace(is_cpu=lambda: script.cpu)
        module.platforms = SimpleNamespace(current_platform=platform)  # type: ignore[attr-defined]
        return module

    def end(self) -> None:
        self.shut += 1


def text(ids: Sequence[int], finish: str = "length", logprobs: Any = None) -> SimpleNamespace:
    return SimpleNamespace(token_ids=list(ids), finish_reason=finish, logprobs=logprobs)


def numbered(params: dict[str, Any]) -> list[Any]:
    """Draw i says its own seed, as vLLM gives draw i the seed `seed + i`."""
    return [text([*CHAT.encode(f" {params['seed'] + i}")[0], END], "stop") for i in range(params["n"])]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def build(script: Scripted, **settings: Any) -> VllmLocalTeacher:
        monkeypatch.setitem(sys.modules, "vllm", script.module())
        return VllmLocalTeacher(VllmLocalConfig(path=str(TEACHER), **settings), Store(tmp_path / "store.sqlite"))

    return build


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def test_found_by_name() -> None:
    assert TEACHERS.get("vllm_local") is VllmLocalTeacher


def test_what_it_is_asked(make: Any) -> None:
    script = Scripted(numbered)
    first, second = gather(make(script, temperature=0.7, top_p=0.9), going_on(), going_on("So", n=1, row=1, seed=5))
    assert [reply.text for reply in first.replies] == [" 70", " 71", " 72"]
    assert [(reply.text, reply.finish) for reply in second.replies] == [(" 5", "stop")]
    ((prompts, params),) = script.asked  # one batch for both
    assert prompts == [
        {"prompt_token_ids": list(CHAT.ids([*PROMPT.messages, Message("assistant", prefix)], open_turn=True))}
        for prefix in ("It is", "So")
    ]
    stated = {
        "n": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": 70,
        "max_tokens": 9,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": False,
    }
    assert params == [stated, stated | {"n": 1, "seed": 5}]
    assert first.usage.prompt_tokens == len(prompts[0]["prompt_token_ids"])
    assert first.usage.completion_tokens == 3 * len([*CHAT.encode(" 70")[0], END])


def test_what_it_is_built_with(make: Any) -> None:
    script = Scripted(numbered)
    make(script, max_model_len=64, tensor_parallel_size=2, enforce_eager=True, logprobs=30, gpu_memory_utilization=0.4)
    assert script.built == [
        {
            "model": str(TEACHER),
            "dtype": "float32",  # as stored: vLLM's own `auto` would take half of it
            "max_model_len": 64,
            "gpu_memory_utilization": 0.4,
            "tensor_parallel_size": 2,
            "enforce_eager": True,
            "trust_remote_code": False,
            "max_logprobs": 100,  # every number that the setting allows
            "logprobs_mode": "raw_logprobs",
        }
    ]
    make(script, dtype="bfloat16")
    assert (script.built[1]["dtype"], script.built[1]["max_model_len"]) == ("bfloat16", None)


def test_on_a_cpu_prompts_are_computed_in_one_step(make: Any) -> None:
    script = Scripted(numbered, cpu=True)
    make(script)
    assert script.built[0]["enable_chunked_prefill"] is False


def test_the_context_is_what_vllm_serves(make: Any) -> None:
    script = Scripted(numbered)
    teacher = make(script, max_model_len=30)
    room = 30 - len(CHAT.ids([*PROMPT.messages, Message("assistant", "It is")], open_turn=True))
    gather(teacher, replace(going_on(), max_tokens=500))
    assert script.asked[0][1][0]["max_tokens"] == room
    (long,) = gather(teacher, going_on("1 " * 30))
    assert long.rejected == {"context_overflow": 3}


def test_greedy_is_drawn_once_and_counts_for_all(make: Any) -> None:
    script = Scripted(numbered)
    (evidence,) = gather(make(script, temperature=0.0), going_on(n=4))
    assert [reply.text for reply in evidence.replies] == [" 70"] * 4
    assert script.asked[0][1][0]["n"] == 1  # vLLM refuses n > 1 here


def test_logprobs_are_looked_up_by_id_and_ranked(make: Any) -> None:
    spell = CHAT.encode(" 1")[0]
    other = CHAT.encode("2")[0][0]

    def unlikely(params: dict[str, Any]) -> list[Any]:
        assert params["logprobs"] == 2
        entry = lambda logprob, rank: SimpleNamespace(logprob=logprob, rank=rank)  # noqa: E731
        first = {spell[0]: entry(-3.0, 9), other: entry(-0.5, 1), END: entry(-1.5, 2)}  # its own is not among the best
        second = {spell[1]: entry(-0.1, 1), other: entry(-2.5, 2)}
        return [text([*spell, END], "stop", [first, second, {END: entry(-0.2, 1), other: entry(-4.0, 2)}])]

    (evidence,) = gather(make(Scripted(unlikely), logprobs=2), going_on(n=1))
    (reply,) = evidence.replies
    assert [(token.text, token.logprob) for token in reply.tokens] == [(" ", -3.0), ("1", -0.1)]
    assert reply.tokens[0].top == (("2", -0.5), ("</s>", -1.5))
    assert reply.tokens[1].top == (("1", -0.1), ("2", -2.5))


def read(ids: list[int], k: int) -> list[Any]:
    """The log-prob of the token at place t is -t; two others are likelier, and one of them comes along uncounted."""

    def place(at: int, own: int) -> dict[int, Any]:
        others = {one: -at + 0.5 - 0.1 * rank for rank, one in enumerate((501, 502, 503)[: max(k, 1)])}
        return {one: SimpleNamespace(logprob=value, rank=1) for one, value in (others | {own: float(-at)}).items()}

    return [None, *(place(at, own) for at, own in enumerate(ids[1:], start=1))]


@pytest.mark.parametrize("k", [0, 2])
def test_r1_r13_given_text_is_scored_by_ids(make: Any, k: int) -> None:
    script = Scripted(numbered, read=read)
    teacher = make(script, temperature=0.7, top_p=0.9)
    ids = (*CHAT.encode("12+7=19.")[0], END)
    query = ScoreQuery(PROMPT, 0, ids, CHAT.vocabulary.digest, "12+7=19.", True, k)
    (found,) = gather(teacher, query)
    prompt = CHAT.ids(PROMPT.messages)
    ((prompts, params),) = script.asked
    assert prompts == [{"prompt_token_ids": [*prompt, *ids]}]
    stated = {name: params[0][name] for name in ("prompt_logprobs", "temperature", "top_p", "max_tokens", "logprobs")}
    assert stated == {"prompt_logprobs": k, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1, "logprobs": None}
    assert list(found.logprobs) == [-float(len(prompt) + place) for place in range(len(ids))]
    assert [list(place) for place in found.top] == [[501, 502]] * len(ids) * bool(k)
    assert found.usage.prompt_tokens == len(prompt) + len(ids)


def test_what_vllm_has_no_room_to_score_is_a_hole(make: Any) -> None:
    prompt = len(CHAT.ids(PROMPT.messages))
    teacher = make(Scripted(numbered, read=read), max_model_len=prompt + 4)
    queries = [ScoreQuery(PROMPT, n, (7,) * n, CHAT.vocabulary.digest, "1" * n, False) for n in (3, 4)]
    fits, hole = gather(teacher, *queries)  # it writes a token behind them
    assert (len(fits.ids), hole.rejected) == (3, {"context_overflow": 1})


def test_it_promises_likeliest_tokens_but_no_distributions(make: Any) -> None:
    teacher = make(Scripted(numbered))
    assert VllmLocalTeacher.promises(teacher._config) == teacher.capabilities
    assert (teacher.capabilities.score, teacher.capabilities.topk, teacher.capabilities.logits) == (True, 100, False)
    with pytest.raises(TeacherError, match="no whole distributions of given text"):
        gather(teacher, ScoreQuery(PROMPT, 0, (7,), CHAT.vocabulary.digest, "x", False, whole=True))


def test_a_text_that_ended_otherwise_is_no_text(make: Any) -> None:
    script = Scripted(lambda params: [text([7], "abort")])
    with pytest.raises(TeacherError, match="the model failed to draw: vLLM ended a text with 'abort'"):
        gather(make(script), going_on(n=1))


def test_it_is_shut_down_with_its_teacher(make: Any) -> None:
    script = Scripted(numbered)
    asyncio.run(make(script).close())
    assert script.shut == 1


def test_the_fingerprint_is_not_that_of_another_engine(make: Any, tmp_path: Path) -> None:
    own = make(Scripted(numbered)).fingerprint
    assert own.startswith(f"vllm_local/{TEACHER}#")
    assert make(Scripted(numbered), gpu_memory_utilization=0.9, enforce_eager=True).fingerprint == own
    assert make(Scripted(numbered), dtype="bfloat16").fingerprint != own


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError) as caught:
        VllmLocalTeacher(VllmLocalConfig(path=str(TEACHER)), Store(tmp_path / "store.sqlite"))
    assert str(caught.value) == "teacher.type: vllm_local needs the package vllm; pip install 'omniopd[vllm]'"


@pytest.mark.parametrize(
    "fault", ["import no_such_package_of_vllms", "raise ImportError('libcuda.so.1: no such file')"]
)
def test_a_broken_package_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(fault)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(
        ConfigError, match=r"^teacher\.type: the package vllm does not load: .*(no_such_package|libcuda)"
    ):
        VllmLocalTeacher(VllmLocalConfig(path=str(TEACHER)), Store(tmp_path / "store.sqlite"))


def test_a_model_that_vllm_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**settings: Any) -> None:
        raise ValueError("Head size 36 is not supported\nmore")

    module = Scripted(numbered).module()
    module.LLM = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    with pytest.raises(ConfigError) as caught:
        VllmLocalTeacher(VllmLocalConfig(path=str(TEACHER)), Store(tmp_path / "store.sqlite"))
    assert str(caught.value) == f"teacher.path: vLLM can't load '{TEACHER}': Head size 36 is not supported"
