"""The prompt check: families differ in markup and in nothing else, and whatever else differs is found."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from omniopd.chat import ChatTemplate
from omniopd.cli import main
from omniopd.errors import ConfigError
from omniopd.prompt_check import Compared, check_prompts, compare_prompts, shown
from omniopd.types import Message, Prompt
from students.policy import Policy

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
SYSTEM, USER = Message("system", "Think of\nthe sea."), Message("user", "What is 12 + 7? ")
ASSISTANT = Message("assistant", "It is 19, the model says.")
PLAIN, WITH_SYSTEM = Prompt("plain", (USER,)), Prompt("system", (SYSTEM, USER))
TALK = Prompt("talk", (USER, ASSISTANT, Message("user", "And 19 + 1?")))

# Shortened, with the habits of the real ones.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}\n{% elif m['role'] == 'assistant' %}"
    "ASSISTANT: {{ m['content'] }}</s>\n{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}ASSISTANT:"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n{% else %}{{ m['content'] }}\n\n{% endif %}"
    "{% endfor %}### Response:\n"
)
FAMILIES = {"chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL, "vicuna": VICUNA, "alpaca": ALPACA}

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
DATED = "<|im_start|>system\nToday Date: 26 Jul 2024<|im_end|>\n" + CHATML
NO_THOUGHT = CHATML + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
SHOUTS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
DOUBLE_BOS = "<s>" + tiny.PIECE_TEMPLATE
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + GEMMA


CONTROL = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>")


def model(template: str, control: tuple[str, ...] = CONTROL) -> ChatTemplate:
    """A tokenizer with this template, and these control tokens besides its own."""
    tokenizer = copy.deepcopy(tiny.pieces())
    tokenizer.add_special_tokens({"additional_special_tokens": list(control)})
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


class Teller:
    """A teacher that tells what its model is shown, with its tokenizer or (as some servers) without."""

    def __init__(self, chat: ChatTemplate, *, alone: bool = False) -> None:
        self.chat, self.alone, self.asked = chat, alone, list[str]()

    async def shown(self, prompt: Prompt) -> tuple[str, Any]:
        self.asked.append(prompt.id)
        return self.chat.text(prompt.messages), None if self.alone else self.chat.tokenizer


def student(template: str) -> Policy:
    chat = model(template)
    return SimpleNamespace(chat=chat, tokenizer=chat.tokenizer)  # type: ignore[return-value]


def compare(own: str, other: str, *prompts: Prompt, alone: bool = False) -> Compared:
    found = asyncio.run(compare_prompts(student(own), Teller(model(other), alone=alone), prompts or (PLAIN,)))  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("prompt", [PLAIN, TALK, WITH_SYSTEM], ids=lambda prompt: prompt.id)
@pytest.mark.parametrize("alone", [False, True], ids=["its tokenizer", "text only"])
@pytest.mark.parametrize("other", FAMILIES)
@pytest.mark.parametrize("own", FAMILIES)
def test_families_differ_in_markup_and_in_nothing_else(own: str, other: str, alone: bool, prompt: Prompt) -> None:
    assert compare(FAMILIES[own], FAMILIES[other], prompt, alone=alone).differences == ()


@pytest.mark.parametrize(
    ("template", "prompt", "said"),
    [
        (DEFAULT_SYSTEM, PLAIN, "the teacher's template adds 'You are a helpful assistant.'"),
        (DATED, PLAIN, "the teacher's template adds 'Today Date: 26 Jul 2024'"),
        (NO_THOUGHT, PLAIN, "the teacher's template adds '<think> </think>'"),
        (DROPS_SYSTEM, WITH_SYSTEM, "the teacher's template drops or changes message 1"),
        (SHOUTS, PLAIN, "the teacher's template drops or changes message 1"),
    ],
)
@pytest.mark.parametrize("alone", [False, True], ids=["its tokenizer", "text only"])
def test_what_else_differs_is_found(template: str, prompt: Prompt, said: str, alone: bool) -> None:
    found = compare(CHATML, template, prompt, alone=alone)
    assert said in found.differences
    assert all(difference == said or "adds" in difference for difference in found.differences)
    # The other way about it is the student's doing, and where both do it, it is no difference.
    assert said.replace("teacher", "student") in compare(template, CHATML, prompt).differences
    assert compare(template, template, prompt).differences == ()


def test_a_thought_that_is_a_control_token_is_more_than_markup() -> None:
    policy = student(CHATML)
    teacher = Teller(model(NO_THOUGHT, (*CONTROL, "<think>", "</think>")))
    found = asyncio.run(compare_prompts(policy, teacher, (PLAIN,)))  # type: ignore[arg-type]
    assert found is not None
    assert found.differences == ("the teacher's template adds '<think> </think>'",)


def test_a_default_system_prompt_is_none_where_there_is_a_system_message() -> None:
    assert compare(CHATML, DEFAULT_SYSTEM, WITH_SYSTEM).differences == ()


def test_a_second_bos_is_found() -> None:
    found = compare(tiny.PIECE_TEMPLATE, DOUBLE_BOS)
    assert found.differences == ("the teacher's prompt begins with 2 beginning-of-text tokens",)
    assert {row[0]: row[1:] for row in found.rows}["BOS tokens"] == ("1", "2")


def test_a_bos_inside_the_text_is_no_second_one() -> None:
    chat = model(tiny.PIECE_TEMPLATE)
    quoted = Prompt("p", (Message("user", "What does <s> mean? <s><s>"),))
    assert shown(chat.text(quoted.messages), quoted.messages, chat.tokenizer).bos == 1


def test_a_template_that_refuses_the_messages_is_a_difference() -> None:
    found = compare(CHATML, REFUSES_SYSTEM, WITH_SYSTEM)
    assert len(found.differences) == 1
    assert "refuses the messages of prompt system" in found.differences[0]
    assert "no system role" in found.differences[0]


def test_one_prompt_of_each_shape_is_compared_and_the_one_that_differs_is_shown() -> None:
    policy, teacher = student(CHATML), Teller(model(DROPS_SYSTEM))
    prompts = [PLAIN, Prompt("plain again", PLAIN.messages), WITH_SYSTEM, TALK]
    found = asyncio.run(compare_prompts(policy, teacher, prompts))  # type: ignore[arg-type]
    assert teacher.asked == ["plain", "system", "talk"]
    assert found is not None
    assert found.differences == ("the teacher's template drops or changes message 1",)
    assert "the sea" in {row[0]: row[1] for row in found.rows}["prompt"]


def test_an_empty_message_is_not_lost() -> None:
    nothing = Prompt("p", (Message("system", " "), USER))
    assert compare(CHATML, DROPS_SYSTEM, nothing).differences == ()


def test_a_teacher_that_does_not_tell_is_not_compared() -> None:
    class Silent:
        async def shown(self, prompt: Prompt) -> None:
            return None

    for teacher in (Silent(), object()):
        assert asyncio.run(compare_prompts(student(CHATML), teacher, (PLAIN,))) is None  # type: ignore[arg-type]
        assert asyncio.run(check_prompts(student(CHATML), teacher, (PLAIN,), False)) is None  # type: ignore[arg-type]


def test_a_run_is_refused_unless_the_difference_is_allowed() -> None:
    policy, teacher = student(CHATML), Teller(model(DATED))
    with pytest.raises(ConfigError) as error:
        asyncio.run(check_prompts(policy, teacher, (PLAIN,), allowed=False))  # type: ignore[arg-type]
    for words in ("teacher: ", "26 Jul 2024", "omniopd probe", "teacher.allow_prompt_difference: true"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    said = asyncio.run(check_prompts(policy, teacher, (PLAIN,), allowed=True))  # type: ignore[arg-type]
    assert said is not None
    assert "26 Jul 2024" in said
    assert asyncio.run(check_prompts(policy, Teller(model(GEMMA)), (PLAIN,), allowed=False)) is None  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the demo models, through the command line


def settings(tmp_path: Path, teacher: Path) -> str:
    path = tmp_path / "config.yaml"
    tree = {
        "student": {"path": str(DEMO / "student"), "max_new_tokens": 24},
        "teacher": {"type": "transformers", "path": str(teacher)},
        "task": {"type": "arithmetic", "train_size": 8, "heldout_size": 2},
        "method": {"name": "omniopd", "chunks": 1, "chunk_tokens": 4, "continuations": 2},
        "train": {"steps": 1, "prompts_per_step": 2},
        "eval": {"problems": 0},
        "output": str(tmp_path / "run"),
    }
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.fixture
def talkative(tmp_path: Path) -> Path:
    """The demo teacher with a template that adds a sentence."""
    folder = tmp_path / "talkative"
    folder.mkdir()
    for file in (DEMO / "teacher").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink()
    template = (DEMO / "teacher" / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("<s>[SYS]Answer at great length." + template.removeprefix("<s>"))
    return folder


def test_the_demo_student_and_teacher_differ_in_nothing(tmp_path: Path) -> None:
    assert main(["train", settings(tmp_path, DEMO / "teacher")]) == 0


def test_train_refuses_a_template_that_adds_text_before_anything_is_asked(
    tmp_path: Path, talkative: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, talkative)
    assert main(["train", config]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omniopd: ")]
    assert line.startswith("omniopd: teacher: the teacher's template adds")
    assert "Answer at great length." in line
    assert "teacher.allow_prompt_difference: true" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    again = ["train", config, f"output={tmp_path / 'allowed'}", "teacher.allow_prompt_difference=true"]
    assert main(again) == 0
    assert "caution: student and teacher are shown different text" in " ".join(capsys.readouterr().err.split())
