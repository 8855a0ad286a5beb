"""The ledger: what tokens cost, what a price file must hold, and that no order of calls passes the budget."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniopd.errors import BudgetSpent, ConfigError
from omniopd.ledger import Ledger, Price, read_prices
from omniopd.store import Booking, Store
from omniopd.types import Usage

BOOKING = Booking("run", "teacher", "continue", "m", 1, 1, 10, 5, 0, 0, 0, 0.0, "teacher.price", 0.0)

LIST = """
date: 2026-11-01
models:
  gpt-9: {prompt: 2, completion: 8, cache_read: 0.5}
  gpt-9-mini: {prompt: 0.2, completion: 0.8}
  "gpt-*": {prompt: 3, completion: 9}
  "gpt-9*": {prompt: 4, completion: 10}
  "deep[1m]": {prompt: 5}
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "s")
    yield store
    store.close()


@pytest.fixture(scope="module")
def one_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("ledger") / "s")
    yield store
    store.close()


def booked(ledger: Ledger, usd: float) -> None:
    """A call's end: the store takes its booking, then the ledger hears of it."""
    booking = replace(BOOKING, run=ledger.run, cost_usd=usd)
    ledger.store.keep({}, booking=booking)
    ledger.note(booking)


# ---------------------------------------------------------------------- prices


def test_the_cost_of_fresh_cached_and_written_tokens() -> None:
    usage = Usage(1, 0, 1_000_000, 100_000, 0.0, 600_000, 300_000, 50_000)
    whole = Price(prompt=3, completion=15)
    assert whole.cost(usage) == pytest.approx(3 + 1.5)
    assert Price(prompt=3, completion=15, cache_read=0.3).cost(usage) == pytest.approx(1.2 + 0.18 + 1.5)
    anthropic = Price(prompt=3, completion=15, cache_read=0.3, cache_write=3.75)
    assert anthropic.cost(usage) == pytest.approx(0.1 * 3 + 0.6 * 0.3 + 0.3 * 3.75 + 0.1 * 15)
    assert Price(prompt=3, completion=15, cache_read=0).cost(usage) == pytest.approx(1.2 + 1.5)  # free is a price
    assert Price().cost(usage) == 0


def test_golden_cost_of_a_trajectory_with_and_without_the_cache() -> None:
    """OmniOPD's sheet: 10 chunks of 50 tokens, 10 continuations each, 4000 tokens; nested prefixes are read once."""
    chunks, tokens, draws, length = 10, 50, 10, 4000
    prompt = chunks * draws * length // 2
    price = Price(prompt=0.435, completion=0.87, cache_read=0.003625)
    uncached = Usage(prompt_tokens=prompt, completion_tokens=chunks * draws * tokens)
    cached = replace(uncached, cache_read_tokens=prompt - length)
    assert (prompt, uncached.completion_tokens) == (200_000, 5_000)
    assert price.cost(uncached) == pytest.approx(0.091, abs=5e-4)
    assert price.cost(cached) == pytest.approx(0.007, abs=5e-4)


@given(*[st.integers(0, 10_000)] * 4, *[st.floats(0, 100)] * 4, st.booleans())
def test_no_call_costs_more_than_the_most_for_its_tokens(
    fresh: int, read: int, written: int, out: int, a: float, b: float, c: float, d: float, whole: bool
) -> None:
    price = Price(prompt=a, completion=b) if whole else Price(prompt=a, completion=b, cache_read=c, cache_write=d)
    usage = Usage(1, 0, fresh + read + written, out, 0.0, read, written)
    assert price.cost(usage) <= price.most(usage.prompt_tokens, out) + 1e-12


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        ("gpt-9", 2),
        ("gpt-9-mini", 0.2),
        ("gpt-9-large", 4),
        ("gpt-8", 3),
        ("deep[1m]", 5),
        ("deep1", 5),
        ("GPT-9", None),
    ],
)
def test_a_model_has_its_own_price_or_that_of_the_longest_pattern(
    tmp_path: Path, store: Store, model: str, prompt: float | None
) -> None:
    (tmp_path / "prices.yaml").write_text(LIST)
    prices = read_prices(tmp_path / "prices.yaml")
    found, source = Ledger(store, prices=prices).price(model, None)
    assert (found.prompt if found else None) == prompt
    assert source == ("prices of 2026-11-01" if found else "")
    own = Price(prompt=7)
    assert Ledger(store, prices=prices).price(model, own) == (own, "teacher.price")


def test_a_budget_without_a_price_is_refused(tmp_path: Path, store: Store) -> None:
    (tmp_path / "prices.yaml").write_text(LIST)
    for prices in (None, read_prices(tmp_path / "prices.yaml")):
        with pytest.raises(ConfigError, match=r"^budget_usd: no price is known .*'other'; set teacher.price, or name"):
            Ledger(store, prices=prices, budget_usd=1.0).price("other", None)
    assert Ledger(store, budget_usd=1.0).price("other", Price())[0] == Price()
    assert Ledger(store).price("other", None) == (None, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mapping|dictionary"),
        ("[1, 2]", "dictionary"),
        ("date: 2026-01-01\nmodels: {m: {prompt: [", "not YAML: "),
        ("models: {}", "^date: is missing"),
        ("date: soon\nmodels: {}", "^date: .*'soon'"),
        ("date: 2026-01-01", "^models: is missing"),
        ("date: 2026-01-01\nmodels: {m: 3}", r"^models\.m: "),
        ("date: 2026-01-01\nmodels: {m: {prompt: -1}}", r"^models\.m\.prompt: .*greater than or equal to 0.*-1"),
        ("date: 2026-01-01\nmodels: {m: {promt: 1}}", r"^models\.m\.promt: unknown key 'promt'.*prompt"),
        ("date: 2026-01-01\ncurrency: EUR\nmodels: {}", "^currency: .*'USD'.*'EUR'"),
    ],
)
def test_a_bad_price_file_is_one_line_that_names_the_file_and_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^prices: {path}: ") as error:
        read_prices(path)
    assert "\n" not in str(error.value)
    rest = str(error.value).removeprefix(f"prices: {path}: ")
    assert re.search(said, rest), rest


def test_a_price_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"date: \xff\xfe")
    for name, said in (("none.yaml", "No such file"), (".", "directory"), ("latin", "not UTF-8 text")):
        with pytest.raises(
            ConfigError, match=f"^prices: .*can't be read: .*{said}.*; name an existing YAML file"
        ) as error:
            read_prices(tmp_path / name)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- the budget


def test_what_was_spent_is_the_sum_of_the_runs_bookings(store: Store) -> None:
    booked(Ledger(store, "other"), 5.0)
    first = Ledger(store, "run")
    booked(first, 0.25)
    booked(first, 0.5)
    first.note(None)
    assert first.spent == Ledger(store, "run").spent == 0.75
    assert Ledger(store, "third").spent == 0


def test_money_is_reserved_until_it_is_released_once(store: Store) -> None:
    async def main() -> None:
        ledger = Ledger(store, budget_usd=1.0)
        with await ledger.reserve(0.4):
            held = await ledger.reserve(0.6)
            assert ledger.reserved == pytest.approx(1.0)
            held.release()
            held.release()
            assert ledger.reserved == pytest.approx(0.4)
        assert ledger.reserved == 0
        with pytest.raises(ZeroDivisionError), await ledger.reserve(1.0):
            _ = 1 / 0
        assert ledger.reserved == 0

    asyncio.run(main())


def test_without_a_budget_nobody_waits(store: Store) -> None:
    async def main() -> None:
        ledger = Ledger(store)
        await asyncio.gather(*(ledger.reserve(1e9) for _ in range(10)))

    asyncio.run(asyncio.wait_for(main(), 5))


def test_a_call_that_does_not_fit_waits_for_those_under_way(store: Store) -> None:
    async def main() -> list[str]:
        ledger, happened = Ledger(store, budget_usd=1.0), list[str]()
        first, second = await ledger.reserve(0.5), await ledger.reserve(0.5)

        async def third() -> None:
            with await ledger.reserve(0.7):
                happened.append("third")

        task = asyncio.create_task(third())
        await asyncio.sleep(0)
        booked(ledger, 0.1)
        first.release()
        await asyncio.sleep(0)
        happened.append("one is back")  # 0.1 spent, 0.5 reserved: not enough yet
        booked(ledger, 0.1)
        second.release()
        await task
        assert ledger.spent == pytest.approx(0.2)
        return happened

    assert asyncio.run(main()) == ["one is back", "third"]


def test_when_none_is_under_way_the_budget_is_spent(store: Store) -> None:
    async def main() -> None:
        ledger = Ledger(store, budget_usd=1.0)
        booked(ledger, 0.8)
        with pytest.raises(
            BudgetSpent,
            match=r"^budget_usd: 0\.8000 of 1 dollars are spent .* cost 0\.3000; raise budget_usd.*--resume",
        ):
            await ledger.reserve(0.3)
        (await ledger.reserve(0.2)).release()  # exactly the rest

    asyncio.run(main())
    assert BudgetSpent.exit_code == 3


def test_all_who_wait_hear_that_the_budget_is_spent(store: Store) -> None:
    """A cheaper call behind one that does not fit is not sent: the run ends here."""

    async def main() -> list[BaseException | object]:
        ledger = Ledger(store, budget_usd=1.0)
        held = await ledger.reserve(0.9)
        waiting = [asyncio.create_task(ledger.reserve(usd)) for usd in (0.5, 0.05, 0.5)]
        await asyncio.sleep(0)
        booked(ledger, 0.9)
        held.release()
        return await asyncio.gather(*waiting, return_exceptions=True)

    ends = asyncio.run(main())
    assert [type(end) for end in ends] == [BudgetSpent] * 3
    assert len({str(end) for end in ends}) == 1


def test_who_goes_away_while_waiting_takes_no_money_along(store: Store) -> None:
    async def main() -> None:
        ledger = Ledger(store, budget_usd=1.0)
        held = await ledger.reserve(0.6)
        large, small = (asyncio.create_task(ledger.reserve(usd)) for usd in (0.5, 0.4))
        await asyncio.sleep(0)
        large.cancel()
        (await asyncio.wait_for(small, 1)).release()
        last = asyncio.create_task(ledger.reserve(0.5))
        await asyncio.sleep(0)
        held.release()
        last.cancel()  # its turn has come, but it has not heard of it
        await asyncio.gather(large, last, return_exceptions=True)
        assert large.cancelled() and last.cancelled()
        assert ledger.reserved == 0
        (await ledger.reserve(1.0)).release()

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0.01, 3))
def test_no_order_of_calls_passes_the_budget(one_store: Store, seed: int, calls: int, budget: float) -> None:
    """Calls that cost up to what was reserved, end in any order, and are given up now and then."""
    chance = random.Random(seed)
    ledger = Ledger(one_store, budget_usd=budget)
    refused = 0

    async def call(most: float, share: float, turns: int) -> None:
        nonlocal refused
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        try:
            held = await ledger.reserve(most)
        except BudgetSpent:
            refused += 1
            return
        assert ledger.spent + ledger.reserved <= budget + 1e-9
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            ledger.note(replace(BOOKING, cost_usd=most * share))
            held.release()
        assert ledger.spent + ledger.reserved <= budget + 1e-9

    async def main() -> None:
        shares = [(chance.uniform(0, 0.4), chance.random(), chance.randrange(6)) for _ in range(calls)]
        tasks = [asyncio.create_task(call(*one)) for one in shares]
        for task in tasks:
            if chance.random() < 0.1:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)  # nobody waits for ever
        for task in tasks:
            if not task.cancelled() and (failure := task.exception()) is not None:
                raise failure

    asyncio.run(main())
    assert ledger.reserved == 0
    assert ledger.spent <= budget + 1e-9
    if budget > 0.4 * calls:
        assert refused == 0


def test_several_processes_share_what_is_left(store: Store) -> None:
    booked(Ledger(store, "run"), 0.4)
    one, other = (Ledger(store, "run", budget_usd=1.0) for _ in range(2))
    for ledger in (one, other):
        ledger.share({0: ledger.before}, 2)

    async def main() -> None:
        (await one.reserve(0.3)).release()
        booked(one, 0.25)
        with pytest.raises(BudgetSpent, match="0.6500 of 1 dollars are spent, 0.2500 of one process's share of 0.3000"):
            await one.reserve(0.1)
        (await other.reserve(0.3)).release()

    asyncio.run(main())
    for ledger in (one, other):
        ledger.hear([one.booked, other.booked])
        assert ledger.spent == pytest.approx(0.65)


def test_stores_of_several_machines_count_together(store: Store) -> None:
    ledger = Ledger(store, "run", budget_usd=1.0)
    ledger.share({0: 0.2, 1: 0.3}, 3)
    assert ledger.spent == pytest.approx(0.5)
