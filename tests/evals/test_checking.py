"""Where the final answer stands, and when it is right."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from evals import symbolic
from evals.checking import extract, is_right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}, the answer is 4 #### 5", "5"),
        (r"so \boxed{3}, and the answer is 4", "3"),
        ("The answer is 4. I checked it 7 times.", "4"),
        ("12+7=19. 19-5=14.", "14"),
        ("#### 3\n\n#### 5", "5"),
        ("#### 2. Add them up\nThat makes 14.", "14"),
        ("#### Working\n12+2=14\n#### Answer\nThe answer is 14.", "14"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"14, so \boxed{15", "15"),
        ("**Answer:** 42", "42"),
        ("Answer:\n\n42", "42"),
        ("The answer to 12 plus 2 is 14!", "14"),
        ("Final Answer: The final answer is $24$. I hope it is correct.", "24"),
        ("the answer is that she has 12+7=19 apples.", "19 apples"),
        ("The answer is Monday.", "Monday"),
        ("No idea.", None),
        ("", None),
    ],
)
def test_conventions_in_their_order(text: str, answer: str | None) -> None:
    assert extract(text) == answer


def test_a_statement_without_a_number_is_none_where_a_number_is_asked_for() -> None:
    assert is_right("14", "19-5=14. I hope the answer is clear.")
    assert not is_right("15", "19-5=14. I hope the answer is clear.")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1080", "$1,080.00."),
        ("1,080", "1080 dollars"),
        ("2000000", "$2 million"),
        ("10", "10 apples per day"),
        ("14", "$14/hour"),
        ("60", "60 km/h"),
        ("5", r"5\text{ cm}^2"),
        ("-5", "−5"),
        ("-5", "-$5"),
        ("0", "-0"),
        ("0.5", ".5"),
        ("0.75", "3/4"),
        ("3/4", r"\frac{3}{4}"),
        ("1.5", "1 1/2"),
        (r"1\frac{1}{2}", "3/2"),
        ("50", r"50\%"),
        ("0.5", "50 percent"),
        ("1000", "1e3"),
        ("19", "12+7=19"),
        ("5", "x = 5"),
        ("7:30", "7:30"),
        ("B", "(b)"),
        ("New York", r"\text{New  York}"),
        ("Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
        (r"Thus $x = \boxed{72}$.", "72"),
    ],
)
def test_spellings_of_one_answer(reference: str, answer: str) -> None:
    assert is_right(reference, rf"We find \boxed{{{answer}}}.")
    assert is_right(reference, f"So:\n#### {answer}")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("14", "15"),
        ("14", "14.5"),
        ("14", "-14"),
        ("14", "4"),
        ("50", "0.5%"),
        ("0.5", "50"),
        ("1 1/2", "1"),
        ("1/3", "0.333"),
        ("5", "5x"),
        ("5", "x+5"),
        ("2", "x=1 or x=2"),
        ("5", "x<=5"),
        ("4", "four"),
        ("silent", "listen"),
        ("3", "3/0"),
    ],
)
def test_what_only_looks_right(reference: str, answer: str) -> None:
    assert not is_right(reference, rf"We find \boxed{{{answer}}}.")


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("2 pi", r"2\pi", True),
        ("8", "2**3", True),
        ("x+1", "x+2", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
    ],
)
def test_expressions_go_to_math_verify(reference: str, answer: str, right: bool) -> None:
    assert is_right(reference, rf"\boxed{{{answer}}}") is right


def test_what_is_not_decided_in_time_is_neither_right_nor_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "equal", lambda reference, answer: None)
    assert is_right("undecided+1", r"\boxed{undecided^2}") is None
    assert is_right("undecided+1", "I do not know") is False
    assert is_right("12", r"\boxed{13}") is False


def test_expressions_in_threads() -> None:
    pairs = [(f"x+{n}", rf"\boxed{{{n + n % 2}+x}}") for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda pair: is_right(*pair), pairs))
    assert verdicts == [n % 2 == 0 for n in range(12)]


def test_five_hundred_numbers_take_milliseconds() -> None:
    texts = [f"She has {n}+1={n + 1}. " * 20 + f"The answer is ${n + 1:,}." for n in range(500)]
    began = time.perf_counter()
    assert all(is_right(str(n + 1), text) for n, text in enumerate(texts))
    assert time.perf_counter() - began < 2  # 0.05 s on an idle core


@pytest.mark.parametrize(
    "text",
    ["1" * 20_000, "1," * 10_000, "1 " * 10_000, "1/" * 10_000, "answer " * 5000, "answer: " * 5000, "#### a\n" * 5000]
    + ["\\boxed{" * 3000, "$" * 20_000, "(" * 20_000, "**" * 10_000, "- " * 10_000 + "1"],
    ids=lambda text: text[:8].strip() + "...",
)
def test_degenerate_text_is_wrong_and_quick(text: str) -> None:
    began = time.perf_counter()
    assert not is_right("7", text) and not is_right("x+1", text)
    assert time.perf_counter() - began < 3
