"""The router as a pure function: always a live actor, cached prefixes win, load still balances."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing import DECODE_TOKENS, UNEVEN_REQUESTS, Load, Router

PROMPTS = st.lists(st.integers(0, 50), max_size=80)
NAMES = st.sampled_from(["a", "b", "c", "d"])
LOADS = st.dictionaries(NAMES, st.builds(Load, st.integers(0, 50), st.integers(0, 5000)))


@given(st.lists(st.tuples(PROMPTS, LOADS), max_size=30))
def test_chooses_a_live_actor_or_none(requests: list[tuple[list[int], dict[str, Load]]]) -> None:
    router = Router(block_size=4, capacity=20)
    for prompt, loads in requests:
        choice = router.choose(prompt, loads)
        if not loads:
            assert choice is None
            continue
        assert choice is not None
        assert choice.actor in loads
        assert 0 <= choice.cached_tokens <= len(prompt)
        assert len(router) <= 20


@given(PROMPTS, LOADS)
def test_never_worse_than_the_cheapest(prompt: list[int], loads: dict[str, Load]) -> None:
    """What the choice costs, its cached tokens taken off, is the least there is."""
    router = Router(block_size=4)
    router.choose(prompt, {"a": Load(), "b": Load()})
    choice = router.choose(prompt, loads)
    if choice is None:
        return
    cheapest = min(load.cost for load in loads.values())
    assert loads[choice.actor].cost - choice.cached_tokens <= cheapest


def test_a_cached_prefix_attracts() -> None:
    router = Router(block_size=4)
    free = {name: Load() for name in "abc"}
    prompt = list(range(64))
    first = router.choose(prompt, free)
    assert first is not None and first.cached_tokens == 0
    for _ in range(5):
        again = router.choose([*prompt, 7, 7, 7, 7], free)
        assert again is not None and again.actor == first.actor
        assert again.cached_tokens >= 64


def test_a_long_queue_beats_a_cached_prefix() -> None:
    router = Router(block_size=4)
    prompt = list(range(64))
    first = router.choose(prompt, {"a": Load(), "b": Load()})
    assert first is not None
    loads = {"a": Load(), "b": Load()}
    loads[first.actor] = Load(requests=64 // DECODE_TOKENS + 1)
    second = router.choose(prompt, loads)
    assert second is not None and second.actor != first.actor


def test_a_new_actor_is_not_left_idle_beside_a_long_cached_document() -> None:
    router = Router(block_size=4)
    document = list(range(4096))
    router.choose(document, {"old": Load()})
    others = Load(requests=UNEVEN_REQUESTS)
    stays = router.choose(document, {"old": others, "new": Load()})
    assert stays is not None and stays.actor == "old", "a few requests are worth the cache"
    busy = Load(requests=UNEVEN_REQUESTS + 1)
    first = router.choose(document, {"old": busy, "new": Load()})
    assert first is not None and (first.actor, first.cached_tokens) == ("new", 0)
    later = router.choose(document, {"old": busy, "new": Load(requests=1)})
    assert later is not None and (later.actor, later.cached_tokens) == ("new", 4096)


def test_a_block_only_counts_behind_the_same_beginning() -> None:
    router = Router(block_size=4)
    router.choose([1, 1, 1, 1, 2, 2, 2, 2], {"a": Load()})
    choice = router.choose([9, 9, 9, 9, 2, 2, 2, 2], {"a": Load()})
    assert choice is not None and choice.cached_tokens == 0


def test_salts_share_nothing() -> None:
    router = Router(block_size=4)
    router.choose([1] * 8, {"a": Load()}, salt="x")
    choice = router.choose([1] * 8, {"a": Load()}, salt="y")
    assert choice is not None and choice.cached_tokens == 0


def test_forgets_an_actor() -> None:
    router = Router(block_size=4)
    router.choose([1] * 8, {"a": Load()})
    router.forget("a")
    assert len(router) == 0
    choice = router.choose([1] * 8, {"a": Load()})
    assert choice is not None and choice.cached_tokens == 0


@given(st.integers(1, 5), st.integers(1, 60))
def test_different_prompts_spread_evenly(actors: int, requests: int) -> None:
    router = Router()
    counts = {f"a{i}": 0 for i in range(actors)}
    for request in range(requests):
        loads = {name: Load(count, 20 * count) for name, count in counts.items()}
        choice = router.choose([1000 + request] * 20, loads)
        assert choice is not None
        counts[choice.actor] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_idle_actors_take_turns_at_short_prompts() -> None:
    router = Router()
    free = {"a": Load(), "b": Load(), "c": Load()}
    chosen = {choice.actor for _ in range(3) if (choice := router.choose([5], free))}
    assert chosen == set(free)


@pytest.mark.parametrize("arguments", [{"block_size": 0}, {"capacity": 0}])
def test_refuses_nonsense(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Router(**arguments)
