"""Parts together: which pairs are refused or warned of, in which order they act, and the law's golden numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import tiny
import torch

from omniopd.composition import Composed, compose
from omniopd.config import load_config
from omniopd.draft import Draft, weight_figures
from omniopd.errors import ConfigError
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.selftest import mirror
from omniopd.types import Rollout, Signal, Writing
from students.policy import Policy, StudentSettings
from students.view import StudentView

Action = Literal["refuse", "warn", "join"]

# The pairs of composition.md, 5, that exist as parts. Settings are such that the pair has its problem.
SHORT_HORIZON = {"name": "horizon", "tokens": 100}
PAIRS: list[tuple[Any, Any, Action]] = [
    (SHORT_HORIZON, "adaptive_window", "refuse"),  # two owners of the length
    (SHORT_HORIZON, {"name": "kl_stop", "threshold": 0.1}, "refuse"),  # it ends before the stop can ever fire
    ({"name": "horizon", "tokens": 2000}, {"name": "kl_stop", "threshold": 0.1}, "join"),
    ("adaptive_window", {"name": "kl_stop", "threshold": 0.1}, "refuse"),  # the probe would be cut
    ("adaptive_window", "teachability", "refuse"),  # the probe would be masked
    (SHORT_HORIZON, "correctness_router", "warn"),  # cut rollouts have no verdict
    ("adaptive_window", "correctness_router", "warn"),
    ({"name": "kl_stop", "threshold": 0.1}, "correctness_router", "warn"),
    (SHORT_HORIZON, "lookahead", "refuse"),  # off below its floor
    ({"name": "kl_stop", "threshold": 0.1}, "lookahead", "warn"),
    ("trajectory_filter", "correctness_router", "warn"),  # counted twice
    ("entropy_weights", "rock_tokens", "warn"),  # pillars may be suppressed
    ("teachability", "rock_tokens", "warn"),
    ({"name": "kl_stop", "threshold": 0.1}, "teachability", "warn"),  # little may remain
    ({"name": "kl_stop", "threshold": 0.1}, "rock_tokens", "warn"),
    ("teachability", "fork_guidance", "warn"),
    (SHORT_HORIZON, "fork_guidance", "warn"),
    ({"name": "kl_stop", "threshold": 0.1}, "fork_guidance", "warn"),
    ({"name": "f_divergence", "divergence": "forward_kl", "center": False}, "teachability", "refuse"),
    ({"name": "f_divergence", "divergence": "forward_kl", "center": False}, "trajectory_filter", "refuse"),
    ({"name": "f_divergence", "divergence": "forward_kl"}, "whiten", "refuse"),  # erases the difference
    ({"name": "f_divergence", "divergence": "forward_kl"}, "lookahead", "warn"),  # unbounded against order 1
    ("teacher_prefix", "teacher_rollouts", "refuse"),  # two authors of one rollout
]
PAIRS_WITHOUT_PARTS = "draft_opd, oprd and geometry have no parts"


@pytest.fixture(scope="module")
def student(llama_folder: Path) -> Policy:
    return Policy(StudentSettings(path=str(llama_folder), max_new_tokens=64), anchored=True)


def composed(student: Policy, parts: Sequence[Any], **method: Any) -> Any:
    tree = {
        "student": {"path": student.settings.path},
        "teacher": {"type": "transformers", "path": student.settings.path},
        "task": "arithmetic",
        "method": {"name": "opd", "parts": list(parts), **method},
    }
    return compose(load_config(tree).method, student, 0, lambda prompt, text: True, 4)


def name_of(part: Any) -> str:
    return part if isinstance(part, str) else str(part["name"])


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(("one", "other", "action"), PAIRS, ids=lambda part: name_of(part))
def test_pairs_are_refused_or_warned_of(one: Any, other: Any, action: Action, turned: bool, student: Policy) -> None:
    pair = [other, one] if turned else [one, other]
    if action == "refuse":
        with pytest.raises(ConfigError, match=r"^method\.parts: ") as refused:
            composed(student, pair)
        said = str(refused.value)
        assert len(said.split(": ", 2)[-1].split()) > 3, "no mend"
    else:
        said = " ".join(composed(student, pair).cautions())
        if action == "join":
            return
    assert name_of(one) in said and name_of(other) in said, said


@pytest.mark.parametrize("one", PARTS.names())
def test_any_two_parts_join_or_are_refused_in_one_line(one: str, student: Policy) -> None:
    """No pair raises anything else, whichever it is; the mend names both."""
    alone = set()
    for name in PARTS.names():
        try:
            composed(student, [name])
        except ConfigError as error:
            assert str(error).startswith("method"), error
            alone.add(name)
    for other in PARTS.names():
        if other == one or {one, other} & alone:
            continue
        try:
            said = composed(student, [one, other]).cautions()
        except ConfigError as error:
            assert str(error).startswith("method.parts: ") and one in str(error) and other in str(error), error
        else:
            assert all(isinstance(sentence, str) and sentence for sentence in said)


@pytest.mark.parametrize("name", [name for name in PARTS.names() if not PARTS.get(name).dense])
def test_a_part_on_sampled_advantages_refuses_the_dense_form(name: str, student: Policy) -> None:
    settings = {"divergence": "forward_kl"} if name == "f_divergence" else {}
    with pytest.raises(ConfigError, match=rf"'{name}'.*form: sampled"):
        composed(student, [{"name": name, **settings}], form="dense")


def test_a_part_twice_is_refused_and_a_neutral_one_is_left_out(student: Policy) -> None:
    with pytest.raises(ConfigError, match="'whiten' stands there twice"):
        composed(student, ["whiten", {"name": "whiten", "clip": 3}])
    plain = composed(student, [{"name": "trajectory_filter", "drop": 0}])
    assert not isinstance(plain, Composed)


def test_the_fixed_order_is_that_of_the_places_then_of_the_names(student: Policy) -> None:
    names = [name for name in PARTS.names() if not PARTS.get(name).refuses and name != "f_divergence"]
    for listed in (names, names[::-1]):
        try:
            built = composed(student, listed)
        except ConfigError:  # a part among them that another one refuses
            pytest.fail(f"{names} are said to get on with one another")
        order = [(part.place, part.config.name) for part in built.parts]
        assert order == sorted(order) and len(order) == len(names)


def test_the_places_are_those_of_the_table() -> None:
    """composition.md, 3: what a later place counts, it counts over what earlier ones have left."""
    of = {name: PARTS.get(name).place for name in PARTS.names()}
    table = {
        "horizon": Place.SAMPLE, "adaptive_window": Place.SAMPLE, "kl_stop": Place.CUT, "correctness_router": Place.ROUTE,
        "trajectory_filter": Place.DROP, "teachability": Place.MASK, "fork_guidance": Place.MASK,
        "entropy_weights": Place.WEIGHT, "rock_tokens": Place.WEIGHT, "f_divergence": Place.TRANSFORM,
        "whiten": Place.TRANSFORM, "lookahead": Place.BONUS,
    }  # fmt: skip
    assert {name: of[name] for name in table if name in of} == {name: table[name] for name in table if name in of}
    assert table.keys() <= of.keys()


# ---------------------------------------------------------------------- two owners of one rollout


class OwnerSettings(PartSettings):
    name: str = "owner"


def owner(name: str, writes: set[str], wish: Writing) -> type[Part]:
    """A part that wishes the same for every row."""

    class Owner(Part):
        Config = OwnerSettings
        slots = ("sampling",)
        place = Place.SAMPLE
        neutral: ClassVar = "made up for this test"

        def writings(self, prompts: Any, evidence: Any, step: int) -> dict[int, Writing]:
            return dict.fromkeys(prompts, wish)

    Owner.writes = frozenset(writes)
    return Owner


def owned(student: Policy, *wishes: tuple[set[str], Writing]) -> Composed:
    base = composed(student, [])
    parts = []
    for number, (writes, wish) in enumerate(wishes):
        name = f"owner{number}"
        parts.append(owner(name, writes, wish)(OwnerSettings(name=name), base.objective, student, 0))
    return Composed(base, parts)


def test_of_two_horizons_the_lower_one_counts_and_it_bounds_a_prefix_too(student: Policy) -> None:
    prompts = {3: tiny.prompt()}
    limits = ({"horizon"}, Writing(max_tokens=9)), ({"horizon"}, Writing(max_tokens=5))
    assert owned(student, *limits).writings(prompts, [], 1) == {3: Writing(max_tokens=5)}
    prefix = ({"text"}, Writing(begins=(7, 8)))
    for order in ([prefix, limits[0]], [limits[0], prefix]):
        assert owned(student, *order).writings(prompts, [], 1) == {3: Writing(max_tokens=9, begins=(7, 8))}


def test_two_authors_of_rollouts_are_refused_when_the_method_is_made(student: Policy) -> None:
    text, initial = ({"text"}, Writing(begins=(7,))), ({"initial"}, Writing(initial=True))
    for two in ([text, text], [text, initial]):
        with pytest.raises(ConfigError, match="owner0.*owner1.*leave one out"):
            owned(student, *two)


# ---------------------------------------------------------------------- one query, several readers


def test_a_reader_of_few_likeliest_tokens_does_not_see_what_another_one_asked_for(student: Policy) -> None:
    rows = [tiny.rollout(student, [7, 9, 30, 12, 80, 41])]

    def entropies(parts: list[Any], **method: Any) -> tuple[Any, Signal]:
        built = composed(student, parts, **method)
        evidence = mirror.evidence(student, rows, built.audit(rows, 1), mirror.disagreeing)
        facts = built.measure(dict(enumerate(rows)), evidence, StudentView(student, rows))
        return facts[0]["entropy_weights.teacher"], built.read(rows, evidence, 1)

    few, many = {"name": "entropy_weights", "k": 2}, {"name": "entropy_weights", "k": 8}
    wide = {"name": "trust_region", "outlier": "fkl", "k": 8}
    assert entropies([few])[0] == entropies([few, wide])[0] != entropies([many])[0]
    dense = {"form": "dense", "support": "teacher", "k": 2}
    targets = [entropies([part], **dense)[1].targets[0] for part in (few, many)]
    logits, ids = torch.randn(6, len(student.tokenizer)), torch.tensor(rows[0].ids)
    assert torch.equal(*(target.divergence(logits, ids, 0) for target in targets if target is not None))


# ---------------------------------------------------------------------- golden numbers


def draft_of(ratios: Sequence[float]) -> Draft:
    tokens = len(ratios)
    rollout = Rollout(tiny.prompt(), (1,), (5,) * tokens, (0.0,) * tokens, (0.0,) * tokens, (0,) * tokens, "", "length")
    values, mask = torch.tensor(ratios, dtype=torch.float32), torch.ones(tokens, dtype=torch.bool)
    return Draft.of(Signal((values,), (mask,)), [rollout], [], 1, lambda rollout: None)


def golden(bonus: Sequence[float] = (0, 0, 0, 0.3), sum_w: bool = False, late_mask: bool = False) -> Draft:
    """Raw weights of FiRe, normalised over the mask of TA, times that of Rock Tokens: composition.md, 6."""
    draft = draft_of([0.5, -1.0, 0.2, 0.0])
    raw, mask = torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=torch.float64), torch.tensor([True, True, False, True])
    if not late_mask:
        draft.keep(0, mask)
    draft.weigh(0, raw / raw[draft.mask[0]].mean())
    draft.weigh(0, torch.tensor([1, 0.1, 1, 1], dtype=torch.float64))
    if late_mask:
        draft.keep(0, mask)
    if any(bonus):
        draft.add(0, torch.tensor(bonus, dtype=torch.float64))
    draft.sum_w = sum_w
    return draft


def test_golden_numbers_of_three_parts_and_a_bonus() -> None:
    signal = golden().finish()
    torch.testing.assert_close(signal.values_BT[0], torch.tensor([0.75, -0.05, 0.0, 0.3]))
    assert float(signal.values_BT[0].sum()) / 3 == pytest.approx(0.333333, abs=1e-6)
    assert golden().tokens == 3
    assert float(golden(bonus=()).finish().values_BT[0].sum()) / 3 == pytest.approx(0.233333, abs=1e-6)
    assert signal.stats["effective_share"] == pytest.approx(0.666410, abs=1e-6)


def test_golden_numbers_of_other_orders_and_denominators() -> None:
    wrong = golden(late_mask=True).finish().values_BT[0]
    assert float(wrong.sum()) / 3 == pytest.approx(0.286667, abs=1e-6)
    by_weights = golden(bonus=(), sum_w=True).finish().values_BT[0]
    assert float(by_weights.sum()) / 3 == pytest.approx(0.274510, abs=1e-6)


def test_golden_effective_share() -> None:
    assert weight_figures(torch.tensor([3.0, 3.0, 1.0]))["effective_share"] == pytest.approx(0.859649, abs=1e-6)
    assert weight_figures(torch.zeros(3))["effective_share"] == 0.0
    assert all(value is None for value in weight_figures(torch.zeros(0)).values())
    assert math.isclose(weight_figures(torch.ones(5))["effective_share"] or 0, 1.0)
