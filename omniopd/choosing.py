"""Which signal a run learns from: the best that its teacher offers (`signal: auto`), or one that the config names.

`WAYS` is the order. A way is passed over where the teacher can't give it, where it needs the student's tokenizer and the
teacher has another, or where a probe in the run's store found that the live teacher does not do it. A run that has begun
keeps the kind it began with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from pydantic import ValidationError

from omniopd.chat import ChatTemplate
from omniopd.config import RunConfig
from omniopd.errors import ConfigError, StudentError
from omniopd.ledger import Ledger
from omniopd.method import missing
from omniopd.registry import METHODS, TEACHERS
from omniopd.settings import Settings, first_problem
from omniopd.store import Store
from omniopd.types import Capabilities

TOP = 64  # likeliest tokens that `signal: topk` asks for, where the teacher has as many [ours]
OPENINGS = 20  # the same of `signal: scores` across tokenizers
OTHER = "another tokenizer than the student"


@dataclass(frozen=True, slots=True)
class Way:
    """A kind of signal, what it needs of the teacher, and the method that reads it.

    `settings` are what the method's must be for that: the values each may have, the default first. `top` is how many of the
    likeliest tokens the method asks for, where the teacher has as many, in its setting `top_setting`.
    """

    kind: str
    need: str
    method: str
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    top: int = 0
    top_setting: str = "k"
    same_tokenizer: bool = False

    def obstacle(self, offered: Capabilities, vocabulary: str) -> str:
        """What the teacher has that stands against it; "" where nothing does. `vocabulary` is the digest of the student's."""
        if missing(frozenset({self.need}), offered):
            return _LACKS[self.need]
        return OTHER if self.same_tokenizer and offered.vocabulary != vocabulary else ""

    def contradicted(self, stated: Mapping[str, Any]) -> list[str]:
        """The method's settings that the config states in such a way that it reads another kind."""
        return [name for name, may in self.settings.items() if stated.get(name, may[0]) not in may]


_WHOLE = {"form": ("dense",), "support": ("full", "student", "common")}
WAYS = (
    Way("logits", "logits", "opd", _WHOLE, same_tokenizer=True),
    Way("topk", "topk", "opd", {"form": ("dense",), "support": ("teacher",)}, top=TOP, same_tokenizer=True),
    Way(
        "logits", "logits", "bpm"
    ),  # of another tokenizer: measured to be worth more than scores (docs/results/white_box.md)
    Way("scores", "score", "opd", {"form": ("sampled",)}, same_tokenizer=True),
    Way("scores", "score", "dpca", top=OPENINGS, top_setting="openings"),
    Way("continuations", "continuation", "omniopd"),
    Way("answers", "answer", "seqkd"),
)
_KIND = {way.need: way.kind for way in WAYS}  # the richest first
_LACKS = {
    "logits": "no whole distributions",
    "topk": "no likeliest tokens of given text",
    "score": "no log-probs of given text",
    "continuation": "no continuations",
    "answer": "no answers of its own",
}
_MENDS = {
    "logits": "weights in this process have them (teacher.type: transformers)",
    "topk": "the types transformers, vllm and sglang have them, servers with teacher.tokenizer set",
    "score": "the types transformers, vllm, sglang and servers that echo have them, servers with teacher.tokenizer set",
    "continuation": "teachers that chat have them",
    "answer": "teachers that chat have them",
}


def settle(config: RunConfig) -> tuple[RunConfig, str]:
    """The config with its signal chosen and its method named, and why; as it is where it names no signal.

    Raises:
        ConfigError: the teacher offers nothing of that kind, or the method reads another; the message has the mend.
    """
    if config.signal is None:
        return config, ""
    stated = config.method.model_dump(mode="json", exclude_unset=True)
    asked = (_begun_with(config) if config.signal == "auto" else None) or config.signal
    if asked == "auto" and config.teacher.type == "replay":
        raise ConfigError(
            "signal: auto: a recording holds what its run asked for; set what that run's config.yaml has there"
        )
    ways = _open_ways(asked, stated.pop("name", None), stated)
    vocabulary = ChatTemplate.load(config.student.path, "student.path", StudentError).vocabulary.digest
    offered = offers(config)
    passed: list[str] = []
    for way in ways:
        if not (obstacle := way.obstacle(offered, vocabulary)):
            return _with(config, way, offered, stated), _why(way, passed, offered.vocabulary == vocabulary)
        passed.append(obstacle)
    mend = (
        "choose a teacher of the student's family, or let signal: scores name the method"
        if passed[0] == OTHER
        else _MENDS[ways[0].need]
    )
    lacks = " and ".join(dict.fromkeys(passed))
    raise ConfigError(f"signal: {asked}: the teacher (type {config.teacher.type}) has {lacks}; {mend}")


def offers(config: RunConfig) -> Capabilities:
    """What the config's teacher can give, by its settings, without what a probe in the run's store has disproved.

    Raises:
        ConfigError: its tokenizer does not load, or its type can't say beforehand what it offers.
    """
    teacher = config.teacher
    promises = getattr(TEACHERS.get(teacher.type), "promises", None)
    if promises is None:
        raise ConfigError(f"signal: the teacher type {teacher.type} does not say what it offers; name a method instead")
    promised: Capabilities = promises(teacher)
    parts: Mapping[str, Settings] = getattr(teacher, "teachers", {"": teacher})
    if any(against_scores(_probe_of(config, part)) for part in parts.values()):
        return replace(promised, score=False, topk=0)
    return promised


def against_scores(probe: Mapping[str, Any] | None) -> str:
    """What a probe found against log-probs of given text; "" where it found nothing against them."""
    findings = probe["findings"] if probe else []
    wrong = (
        found["found"] for found in findings if (found["name"], found["verdict"]) == ("prompt_logprobs", "refuted")
    )
    return next(wrong, "")


def _probe_of(config: RunConfig, teacher: Settings) -> dict[str, Any] | None:
    """The last probe of a teacher that is in the run's store, with nothing sent."""
    if not config.store_path.exists() or hasattr(
        teacher, "path"
    ):  # weights in this process, and recordings, are as they say
        return None
    store = Store(config.store_path)
    try:
        live = TEACHERS.build(teacher, store, Ledger(store))
        try:
            return getattr(live, "probe", None)
        finally:
            asyncio.run(live.close())
    finally:
        store.close()


def _begun_with(config: RunConfig) -> str | None:
    """The kind that the run in the output folder began with, if there is one."""
    path = config.output / "config.yaml"
    kept = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return kept.get("signal") if isinstance(kept, dict) else None


def _open_ways(asked: str, method: str | None, stated: Mapping[str, Any]) -> list[Way]:
    """The ways that the config leaves open, best first; at least one.

    Raises:
        ConfigError: the method that it names reads another kind, or its settings are those of another kind.
    """
    of_method = [way for way in WAYS if method in (None, way.method)]
    if method and not of_method:  # a method with one way of its own, told by its needs
        needs = METHODS.get(method).needs
        of_method = [Way(kind, need, method) for need, kind in _KIND.items() if need in needs][:1]
    of_kind = [way for way in of_method if asked in ("auto", way.kind)]
    if not of_kind:
        reads = " and ".join(dict.fromkeys(way.kind for way in of_method)) or "nothing that signal names"
        raise ConfigError(
            f"signal: {asked} is not what the method '{method}' reads, which is {reads}; drop one of the two"
        )
    if ways := [way for way in of_kind if not way.contradicted(stated)]:
        return ways
    name = of_kind[0].contradicted(stated)[0]
    right = " or ".join(of_kind[0].settings[name])
    raise ConfigError(f"method.{name}: signal: {asked} is read with {right}, not {stated[name]}; drop one of the two")


def _with(config: RunConfig, way: Way, offered: Capabilities, stated: Mapping[str, Any]) -> RunConfig:
    """The config with the method of that way; what it states of the method itself stays."""
    settings = {name: may[0] for name, may in way.settings.items()}
    if way.top:
        settings[way.top_setting] = min(way.top, offered.topk)
    method = {"name": way.method, **settings, **stated}
    try:
        return RunConfig.model_validate({**dict(config), "signal": way.kind, "method": method})
    except ValidationError as error:
        wrong = first_problem(error, RunConfig)
        raise ConfigError(f"{wrong} (signal: {way.kind} is read by the method '{way.method}')") from None


def _why(way: Way, passed: list[str], same_tokenizer: bool) -> str:
    """What decided for a way, in a few words."""
    cut = "teacher has the student's tokenizer" if same_tokenizer else "teacher has another tokenizer"
    lacks = ", ".join(what for what in dict.fromkeys(passed) if what != OTHER)
    return "; ".join([cut] * (way.need in ("logits", "topk", "score")) + [f"teacher has {lacks}"] * bool(lacks))
