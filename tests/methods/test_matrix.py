"""Every method with every teacher and every sampler: it can run, or it is refused in one line with the mend.

What a teacher offers is what its settings promise, before anything is connected or loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from omniopd.choosing import offers
from omniopd.composition import compose
from omniopd.config import load_config
from omniopd.errors import ConfigError
from omniopd.fitting import check_method, check_needs
from omniopd.method import OF_THE_RUN, Method, missing
from omniopd.registry import METHODS, PARTS, SAMPLERS, TEACHERS
from omniopd.types import Capabilities
from students.policy import Policy, StudentSettings
from students.ranks import Ranks

OF_A_TEACHER = {"continuation", "answer", "score", "topk", "logits", "decode", "same tokenizer"}
OF_A_SAMPLER = {"horizon", "text", "initial", "blend"}
IN_A_RECORDING = "replay"  # what it offers is what was recorded

# What the shipped methods need at least, of their defaults: the table that docs/methods shows. Others may come; none may go.
TEXT_ONLY = {"omniopd", "seqkd", "soda", "orpo_distill"}
SAME_FAMILY = {"opd", "fire", "gndpo", "kat", "ta_opd", "tropd", "trb", "lgr", "opd_plus", "esr", "adwin", "topd"}


@pytest.fixture(scope="module")
def student(llama_folder: Path) -> Policy:
    return Policy(StudentSettings(path=str(llama_folder), max_new_tokens=64), anchored=True)


@pytest.fixture(scope="module")
def other_folder(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("pieces", "qwen3")


def settings_of(type_: str, folder: Path) -> dict[str, Any]:
    """The least that a teacher of that type can be configured with, and a tokenizer where it may have one."""
    fields = TEACHERS.get(type_).Config.model_fields
    known = {
        "model": "m",
        "path": str(folder),
        "tokenizer": str(folder),
        "base_url": "http://127.0.0.1:9/v1",
        "api_key_env": None,
        "rule": "arithmetic",
        "teachers": {"one": settings_of("transformers", folder)} if type_ == "routed" else None,
        "weights": {"one": 1.0} if type_ == "routed" else None,
    }
    return {"type": type_, **{name: value for name, value in known.items() if name in fields}}


def promised(teacher: dict[str, Any], student: Path, method: Any = "seqkd") -> Capabilities:
    tree = {"student": {"path": str(student)}, "teacher": teacher, "task": "arithmetic", "method": method}
    return offers(load_config(tree))


def built(name: str, student: Policy, **settings: Any) -> Method:
    tree = {
        "student": {"path": student.settings.path},
        "teacher": {"type": "transformers", "path": student.settings.path},
        "task": "arithmetic",
        "method": {"name": name, **settings},
    }
    return compose(load_config(tree).method, student, 0, lambda prompt, text: True, 4)


def verdict(method: Method, offered: Capabilities) -> str:
    """Why the run is refused; "" where it can run."""
    try:
        check_needs(method, SimpleNamespace(capabilities=offered))  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return ""


def teachers_of(same: Path, other: Path) -> dict[str, Capabilities]:
    """What each type promises, with the student's tokenizer, another, and none."""
    found = {}
    for type_ in set(TEACHERS.names()) - {IN_A_RECORDING}:
        for whose, folder in (("same", same), ("other", other)):
            found[f"{type_} {whose}"] = promised(settings_of(type_, folder), same)
        if "tokenizer" in TEACHERS.get(type_).Config.model_fields:
            bare = {name: value for name, value in settings_of(type_, same).items() if name != "tokenizer"}
            found[f"{type_} unknown"] = promised(bare, same)
    return found


@pytest.mark.parametrize("name", METHODS.names())
def test_every_teacher_is_taken_or_refused_with_the_mend(name: str, student: Policy, other_folder: Path) -> None:
    method = built(name, student)
    assert method.needs <= OF_A_TEACHER | OF_THE_RUN, "a need that nobody looks at"
    taken = 0
    for teacher, offered in teachers_of(Path(student.settings.path), other_folder).items():
        said = verdict(method, offered)
        lacks = missing(method.needs, offered, student.vocabulary.digest)
        assert bool(said) >= bool(lacks), f"{teacher} is taken and lacks {lacks}"
        assert not said or (said.startswith(("method: needs ", "judge: ")) and "choose" in said and "\n" not in said)
        taken += not said
    assert taken, "no teacher at all can do it"


@pytest.mark.parametrize("name", sorted(TEXT_ONLY))
def test_a_text_only_method_takes_whoever_chats(name: str, student: Policy) -> None:
    method = built(name, student)
    offered = promised(settings_of("anthropic", Path(student.settings.path)), Path(student.settings.path))
    assert not offered.score
    chats = Capabilities(continuation="prefill")
    assert verdict(method, chats) == ""


@pytest.mark.parametrize("name", sorted(SAME_FAMILY))
def test_a_method_on_log_ratios_of_tokens_refuses_another_tokenizer(
    name: str, student: Policy, other_folder: Path
) -> None:
    here = Path(student.settings.path)
    method = built(name, student)
    assert verdict(method, promised(settings_of("transformers", here), here)) == ""
    said = verdict(method, promised(settings_of("transformers", other_folder), here))
    assert "same tokenizer" in said
    text_only = verdict(method, promised(settings_of("openai", here) | {"tokenizer": None}, here))
    assert "score" in text_only or "logits" in text_only or "topk" in text_only


def test_too_few_likeliest_tokens_are_named_with_the_part(student: Policy) -> None:
    method = built("opd", student, parts=[{"name": "entropy_weights", "k": 32}])
    offered = Capabilities(score=True, topk=20, vocabulary=student.vocabulary.digest)
    said = verdict(method, offered)
    assert "the 32 likeliest tokens" in said and "entropy_weights" in said and "method.k" not in said


# ---------------------------------------------------------------------- the run around it


def checked(student: Policy, method: Method, name: str = "opd", sampler: str = "transformers", **run: Any) -> None:
    tree = {
        "student": {"path": student.settings.path},
        "teacher": {"type": "transformers", "path": student.settings.path},
        "task": "arithmetic",
        "method": name,
        "train": run.get("train", {"rollouts_per_prompt": 4}),
    }
    config = load_config(tree)
    kind = SimpleNamespace(type=sampler)
    config = config.model_copy(update={"student": config.student.model_copy(update={"rollouts": kind})})
    stub: Any = SimpleNamespace(offers=SAMPLERS.get(sampler).offers)
    ranks: Any = SimpleNamespace(count=run.get("processes", 1))
    check_method(config, method, stub, ranks, run.get("prompts", [tiny.prompt()]))


@pytest.mark.parametrize("sampler", SAMPLERS.names())
@pytest.mark.parametrize("name", [*METHODS.names(), *(f"opd + {part}" for part in PARTS.names())])
def test_every_sampler_is_taken_or_refused_with_the_mend(name: str, sampler: str, student: Policy) -> None:
    base, _, part = name.partition(" + ")
    method = built(base, student, **({"parts": [part]} if part else {}))
    assert method.writes <= OF_A_SAMPLER, "a wish that no sampler looks at"
    offered = SAMPLERS.get(sampler).offers
    able = method.writes <= offered and (not method.candidates or "candidates" in offered)
    prompts = [SimpleNamespace(reference="19")]
    if able:
        checked(student, method, base, sampler, prompts=prompts)
    else:
        with pytest.raises(ConfigError, match=r"^student\.rollouts: .*set student\.rollouts=transformers$"):
            checked(student, method, base, sampler, prompts=prompts)


NEEDS_OF_THE_RUN = {
    "group": ({"train": {"rollouts_per_prompt": 1}}, r"^train\.rollouts_per_prompt: .* set 2 or more"),
    "verify": ({"prompts": [SimpleNamespace(reference=None)] * 2}, r"^task: .* choose a task with answers"),
    "fresh": ({"train": {"rollouts_per_prompt": 4, "max_lag": 1}}, r"^train\.max_lag: .* set train\.max_lag=0"),
}


@pytest.mark.parametrize("need", NEEDS_OF_THE_RUN)
@pytest.mark.parametrize("name", METHODS.names())
def test_what_the_run_must_offer_is_asked_for(name: str, need: str, student: Policy) -> None:
    method = built(name, student)
    without, message = NEEDS_OF_THE_RUN[need]
    around = {"prompts": [SimpleNamespace(reference="19")], **without}
    if need in method.needs:
        with pytest.raises(ConfigError, match=message):
            checked(student, method, name, **around)
    else:
        others = method.needs & (NEEDS_OF_THE_RUN.keys() - {need})
        assert others or checked(student, method, name, **around) is None


def test_every_need_of_the_run_has_a_check() -> None:
    assert {*NEEDS_OF_THE_RUN, "judge"} == OF_THE_RUN


SHUFFLED = {"control": "shuffled"}  # what belongs to a prompt is dealt out over the whole step before anything is asked


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gad", {}), ("ropd", {}), ("ovd", SHUFFLED), ("soda", SHUFFLED), ("orpo_distill", SHUFFLED)],
)
def test_a_method_of_one_process_refuses_two(name: str, settings: dict[str, Any], student: Policy) -> None:
    method, prompts = built(name, student, **settings), [SimpleNamespace(reference="19")]
    with pytest.raises(ConfigError, match="start one process"):
        checked(student, method, name, prompts=prompts, processes=2)
    assert checked(student, method, name, prompts=prompts, processes=Ranks().count) is None


@pytest.mark.parametrize("name", METHODS.names())
def test_the_other_methods_take_two(name: str, student: Policy) -> None:
    method = built(name, student)
    assert method.one_process == (name in ("gad", "ropd"))
    if not method.one_process:
        checked(student, method, name, prompts=[SimpleNamespace(reference="19")], processes=2)
