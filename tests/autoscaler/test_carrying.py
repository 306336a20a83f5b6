"""Decisions become orders: with room, without, and when what was ordered fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autoscaler.carrying import HOLD_S, Orders, newest_first
from autoscaler.limits import Counts
from autoscaler.policy import Decision

MEMBERS = [
    ("attention-0", "attention", "ready"),
    ("ffn-1", "ffn", "ready"),
    ("ffn-10", "ffn", "ready"),
    ("ffn-2", "ffn", "starting"),
]


class Manager:
    """Writes down what it is asked."""

    def __init__(self, lacking: dict[str, str] | None = None):
        self.lacking = lacking or {}
        self.orders: list[tuple[Any, ...]] = []

    async def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        if method == "room":
            return self.lacking.get(args[0], "")
        self.orders.append((method, *args, *sorted(options.items())))
        return SimpleNamespace(number=len(self.orders))


def decision(there: Counts, target: Counts) -> Decision:
    return Decision(1.0, there, None, target, target, ())


async def test_with_room_one_change_does_it() -> None:
    manager = Manager()
    placed = await Orders(manager).place(decision(Counts(2, 3), Counts(3, 2)), MEMBERS, 0.0)
    assert manager.orders == [("scale", ("attention", 3), ("ffn", 2))]
    assert placed.numbers == (1,) and not placed.error


async def test_without_room_actors_turn_over_newest_first() -> None:
    manager = Manager({"attention": "no CPU is left"})
    orders = Orders(manager)
    placed = await orders.place(decision(Counts(1, 3), Counts(3, 1)), MEMBERS, 0.0)
    assert manager.orders == [("flip", "ffn-10", "attention"), ("flip", "ffn-1", "attention")]
    assert placed.numbers == (1, 2) and not orders.cannot_place(0.0)


async def test_a_role_without_room_is_held_for_a_while() -> None:
    manager = Manager({"ffn": "no GPU is left"})
    orders = Orders(manager)
    placed = await orders.place(decision(Counts(1, 1), Counts(1, 2)), MEMBERS, 100.0)
    assert manager.orders == [] and placed.error == "no GPU is left"
    assert orders.cannot_place(100.0 + HOLD_S / 2) == {"ffn": "no GPU is left"}
    assert orders.cannot_place(100.0 + HOLD_S) == {}


async def test_what_is_rolled_back_is_not_asked_for_again_at_once() -> None:
    orders = Orders(Manager())
    wanted = decision(Counts(1, 2), Counts(2, 2))
    placed = await orders.place(wanted, MEMBERS, 0.0)
    other = SimpleNamespace(number=77, phase="done", error="")
    mine = SimpleNamespace(number=placed.numbers[0], phase="rolled_back", error="bad checkpoint")
    assert orders.ended([other, mine], 5.0) == [(wanted, mine)]
    assert orders.cannot_place(6.0) == {"attention": "change 1: bad checkpoint"}
    assert orders.ended([mine], 7.0) == [], "told once"


@pytest.mark.parametrize("phase", ["done", "noop"])
async def test_what_is_done_holds_nobody(phase: str) -> None:
    orders = Orders(Manager())
    placed = await orders.place(decision(Counts(1, 2), Counts(2, 2)), MEMBERS, 0.0)
    orders.ended([SimpleNamespace(number=placed.numbers[0], phase=phase, error="")], 1.0)
    assert orders.cannot_place(1.0) == {}


def test_numbers_count_as_numbers() -> None:
    assert newest_first(["ffn-2", "ffn-10", "ffn", "ffn-1"]) == ["ffn-10", "ffn-2", "ffn-1", "ffn"]
