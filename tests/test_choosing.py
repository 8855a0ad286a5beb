"""`signal`: which kind is taken of which teacher, what is refused, and that a run keeps what it began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from omniopd.choosing import WAYS, offers, settle
from omniopd.config import RunConfig, dump_config, load_config
from omniopd.errors import ConfigError
from omniopd.registry import METHODS, TEACHERS
from omniopd.store import Store
from omniopd.types import Capabilities

TEXT = Capabilities(continuation="prefill")
FULL = Capabilities(continuation="raw", score=True, topk=64, logits=True)


@pytest.fixture
def make(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """A config whose teacher promises these capabilities; `same`: with the student's tokenizer."""
    digest = tiny.policy(llama_folder).vocabulary.digest

    def config(offered: Capabilities, *overrides: str, same: bool = True, **settings: Any) -> RunConfig:
        said = {
            **{name: getattr(offered, name) for name in offered.__slots__},
            "vocabulary": digest if same else "other",
        }
        promised = Capabilities(**said)
        monkeypatch.setattr(TEACHERS.get("openai"), "promises", classmethod(lambda cls, config: promised))
        tree = {
            "student": {"path": str(llama_folder)},
            "teacher": {"type": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None},
            "task": "arithmetic",
            "signal": "auto",
            "output": str(tmp_path / "run"),
            **settings,
        }
        return load_config(tree, overrides)

    return config


Make = Callable[..., RunConfig]


def chosen(config: RunConfig) -> tuple[str | None, str, dict[str, Any]]:
    config, _ = settle(config)
    method = config.method.model_dump()
    return (
        config.signal,
        method["name"],
        {name: method[name] for name in ("form", "support", "k", "openings") if name in method},
    )


# ---------------------------------------------------------------------- auto


@pytest.mark.parametrize(
    ("offered", "same", "kind", "method", "settings"),
    [
        (FULL, True, "logits", "opd", {"form": "dense", "support": "full", "k": 64}),
        (Capabilities(score=True, topk=100), True, "topk", "opd", {"form": "dense", "support": "teacher", "k": 64}),
        (Capabilities(score=True, topk=20), True, "topk", "opd", {"form": "dense", "support": "teacher", "k": 20}),
        (Capabilities(score=True), True, "scores", "opd", {"form": "sampled", "support": "full", "k": 64}),
        (FULL, False, "logits", "bpm", {}),
        (replace(FULL, logits=False), False, "scores", "dpca", {"openings": 20}),
        (Capabilities(score=True, topk=5), False, "scores", "dpca", {"openings": 5}),
        (Capabilities(score=True), False, "scores", "dpca", {"openings": 0}),
        (TEXT, True, "continuations", "omniopd", {}),
        (TEXT, False, "continuations", "omniopd", {}),
        (Capabilities(continuation=None), True, "answers", "seqkd", {}),
    ],
)
def test_auto_takes_the_best_that_there_is(
    make: Make, offered: Capabilities, same: bool, kind: str, method: str, settings: dict[str, Any]
) -> None:
    assert chosen(make(offered, same=same)) == (kind, method, settings)


def test_it_says_why(make: Make) -> None:
    assert settle(make(FULL))[1] == "teacher has the student's tokenizer"
    assert settle(make(FULL, same=False))[1] == "teacher has another tokenizer"
    assert settle(make(TEXT))[1] == (
        "teacher has no whole distributions, no likeliest tokens of given text, no log-probs of given text"
    )


def test_without_a_signal_nothing_is_chosen_and_no_tokenizer_is_read(make: Make) -> None:
    config = make(FULL, signal=None, student={"path": "nowhere"})
    assert settle(config) == (config, "")
    assert config.method.name == "omniopd"


def test_settings_of_a_method_without_a_name_stay(make: Make) -> None:
    config, _ = settle(make(FULL, "method.anchor.beta=0.25", "method.reduction=token_mean"))
    assert (config.method.name, config.method.anchor.beta, config.method.reduction) == ("opd", 0.25, "token_mean")
    config, _ = settle(make(TEXT, "method.chunks=3"))
    assert (config.method.name, config.method.chunks, config.method.chunk_tokens) == ("omniopd", 3, 50)


def test_a_setting_that_the_chosen_method_does_not_know_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^method\.chunks: unknown key.*signal: logits is read by the method 'opd'"):
        settle(make(FULL, "method.chunks=3"))


# ---------------------------------------------------------------------- a kind by name


@pytest.mark.parametrize("kind", dict.fromkeys(way.kind for way in WAYS))
def test_each_kind_can_be_asked_for(make: Make, kind: str) -> None:
    assert chosen(make(FULL, signal=kind))[0] == kind


def test_logits_across_tokenizers_are_taken_where_they_are_asked_for(make: Make) -> None:
    assert chosen(make(FULL, signal="logits", same=False))[:2] == ("logits", "bpm")


@pytest.mark.parametrize(
    ("offered", "kind", "same", "message"),
    [
        (
            TEXT,
            "logits",
            True,
            r"^signal: logits: the teacher \(type openai\) has no whole distributions; .*transformers",
        ),
        (TEXT, "topk", True, r"^signal: topk: .*no likeliest tokens of given text; .*vllm and sglang"),
        (TEXT, "scores", False, r"^signal: scores: .*no log-probs of given text; .*teacher.tokenizer"),
        (FULL, "topk", False, r"^signal: topk: .*another tokenizer than the student; .*signal: scores"),
    ],
)
def test_a_kind_that_the_teacher_does_not_have_is_refused_with_the_mend(
    make: Make, offered: Capabilities, kind: str, same: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(make(offered, signal=kind, same=same))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="signal: .*'logits'"):
        load_config(
            {"student": {"path": "s"}, "teacher": {"type": "openai", "model": "m"}, "task": "arithmetic", "signal": "x"}
        )


# ---------------------------------------------------------------------- beside a method's name


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        ("logits", "opd", {"form": "dense"}),
        ("topk", "opd", {"form": "dense", "support": "teacher"}),
        ("scores", "opd", {"form": "sampled"}),
        ("scores", "dpca", {}),
        ("scores", "alm", {}),
        ("logits", "bpm", {}),
        ("logits", "gold", {}),
        ("logits", "uld", {}),
        ("continuations", "omniopd/paper", {}),
        ("answers", "seqkd", {}),
    ],
)
def test_a_method_that_reads_the_kind_is_taken(make: Make, kind: str, method: str, settings: dict[str, Any]) -> None:
    if method not in METHODS.names():
        pytest.fail(f"no method {method}")
    found = chosen(make(FULL, f"method={method}", signal=kind))
    assert found[:2] == (kind, method)
    assert found[2].items() >= settings.items()


def test_one_that_reads_another_kind_is_refused_and_both_are_named(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^signal: logits .*the method 'omniopd' reads, which is continuations"):
        settle(make(FULL, "method=omniopd", signal="logits"))
    with pytest.raises(ConfigError, match=r"the method 'opd' reads, which is logits and topk and scores"):
        settle(make(FULL, "method=opd", signal="continuations"))
    with pytest.raises(ConfigError, match=r"^method\.form: signal: scores is read with sampled, not dense"):
        settle(make(FULL, "method={name: opd, form: dense}", signal="scores"))


@pytest.mark.parametrize("same", [True, False])
def test_auto_with_a_method_takes_what_that_method_reads(make: Make, same: bool) -> None:
    assert chosen(make(FULL, "method=dpca", same=same))[:2] == ("scores", "dpca")
    assert chosen(make(FULL, "method={name: omniopd}", same=same))[:2] == ("continuations", "omniopd")


def test_stated_settings_decide_between_the_kinds_of_one_method(make: Make) -> None:
    assert chosen(make(FULL, "method={name: opd, form: sampled}"))[0] == "scores"
    found = chosen(make(FULL, "method={name: opd, form: dense, support: teacher, k: 8}"))
    assert found == ("topk", "opd", {"form": "dense", "support": "teacher", "k": 8})
    assert chosen(make(FULL, "method={name: opd, form: dense, support: student}"))[0] == "logits"


# ---------------------------------------------------------------------- probes, resuming, several teachers


def keep_probe(config: RunConfig, verdict: str) -> None:
    config.store_path.parent.mkdir(exist_ok=True)
    store = Store(config.store_path)
    live = TEACHERS.build(config.teacher, store)
    live.keep_probe({"findings": [{"name": "prompt_logprobs", "verdict": verdict, "found": "ignored"}]})
    store.close()


@pytest.mark.parametrize(
    ("verdict", "kind"), [("refuted", "continuations"), ("confirmed", "topk"), ("unknown", "topk")]
)
def test_what_a_probe_has_disproved_is_not_taken(make: Make, verdict: str, kind: str) -> None:
    config = make(Capabilities(continuation="raw", score=True, topk=20))
    keep_probe(config, verdict)
    assert chosen(config)[0] == kind


def test_a_kind_by_name_is_refused_too_if_a_probe_disproved_it(make: Make) -> None:
    config = make(Capabilities(score=True), signal="scores")
    keep_probe(config, "refuted")
    with pytest.raises(ConfigError, match="no log-probs of given text"):
        settle(config)


def test_the_choice_is_written_out_and_reads_back_the_same(make: Make) -> None:
    config, _ = settle(make(Capabilities(score=True, topk=20)))
    again = load_config(yaml.safe_load(dump_config(config)))
    assert again == config
    assert settle(again)[0] == config


def test_an_open_choice_reads_back_the_same(make: Make) -> None:
    config = make(FULL, "method.anchor.beta=0.25")
    assert load_config(yaml.safe_load(dump_config(config))) == config


def test_s7_a_run_keeps_the_kind_that_it_began_with(make: Make) -> None:
    began, _ = settle(make(Capabilities(continuation="raw", score=True)))
    began.output.mkdir()
    (began.output / "config.yaml").write_text(dump_config(began))
    assert chosen(make(FULL))[:2] == ("scores", "opd")
    assert chosen(make(FULL, signal="logits"))[0] == "logits"  # what is asked for by name is not guessed at


def test_several_teachers_give_what_all_of_them_give(make: Make, llama_folder: Path, qwen_folder: Path) -> None:
    def routed(*folders: Path) -> RunConfig:
        parts = {f"t{i}": {"type": "transformers", "path": str(folder)} for i, folder in enumerate(folders)}
        return make(TEXT, teacher={"type": "routed", "teachers": parts, "weights": dict.fromkeys(parts, 1)})

    assert chosen(routed(llama_folder, llama_folder))[0] == "logits"
    assert chosen(routed(llama_folder, qwen_folder))[:2] == ("logits", "bpm")


def test_a_recording_is_not_guessed_at(make: Make) -> None:
    with pytest.raises(ConfigError, match="signal: auto: a recording holds what its run asked for"):
        settle(make(TEXT, teacher={"type": "replay", "path": "answers.sqlite"}))


def test_a_teacher_that_promises_nothing_needs_a_method(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(TEXT)
    monkeypatch.setattr("omniopd.choosing.TEACHERS.get", lambda name: object)
    with pytest.raises(ConfigError, match="signal: the teacher type openai does not say what it offers"):
        offers(config)
