"""Threads: which work is small, and that the number is as before whoever was inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from omniopd.threads import SMALL_PRODUCT, SMALL_WEIGHT, DeviceThread, one_thread, small_products


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_inside_and_as_many_as_before_afterwards() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with one_thread(False):
        assert torch.get_num_threads() == 2


def test_an_error_inside_leaves_the_threads_as_they_were() -> None:
    with pytest.raises(ValueError), one_thread():
        raise ValueError
    assert torch.get_num_threads() == 2


def test_who_enters_while_another_is_inside_does_not_take_one_for_the_usual_number() -> None:
    entered, left, found = threading.Event(), threading.Event(), []

    def second() -> None:
        with one_thread():
            entered.set()
            left.wait(10)
        found.append(torch.get_num_threads())

    with one_thread():
        other = threading.Thread(target=second)
        other.start()
        entered.wait(10)
    left.set()
    other.join()
    assert found == [2]
    assert torch.get_num_threads() == 2


def test_products_are_small_by_their_sizes() -> None:
    side = int(SMALL_WEIGHT**0.5)
    fits, large = nn.Linear(side, side), nn.Linear(side + 1, side)
    rows = SMALL_PRODUCT // SMALL_WEIGHT
    assert small_products(fits, rows)
    assert not small_products(fits, rows + 1)
    assert not small_products(large, 1)
    with torch.device("meta"):
        assert not small_products(nn.Linear(4, 4), 1)  # another device's threads are its own business


def test_all_work_on_a_cpu_is_done_in_one_thread_and_that_of_another_device_in_its_own() -> None:
    entered: list[int] = []
    first, second = DeviceThread("cpu"), DeviceThread("cpu")
    apart = DeviceThread("elsewhere", lambda: entered.append(threading.get_ident()))
    places = [thread.submit(threading.get_ident).result() for thread in (first, second, apart)]
    assert places[0] == places[1] != places[2] and entered == [places[2]]
    first.close()
    apart.close()
    assert second.submit(threading.get_ident).result() == places[0]  # still there for the others
    for closed in (first, apart):
        with pytest.raises(RuntimeError):
            closed.submit(threading.get_ident)
