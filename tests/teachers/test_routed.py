"""Several teachers in one run: who is asked, what is said of each, and that a run with them is like any other."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from omniopd.cli import main
from omniopd.errors import BudgetSpent, ConfigError, DataError, TeacherError
from omniopd.ledger import Ledger
from omniopd.store import Store
from omniopd.types import Capabilities, Message, Prompt
from teachers.routed import RoutedConfig, RoutedTeacher

STUDENT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "student"
PARTS = {name: {"type": "openai", "model": name, "base_url": "http://127.0.0.1:9/v1"} for name in ("maths", "prose")}


def config(**settings: Any) -> RoutedConfig:
    return RoutedConfig(**{"teachers": PARTS, **settings})


def prompt(name: str, **extras: Any) -> Prompt:
    return Prompt(name, (Message("user", f"What is {name}?"),), extras=extras)


# ---------------------------------------------------------------------- who is asked


def test_a_column_names_the_teacher() -> None:
    by = config(by="subject")
    assert [by.route(prompt("p", subject=name)) for name in ("maths", "prose")] == ["maths", "prose"]


@pytest.mark.parametrize(
    ("extras", "said"),
    [
        ({"subject": "music"}, "holds 'music' in 'subject'"),
        ({"subject": None}, "holds None in 'subject'"),
        ({"subject": ["maths"]}, r"holds \['maths'\] in 'subject'"),
        ({"subject": 1}, "holds 1 in 'subject'"),
        ({"topic": "maths"}, "has no column 'subject'"),
    ],
)
def test_a_column_that_names_nobody_is_one_line_or_goes_to_the_default(extras: dict[str, Any], said: str) -> None:
    with pytest.raises(
        DataError, match=rf"^teacher\.by: prompt p7 {said}.*maths, prose.*task\.extras.*default"
    ) as error:
        config(by="subject").route(prompt("p7", **extras))
    assert "\n" not in str(error.value)
    assert config(by="subject", default="prose").route(prompt("p7", **extras)) == "prose"


def test_a_long_value_is_not_told_in_full() -> None:
    with pytest.raises(DataError) as error:
        config(by="subject").route(prompt("p", subject="x" * 10_000))
    assert len(str(error.value)) < 400


def test_weights_are_shares_and_a_prompt_keeps_its_teacher() -> None:
    prompts = [prompt(f"p{number}") for number in range(4000)]
    routes = [config(weights={"maths": 3, "prose": 1}).route(one) for one in prompts]
    assert 0.72 < routes.count("maths") / 4000 < 0.78  # four standard deviations
    again = config(weights={"prose": 0.25, "maths": 0.75})  # the same shares, in another order
    assert [again.route(one) for one in prompts[::-1]] == routes[::-1]
    more = [config(weights={"maths": 4, "prose": 1}).route(one) for one in prompts]
    assert sum(one != other for one, other in zip(routes, more, strict=True)) < 0.08 * 4000  # few move: 5 % of them


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(lambda weights: sum(weights) > 0), st.text())
def test_any_weights_lead_to_a_teacher_of_some_weight(weights: list[float], name: str) -> None:
    given_weights = {f"t{index}": weight for index, weight in enumerate(weights)}
    made = RoutedConfig.model_construct(teachers=dict.fromkeys(given_weights), weights=given_weights, by=None)
    assert given_weights[made.route(Prompt(name, ()))] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "one of the two"),
        ({"by": "subject", "weights": {"maths": 1}}, "one of the two"),
        ({"weights": {"maths": 1, "music": 1}}, "'music' is none of the teachers: maths, prose"),
        ({"by": "subject", "default": "music"}, "'music' is none of the teachers"),
        ({"weights": {"maths": 1, "prose": -1}}, "must not be negative"),
        ({"weights": {"maths": 0}}, "one must be above 0"),
        ({"weights": {}}, "one must be above 0"),
        ({"weights": {"maths": float("nan")}}, "must not be negative"),
        ({"by": "subject", "teachers": {}}, "at least 1"),
        ({"by": "subject", "teachers": {"maths": {"type": "opanai"}}}, "openai"),
        ({"by": "subject", "teachers": {"maths": {"type": "openai", "model": "m", "modle": 1}}}, "modle"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**settings)


# ---------------------------------------------------------------------- what comes back

Made = Callable[..., RoutedTeacher]


@pytest.fixture
def serve(bench: Any) -> Iterator[Callable[[Any], str]]:
    """Puts scripts on sockets."""
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(bench.serving(script))


def saying(bench: Any, text: str, **usage: Any) -> Any:
    return bench.Script(
        lambda body: bench.say(*(f" {text}" for _ in range(body.get("n", 1))), finish="length", **usage)
    )


@pytest.fixture
def make(bench: Any, serve: Callable[[Any], str]) -> Made:
    """A routed teacher over scripts by name; `each` are settings of single ones."""

    def build(
        scripts: dict[str, Any], ledger: Ledger | None = None, each: Any = None, **settings: Any
    ) -> RoutedTeacher:
        common = {"type": "openai", "api_key_env": None, "continuation": "prefill", "max_attempts": 1}
        teachers = {
            name: {**common, "model": name, "base_url": serve(script), **(each or {}).get(name, {})}
            for name, script in scripts.items()
        }
        return RoutedTeacher(RoutedConfig(teachers=teachers, **settings), bench.store, ledger)

    return build


def queries(bench: Any, *names: str, n: int = 2) -> list[Any]:
    return [
        replace(bench.continue_query(row=row, seed=100 * row, n=n), prompt=prompt(f"p{row}", subject=name))
        for row, name in enumerate(names)
    ]


def test_each_query_goes_to_its_teacher_and_evidence_says_to_which(bench: Any, make: Made) -> None:
    scripts = {"maths": saying(bench, "four"), "prose": saying(bench, "a rose", usage=(7, 3))}
    teacher, heard = make(scripts, by="subject"), list[tuple[int, int]]()
    asked = queries(bench, "maths", "prose", "prose", "maths", "prose")
    found = asyncio.run(teacher.gather(asked, lambda *done: heard.append(done)))
    assert [one.query for one in found] == asked
    assert [one.teacher for one in found] == ["maths", "prose", "prose", "maths", "prose"]
    assert [{reply.text for reply in one.replies} for one in found] == [
        {{"maths": " four", "prose": " a rose"}[one.teacher]} for one in found
    ]
    assert [one.usage.prompt_tokens for one in found] == [100, 7, 7, 100, 7]
    assert (scripts["maths"].calls, scripts["prose"].calls) == (2, 3)
    assert heard == [(done, 5) for done in (1, 2, 3, 4, 5)]
    assert asyncio.run(teacher.gather([])) == []
    asyncio.run(teacher.close())


def test_capabilities_are_what_all_of_them_offer(make: Made, bench: Any) -> None:
    scripts = {"maths": saying(bench, "x"), "prose": saying(bench, "y"), "third": saying(bench, "z")}
    teacher = make(scripts, by="subject", each={"maths": {"logprobs": 5}, "prose": {"logprobs": 3}})
    assert teacher.capabilities == Capabilities(continuation="prefill", gen_logprobs=0)
    parts = {
        "a": Capabilities(continuation="raw", score=True, topk=50, logits=True, hidden=True, gen_logprobs=20),
        "b": Capabilities(continuation="prefill", score=True, topk=20, logits=True, gen_logprobs=5),
    }
    for name, offers in parts.items():
        teacher._parts[name] = type("Part", (), {"capabilities": offers})()
    teacher._parts = {name: teacher._parts[name] for name in parts}
    assert teacher.capabilities == Capabilities(
        continuation="prefill", score=True, topk=20, logits=True, hidden=False, gen_logprobs=5
    )
    for rung in ("instruct", None):
        teacher._parts["c"] = type("Part", (), {"capabilities": Capabilities(answer=False, continuation=rung)})()
        assert teacher.capabilities == Capabilities(answer=False, continuation=rung)


def test_a_failing_teacher_is_named_in_one_line_and_what_the_other_brings_is_kept(bench: Any, make: Made) -> None:
    slow = bench.say(" late", " late", finish="length")
    slow.delay_s = 0.5
    refusing = bench.Script([bench.Said(401, {"error": {"message": "no\nsuch key"}})])
    teacher = make({"maths": bench.Script([slow]), "prose": refusing}, by="subject")
    with pytest.raises(TeacherError, match=r"^teacher\.teachers\.prose: the key was refused by http://127") as error:
        asyncio.run(teacher.gather(queries(bench, "maths", "prose")))
    assert "\n" not in str(error.value)
    assert bench.store.stats().answers == 2  # it was under way


def test_what_is_under_way_is_kept_also_where_a_second_teacher_fails_meanwhile(bench: Any, make: Made) -> None:
    slow = bench.say(" late", " late", finish="length")
    slow.delay_s = 0.8

    def failing(delay_s: float) -> Any:
        return bench.Script(lambda body: slow if body["seed"] else bench.Said(401, {}, delay_s=delay_s))

    asked = queries(bench, "maths", "maths", "prose")
    asked[2] = replace(asked[2], seed=0)
    teacher = make({"maths": failing(0.1), "prose": failing(0.4)}, by="subject")
    with pytest.raises(TeacherError):
        asyncio.run(teacher.gather(asked))
    assert bench.store.stats().answers == 2


def test_a_teacher_that_cannot_be_made_is_named(bench: Any, make: Made) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.teachers\.prose: .*NO_SUCH_KEY is not set"):
        make(
            {"maths": saying(bench, "x"), "prose": saying(bench, "y")},
            by="subject",
            each={"prose": {"api_key_env": "NO_SUCH_KEY"}},
        )
    with pytest.raises(ConfigError, match=r"^teacher\.teachers\.prose: budget_usd: no price is known .*'prose'"):
        priced = {"maths": {"price": {"prompt": 1}}}
        ledger = Ledger(bench.store, budget_usd=1.0)
        make({"maths": saying(bench, "x"), "prose": saying(bench, "y")}, ledger, by="subject", each=priced)


def test_the_budget_is_one_for_all_of_them_also_while_one_of_them_fails(bench: Any, make: Made) -> None:
    """Calls under way of a teacher that has failed are paid yet: what is reserved for them is not another's to spend."""
    slow = bench.say(" late", " late", finish="length", usage=(100, 20))
    slow.delay_s = 0.4
    price = {"prompt": 1000, "completion": 1000}  # 0.12 dollars a call, at most 0.2 or so
    failing = bench.Script(lambda body: bench.Said(401, {}, delay_s=0.2) if body["seed"] == 0 else slow)
    scripts = {"maths": failing, "prose": saying(bench, "x", usage=(100, 20))}
    ledger = Ledger(bench.store, "run", budget_usd=1.5)
    teacher = make(scripts, ledger, by="subject", each={name: {"price": price} for name in scripts})
    with pytest.raises((TeacherError, BudgetSpent)):
        asyncio.run(teacher.gather(queries(bench, *["maths"] * 6, *["prose"] * 60)))
    assert ledger.spent == pytest.approx(bench.store.spent("run"))
    assert bench.store.stats().calls > 6
    assert ledger.spent <= 1.5
    assert ledger.reserved == 0


def test_the_fingerprint_follows_the_teachers_and_the_routing(bench: Any) -> None:
    def mark(**settings: Any) -> str:
        given = {name: {**part, "api_key_env": None} for name, part in PARTS.items()}
        return RoutedTeacher(RoutedConfig(**{"teachers": given, "by": "subject", **settings}), bench.store).fingerprint

    given = {name: {**part, "api_key_env": None} for name, part in PARTS.items()}
    base = mark()
    assert mark(teachers=dict(reversed(given.items()))) == base
    others = [
        {"by": "topic"},
        {"default": "maths"},
        {"by": None, "weights": {"maths": 1, "prose": 1}},
        {"by": None, "weights": {"maths": 2, "prose": 1}},
        {"teachers": {**given, "prose": {**given["prose"], "model": "another"}}},
        {"teachers": {**given, "prose": {**given["prose"], "temperature": 0.5}}},
        {"teachers": {**given, "third": given["prose"]}},
        {"teachers": {"maths": given["prose"], "prose": given["maths"]}},
    ]
    assert len({base, *(mark(**one) for one in others)}) == len(others) + 1
    turned = [mark(by=None, weights=weights) for weights in ({"maths": 2, "prose": 1}, {"prose": 1, "maths": 2})]
    assert turned[0] == turned[1]


# ---------------------------------------------------------------------- whole runs


@pytest.fixture
def run(bench: Any, serve: Callable[[Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`omniopd train` with two teachers by a column of the data; gives the exit code and what stood on stderr."""
    rows = [
        {"prompt": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1), "subject": ("maths", "prose")[n % 2]}
        for n in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def answer(body: dict[str, Any]) -> Any:
        if body["model"] == "prose":
            return bench.say(*["", " and so on"][: body.get("n", 1)], finish="length")
        return bench.say(*(f" {body['seed'] % 90 + i} + 1" for i in range(body.get("n", 1))), finish="length")

    script = bench.Script(answer)
    url = serve(script)
    common = {"type": "openai", "base_url": url, "api_key_env": None, "continuation": "prefill", "max_attempts": 1}
    settings = {
        "student": {"path": str(STUDENT), "max_new_tokens": 32},
        "teacher": {
            "type": "routed",
            "by": "subject",
            "teachers": {n: {**common, "model": n} for n in ("maths", "prose")},
        },
        "task": {"type": "jsonl", "path": str(tmp_path / "data.jsonl"), "extras": ["subject"]},
        "method": {"name": "omniopd", "chunks": 2, "chunk_tokens": 6, "continuations": 2},
        "train": {"steps": 2, "prompts_per_step": 8, "learning_rate": 1e-4, "save_every": 1},
        "eval": {"problems": 0},
    }

    class Command:
        calls = property(lambda self: script.calls)
        teacher = settings["teacher"]

        def __call__(self, *words: str, name: str = "run") -> tuple[int, str]:
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / name)}))
            capsys.readouterr()
            return main(["train", str(path), *words]), capsys.readouterr().err

    return Command()


def test_a_run_tells_of_each_teacher_and_can_be_replayed(run: Any, tmp_path: Path) -> None:
    code, said = run()
    assert code == 0
    assert "has spoken about no token" not in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        each = row["teachers"]
        assert each.keys() == {"maths", "prose"}
        assert sum(one["queries"] for one in each.values()) == row["queries"] > 8
        assert each["maths"]["replies"] == 2 * each["maths"]["queries"]
        assert each["prose"]["replies"] == each["prose"]["rejected empty"] == each["prose"]["queries"]
        assert each["maths"]["tokens"] == 6 * each["maths"]["queries"]
        assert row["rejects"] == {"empty": each["prose"]["rejected empty"]}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["teacher"]["each"]
    for name, one in summary.items():
        counts = sum((Counter(row["teachers"][name]) for row in rows), Counter[str]())
        assert {key: value for key, value in one.items() if key != "share"} == counts
    assert sum(one["share"] for one in summary.values()) == pytest.approx(1)
    assert 0 < summary["maths"]["share"] < 1

    calls, recorded = run.calls, tmp_path / "run" / "answers.sqlite"
    store = Store(recorded)
    prints = {print_.split("/")[1].split("@")[0]: print_ for print_ in store.teachers()}
    store.close()
    parts = {name: {"type": "replay", "path": str(recorded), "fingerprint": prints[name]} for name in prints}
    code, said = run(f"teacher={json.dumps({'type': 'routed', 'by': 'subject', 'teachers': parts})}", name="again")
    assert (code, run.calls) == (0, calls)
    weights = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "again")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    marks = [
        json.loads((tmp_path / name / "manifest.json").read_text())["teacher_fingerprint"] for name in ("run", "again")
    ]
    assert marks[0] == marks[1]
    again = json.loads((tmp_path / "again" / "summary.json").read_text())["teacher"]["each"]
    assert again == summary


def test_a_teacher_without_any_share_is_pointed_out(run: Any) -> None:
    code, said = run("teacher.by=null", "teacher.weights={maths: 1, prose: 0}", "train.steps=1")
    assert code == 0
    assert "caution: teacher 'prose' has spoken about no token in 1 steps" in said
    assert "'maths' has spoken" not in said


def test_a_resumed_run_refuses_when_one_of_the_teachers_has_changed(run: Any, tmp_path: Path) -> None:
    assert run("train.steps=1")[0] == 0
    calls = run.calls
    code, said = run("teacher.teachers.prose.model=another", "--resume")
    assert (code, run.calls) == (2, calls)
    (line,) = [line for line in said.splitlines() if line.startswith("omniopd: ")]
    assert line.startswith("omniopd: teacher: the run began with routed/maths+prose#")
    code, said = run("teacher.teachers.prose.timeout_s=30", "--resume")  # that is no other teacher
    assert (code, run.calls > calls) == (0, True)


def test_a_prompt_without_a_teacher_is_found_before_anything_is_asked(run: Any, tmp_path: Path) -> None:
    code, said = run("task.extras=[]")
    assert (code, run.calls) == (2, 0)
    (line,) = [line for line in said.splitlines() if line.startswith("omniopd: ")]
    assert "has no column 'subject'" in line and "task.extras" in line
    assert not (tmp_path / "run").exists()
