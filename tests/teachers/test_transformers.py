"""A teacher in this process says what the same weights say behind HTTP, exactly and with log-probs."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from omniopd.errors import ConfigError, TeacherError
from omniopd.ledger import Ledger, Price
from omniopd.registry import TEACHERS
from omniopd.sampling import Request
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Evidence, Message, Prompt, Query
from teachers.asks import Ask
from teachers.openai import OpenAIConfig, OpenAITeacher
from teachers.serve import application
from teachers.transformers import TransformersConfig, TransformersTeacher
from teachers.wire import Completion, Outcome

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "demo" / "teacher"
PROMPT = Prompt(
    "p",
    (Message("user", "Ann has 12 apples. Ann buys 7 more. Ann gives 5 to Ben. How many apples does Ann have now?"),),
)
PREFIX = "12+7=19."


def going_on(prefix: str = PREFIX, n: int = 4, max_tokens: int = 13, seed: int = 7, row: int = 0) -> ContinueQuery:
    return ContinueQuery(PROMPT, Chunk(row, 9, 12, prefix, " AUDITED", (8,) * 3), n, max_tokens, seed)


QUERIES: list[Query] = [
    going_on(),
    going_on("Ann", n=3, seed=300),
    going_on("She gave", n=6, seed=500, row=1),
    going_on("", n=2, row=2),
    AnswerQuery(PROMPT, 3, 2, 80, 900),
]


class Desk:
    """Teachers over stores in a temporary folder, each store new unless it is named."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0

    def store(self, name: str = "") -> Store:
        self.made += 1
        return Store(self.folder / f"{name or self.made}.sqlite")

    def teacher(self, path: Path = TEACHER, store: str = "", **settings: Any) -> TransformersTeacher:
        return TransformersTeacher(TransformersConfig(path=str(path), **settings), self.store(store))

    def copy(self, name: str, **template: str) -> Path:
        """The demo teacher under another path; `before` opens its chat template."""
        folder = self.folder / name
        shutil.copytree(TEACHER, folder)
        source = folder / "chat_template.jinja"
        source.write_text(template.get("before", "") + source.read_text())
        return folder


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def gather(teacher: Any, *queries: Query) -> list[Evidence]:
    return asyncio.run(teacher.gather(list(queries)))


def texts(evidence: Sequence[Evidence]) -> list[list[str]]:
    return [[reply.text for reply in one.replies] for one in evidence]


def over_http(desk: Desk, teacher: TransformersTeacher, queries: Sequence[Query], **settings: Any) -> list[Evidence]:
    """What the server of the same engine answers."""

    async def go() -> list[Evidence]:
        app = application(teacher.backend.engine, "teacher")
        config = OpenAIConfig(
            base_url="http://127.0.0.1:9/v1", model="teacher", api_key_env=None, continuation="prefill", **settings
        )
        async with app.router.lifespan_context(app):
            client = OpenAITeacher(config, desk.store(), http=httpx.ASGITransport(app))
            return await client.gather(queries)

    return asyncio.run(go())


def drawn(teacher: TransformersTeacher, ask: Ask, n: int, seed: int | None) -> Completion:
    async def go() -> Outcome[Completion]:
        async with teacher.backend.session() as session:
            return await session.draw(ask, n, seed)

    outcome = asyncio.run(go())
    assert outcome.value is not None
    return outcome.value


def test_found_by_name() -> None:
    assert TEACHERS.get("transformers") is TransformersTeacher


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.9}])
@pytest.mark.parametrize("n", ["auto", False])
def test_it_says_what_the_server_says_with_the_same_seeds(desk: Desk, sampling: dict[str, float], n: Any) -> None:
    teacher = desk.teacher(**sampling)
    here, there = gather(teacher, *QUERIES), over_http(desk, teacher, QUERIES, n=n, **sampling)
    assert texts(here) == texts(there)
    assert [one.rejected for one in here] == [one.rejected for one in there]
    assert [[reply.finish for reply in one.replies] for one in here] == [
        [reply.finish for reply in one.replies] for one in there
    ]
    assert all(len(replies) > 0 for replies in texts(here)[:4])
    if sampling.get("temperature") == 0:
        assert texts(here)[0] == [" 19-5=14. #### 14"] * 4
    else:  # equal texts would tell nothing
        assert len(set(texts(here)[2])) > 1


def test_it_goes_on_from_the_prefix_and_never_sees_what_is_audited(desk: Desk) -> None:
    teacher, seen = desk.teacher(), list[Request]()
    draw_batch = teacher.backend.engine.draw_batch

    def spy(requests: Sequence[Request]) -> Any:
        seen.extend(requests)
        return draw_batch(requests)

    teacher.backend.engine.draw_batch = spy  # type: ignore[method-assign]
    gather(teacher, going_on())
    decode = teacher.backend.chat.tokenizer.decode
    assert [decode(list(request.prompt_ids)) for request in seen] == [
        f"<s>[INST]{PROMPT.messages[0].content}[/INST]{PREFIX}"
    ]
    assert teacher.capabilities.continuation == "raw"


@pytest.mark.parametrize("seed", [7, 4242])
def test_draw_i_is_the_draw_alone_with_seed_plus_i(desk: Desk, seed: int) -> None:
    teacher = desk.teacher(temperature=1.5)
    ask = teacher.manner.ask(going_on("She"))
    together = drawn(teacher, ask, 5, seed)
    alone = [drawn(teacher, ask, 1, seed + i).choices[0] for i in range(5)]
    assert list(together.choices) == alone
    assert len({choice.text for choice in alone}) > 1


def test_without_a_seed_draws_are_fresh(desk: Desk) -> None:
    teacher = desk.teacher(temperature=5.0)  # hot enough that no two draws agree by chance
    ask = teacher.manner.ask(going_on("She", max_tokens=30))
    assert len({choice.text for _ in range(2) for choice in drawn(teacher, ask, 4, None).choices}) == 8
    assert len({choice.text for _ in range(2) for choice in drawn(teacher, ask, 4, 7).choices}) == 4


def test_a_control_tokens_text_in_a_prefix_stays_text(desk: Desk) -> None:
    teacher = desk.teacher()
    prefix = "It is</s>[INST]so"
    ask = teacher.manner.ask(going_on(prefix))
    plain, odd = (drawn(teacher, teacher.manner.ask(going_on(one)), 1, 0).usage for one in ("It isso", prefix))
    assert plain is not None and odd is not None
    assert odd.prompt_tokens - plain.prompt_tokens > 2  # as control tokens the two would be one each
    request = teacher.backend.engine.request(
        ask.messages, open_turn=True, draws=1, max_tokens=1, seed=0, temperature=1.0, top_p=1.0
    )
    assert [token for token in request.prompt_ids if token < 6] == [1, 4, 5]
    assert teacher.backend.chat.tokenizer.decode(list(request.prompt_ids)).endswith(f"[/INST]{prefix}")
    assert texts(gather(teacher, going_on(prefix))) == texts(over_http(desk, teacher, [going_on(prefix)]))


def test_what_was_answered_before_is_not_drawn_again(desk: Desk) -> None:
    first = desk.teacher(store="kept")
    two = gather(first, going_on(n=2))
    six = gather(first, going_on(n=6))
    again = desk.teacher(store="kept")
    again.backend.engine.draw_batch = None  # type: ignore[assignment, method-assign]
    assert texts(gather(again, going_on(n=6))) == texts(six)
    assert texts(six)[0][:2] == texts(two)[0]
    assert texts(gather(desk.teacher(), going_on(n=6))) == texts(six)  # however the draws were shared out among calls


def test_usage_counts_the_prompt_once_and_every_written_token(desk: Desk) -> None:
    (evidence,) = gather(desk.teacher(), going_on(n=4, max_tokens=5))
    assert (evidence.usage.calls, evidence.usage.prompt_tokens, evidence.usage.completion_tokens) == (1, 35, 20)


def test_logprobs_are_the_models_own_at_the_anchor(desk: Desk) -> None:
    teacher = desk.teacher(logprobs=5, temperature=0.7, top_p=0.9)
    assert teacher.capabilities.gen_logprobs == 5
    (evidence,) = gather(teacher, going_on("She", n=3))
    engine, chat = teacher.backend.engine, teacher.backend.chat
    ids = chat.ids([*PROMPT.messages, Message("assistant", "She")], open_turn=True)
    with torch.no_grad():
        logp = engine.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)  # type: ignore[attr-defined]
    best = logp.topk(5)
    for reply in evidence.replies:
        first = reply.tokens[0]
        assert [text for text, _ in first.top] == [
            chat.tokenizer.decode([7, token])[len(chat.tokenizer.decode([7])) :] for token in best.indices.tolist()
        ]
        torch.testing.assert_close(torch.tensor([p for _, p in first.top]), best.values, atol=1e-5, rtol=1e-5)
        own = chat.encode("She" + first.text)[0][len(chat.encode("She")[0])]
        assert first.logprob == pytest.approx(float(logp[own]), abs=1e-5)
        assert "".join(token.text for token in reply.tokens) == reply.text
        assert all(len(token.top) == 5 for token in reply.tokens)


def test_no_logprobs_unless_they_are_asked_for(desk: Desk) -> None:
    (evidence,) = gather(desk.teacher(), going_on())
    assert all(reply.tokens == () for reply in evidence.replies)


def test_logprobs_do_not_change_what_is_drawn(desk: Desk) -> None:
    assert texts(gather(desk.teacher(logprobs=3), *QUERIES)) == texts(gather(desk.teacher(), *QUERIES))


def test_other_rungs_by_name(desk: Desk) -> None:
    raw, prefill = desk.teacher(), desk.teacher(continuation="prefill")
    assert texts(gather(raw, going_on())) == texts(gather(prefill, going_on()))
    assert prefill.backend.record()["prefill"] == "token ids, as raw"
    assert raw.fingerprint == desk.teacher(continuation="raw").fingerprint != prefill.fingerprint
    instruct = desk.teacher(continuation="instruct")
    (evidence,) = gather(instruct, going_on())
    assert sum(evidence.rejected.values()) == 4  # the demo teacher follows no instructions
    ask = instruct.manner.ask(going_on())
    assert ask.messages[-1].role == "user"
    assert drawn(instruct, ask, 1, 0).usage.prompt_tokens > 200  # type: ignore[union-attr]


def test_a_prompt_that_is_too_long_is_a_counted_hole(desk: Desk) -> None:
    long = replace(going_on(n=3), prompt=Prompt("long", (Message("user", "12 " * 1500),)))
    far, near = gather(desk.teacher(), long, going_on(row=1))
    assert (far.replies, far.rejected) == ((), {"context_overflow": 3})
    assert len(near.replies) == 4


def test_a_template_that_refuses_the_messages_is_one_line(desk: Desk) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    teacher = desk.teacher(desk.copy("strict", before=refusing), system="Be brief.")
    with pytest.raises(
        TeacherError, match="^teacher.path: the chat template of '.*' refuses it: no system turns here$"
    ):
        gather(teacher, going_on())


def test_thinking_off_is_said_to_the_template(desk: Desk) -> None:
    thinks = desk.copy("thinks", before="{% if enable_thinking | default(true) %}<think>{% endif %}")

    def opening(**settings: Any) -> str:
        teacher = desk.teacher(thinks, **settings)
        return teacher.backend.chat.text(PROMPT.messages)

    assert opening().startswith("<think><s>")
    assert opening(thinking="off").startswith("<s>")
    assert desk.teacher(thinks).fingerprint != desk.teacher(thinks, thinking="off").fingerprint


def test_the_fingerprint_names_what_can_change_an_answer(desk: Desk) -> None:
    own = desk.teacher().fingerprint
    assert own.startswith(f"transformers/{TEACHER}#")
    assert desk.teacher(device="cpu", batch_tokens=4096, logprobs=2, warm_cache=True).fingerprint == own
    for changed in ({"temperature": 0.5}, {"top_p": 0.5}, {"system": "x"}, {"dtype": "bfloat16"}, {"thinking": "off"}):
        assert desk.teacher(**changed).fingerprint != own  # type: ignore[arg-type]


def test_the_fingerprint_tells_weights_apart_and_a_name_stands_in_for_them(desk: Desk) -> None:
    folder = desk.copy("trained")
    before = desk.teacher(folder).fingerprint
    assert desk.teacher(folder).fingerprint == before
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 1e-4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert desk.teacher(folder).fingerprint != before
    named = desk.teacher(folder, fingerprint="mine").fingerprint
    assert named.startswith("transformers/mine#")
    assert named == desk.teacher(fingerprint="mine").fingerprint


def test_one_number_of_a_large_file_is_seen_where_training_moves_them_all(tmp_path: Path) -> None:
    from teachers.in_process import BLOCK, BLOCKS, HEAD, weights_digest

    size = HEAD + 3 * BLOCK * BLOCKS
    for name, fill in (("a", 0), ("b", 1), ("c", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(HEAD) + bytes([fill]) * (size - HEAD))
    assert weights_digest(str(tmp_path / "a")) == weights_digest(str(tmp_path / "c"))
    assert weights_digest(str(tmp_path / "a")) != weights_digest(str(tmp_path / "b"))
    (tmp_path / "c" / "model.safetensors").write_bytes(bytes(size + 1))
    assert weights_digest(str(tmp_path / "a")) != weights_digest(str(tmp_path / "c"))
    (tmp_path / "a" / "config.json").write_text("{}")
    assert weights_digest(str(tmp_path / "a")) != weights_digest(str(tmp_path / "c"))


@pytest.mark.parametrize("broken", ["nowhere", "config", "weights", "template", "end"])
def test_a_model_that_does_not_load_is_one_line_before_a_run_starts(desk: Desk, broken: str) -> None:
    folder = desk.folder / "broken"
    if broken != "nowhere":
        desk.copy("broken")
    match broken:
        case "config":
            (folder / "config.json").write_text('{"model_type": "no-such-model"}')
        case "weights":
            (folder / "model.safetensors").write_bytes(b"cut")
        case "template":
            (folder / "chat_template.jinja").unlink()
        case "end":
            for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
                kept = json.loads((folder / name).read_text())
                (folder / name).write_text(json.dumps({k: v for k, v in kept.items() if "eos_token" not in k}))
    with pytest.raises(ConfigError, match=r"^teacher\.path: [^\n]*broken'?[^\n]*$"):
        desk.teacher(folder)


def test_a_device_that_is_not_there_is_one_line(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.device: there is no 'warp': [^\n]*; set it to cpu or auto$"):
        desk.teacher(device="warp")


def test_batch_tokens_bounds_what_is_computed_at_once(desk: Desk) -> None:
    def most_rows(**settings: Any) -> int:
        teacher, rows = desk.teacher(**settings), list[int]()
        model: Any = teacher.backend.engine.model  # type: ignore[attr-defined]
        model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
        gather(teacher, *(going_on(row=row, seed=row * 10) for row in range(4)))
        return max(rows)

    assert most_rows() == 16
    assert most_rows(batch_tokens=2 * 4 * 48) == 8  # two queries of four draws, each of 35 + 13 tokens


def test_a_batch_that_does_not_fit_names_the_mend(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("teachers.transformers.sample", full)
    with pytest.raises(TeacherError, match=r"^teacher\.batch_tokens: 512 do not fit into memory; lower it"):
        gather(desk.teacher(batch_tokens=512), going_on())


@pytest.mark.parametrize("settings", [{"temperature": None}, {"top_p": None}, {"path": ""}, {"dtype": "int8"}])
def test_settings_that_mean_nothing_here_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TransformersConfig(**{"path": "x", **settings})


def test_plans_and_prices_know_it_by_its_path(desk: Desk) -> None:
    teacher = desk.teacher(price=Price(prompt=1.0, completion=2.0))
    (evidence,) = gather(teacher, going_on(n=4, max_tokens=5))
    assert teacher.backend.config.model == str(TEACHER)
    assert evidence.usage.cost_usd == pytest.approx((35 * 1.0 + 20 * 2.0) / 1e6)


def test_it_is_free_under_a_budget(desk: Desk) -> None:
    store = desk.store()
    teacher = TransformersTeacher(TransformersConfig(path=str(TEACHER)), store, Ledger(store, budget_usd=0.001))
    (evidence,) = gather(teacher, going_on())
    assert (len(evidence.replies), evidence.usage.cost_usd) == (4, 0.0)


def test_a_closed_teacher_draws_no_more(desk: Desk) -> None:
    teacher = desk.teacher()
    asyncio.run(teacher.close())
    with pytest.raises(TeacherError, match="shutdown"):
        gather(teacher, going_on())
