"""Strangers: who lacks the deployment's secret can't join, inject frames, or break anything."""

import random
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import PeerLost, PeerMismatch
from actors.transport import frame, trust
from actors.transport.endpoint import Endpoint
from actors.transport.frame import Kind
from actors.transport.offer import Offer
from actors.transport.wire import REMOTE, Wire
from tests.actors.transport.test_endpoint import (
    DIGEST,
    GEOMETRY,
    connect,
    exchange,
    sample,
    until,
)

SECRET = b"s" * 32
FUZZED = 100_000
offers = st.builds(
    Offer,
    name=st.text(max_size=8), peer=st.text(max_size=8), session=st.integers(0, 2**32 - 1),
    protocol=st.integers(0, 9), digest=st.binary(max_size=8), dtype=st.just("float32"),
    hidden=st.integers(1, 99), top_k=st.integers(1, 9), max_tokens=st.integers(1, 99),
    lanes=st.integers(1, 4), host=st.text(max_size=4), address=st.integers(0, 2**64 - 1),
    memory=st.just("DRAM"), device=st.integers(0, 8),
    wires=st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=8)), max_size=2).map(tuple),
    nonce=st.binary(min_size=16, max_size=16),
)  # fmt: skip


@given(offers, st.binary(min_size=1, max_size=40))
def test_a_sealed_offer_is_genuine_for_who_has_the_secret_only(offer: Offer, secret: bytes):
    made = trust.sealed(secret, offer)
    assert trust.is_genuine(secret, made)
    assert not trust.is_genuine(secret + b"?", made)
    assert not trust.is_genuine(secret, offer)


@given(offers, st.data())
def test_no_field_of_an_offer_can_be_changed(offer: Offer, data):
    made = trust.sealed(SECRET, offer)
    other = data.draw(offers)
    for field in ("name", "peer", "session", "address", "host", "wires", "nonce", "memory"):
        changed = replace(made, **{field: getattr(other, field)})
        assert trust.is_genuine(SECRET, changed) == (changed == made)


@given(*[st.binary(min_size=16, max_size=16)] * 2)
def test_both_ends_derive_the_same_key_and_no_secret_no_key(one: bytes, other: bytes):
    key = trust.link_key(SECRET, one, other)
    assert key == trust.link_key(SECRET, other, one) and len(key) == 32
    assert key != trust.link_key(b"", one, other)


@pytest.fixture(scope="module")
def pair():
    asker, server = (Endpoint(n, GEOMETRY, DIGEST, ucx_tls="tcp,self", secret=SECRET) for n in "af")
    connect(asker, server)
    yield asker, server
    asker.close()
    server.close()


@pytest.fixture
def stranger(pair):
    """Somebody who has learned all there is to know but the secret, and takes a peer's name."""
    asker, server = pair
    link = asker._links["f"]
    wire = Wire(link.wire.name, REMOTE, "tcp,self")
    victim = server._wires[REMOTE]
    memory = next(reg for owner, reg in server._links["a"].registrations if owner is victim)
    agent = wire.add(victim.metadata(memory))
    header = frame.FrameHeader(
        1, 3, 1, 0, 1, 0, 2, 5, 10, 1, asker._source, link.remote_session, 1, asker.digest
    )
    yield wire, agent, header
    wire.remove(agent)


def test_without_the_secret_nobody_joins():
    ours = Endpoint("a", GEOMETRY, DIGEST, secret=SECRET)
    stranger = Endpoint("f", GEOMETRY, DIGEST, secret=b"guess")
    with pytest.raises(PeerMismatch, match="f's name was not made with a's secret") as caught:
        ours.connect(stranger.offer("a"))
    assert caught.value.code == "peer_not_genuine"
    # and with one of ours in hand he has no key to go with it
    with pytest.raises(PeerMismatch, match="not made with f's secret"):
        stranger.connect(ours.offer("f"))
    assert ours.peers == stranger.peers == [] and ours.counters["not_genuine"] == 1
    ours.close()
    stranger.close()


def test_frames_of_a_stranger_in_a_peers_name_are_dropped(pair, stranger):
    asker, server = pair
    wire, agent, header = stranger
    for tag in (frame.UNKEYED, frame.tagger(b"guess")):
        for kind in Kind:  # a BYE would end the link
            wire.notify(agent, frame.pack(header._replace(kind=int(kind)), tag=tag))
    until(lambda _: wire.take_notes({}) or server.counters["bad_tag"] >= 8, server)
    assert server.peers == ["a"]
    exchange(asker, server, **sample())


def test_frames_of_an_unknown_name_are_dropped(pair, stranger):
    _, server = pair
    other = Wire("nobody", REMOTE, "tcp,self")
    victim = server._wires[REMOTE]
    memory = next(reg for owner, reg in server._links["a"].registrations if owner is victim)
    agent = other.add(victim.metadata(memory))
    other.notify(agent, frame.pack(stranger[2]))
    until(lambda _: other.take_notes({}) or server.counters["stranger"] >= 1, server)


def spoiled(rng: random.Random, good: bytes) -> bytes:
    """A frame with something wrong: noise, cut short, too long, flipped, or put together."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(0, 400))
    if kind == 1:
        return good[: rng.randrange(len(good))]
    if kind == 2:
        return good + rng.randbytes(rng.randrange(1, 4000))
    if kind == 3:
        where = rng.randrange(len(good))
        return good[:where] + bytes([good[where] ^ rng.randrange(1, 256)]) + good[where + 1 :]
    return good[:5] + rng.randbytes(len(good) - 5)


def test_a_hundred_thousand_spoiled_frames_change_nothing(pair):
    """From the genuine peer's own connection, so that they get as far as they can."""
    asker, server = pair
    rng = random.Random(7)
    link = asker._links["f"]
    header = frame.FrameHeader(
        1, 3, 1, 0, 1, 0, 2, 5, 10, 1, asker._source, link.remote_session, 1, asker.digest
    )
    good = frame.pack(header, tag=link.tag)
    batch = [spoiled(rng, good) for _ in range(1000)]
    before, grown = sum(server.counters.values()), None
    for number in range(FUZZED // len(batch)):
        if number == FUZZED // len(batch) // 4:
            grown = psutil.Process().memory_info().rss
        for note in batch:
            link.wire.notify(link.agent, note)
        wanted = before + (number + 1) * len(batch)
        until(lambda _, wanted=wanted: sum(server.counters.values()) >= wanted, server, asker)
        batch = [spoiled(rng, good) for _ in range(1000)]
    assert sum(server.counters.values()) == before + FUZZED
    assert set(server.counters) <= {"bad_frame", "bad_protocol", "bad_tag", "stranger"}
    assert psutil.Process().memory_info().rss - grown < 8 << 20
    exchange(asker, server, **sample())


def test_a_replayed_frame_is_the_same_question_and_one_of_an_earlier_meeting_is_none(pair):
    asker, server = pair
    link = asker._links["f"]
    header = frame.FrameHeader(
        1, 3, 1, 0, 1, 0, 2, 5, 10, 1, asker._source, link.remote_session, 1, asker.digest
    )
    note = frame.pack(header, tag=link.tag)
    for _ in range(2):
        link.wire.notify(link.agent, note)
    arrived = until(lambda a: len(a["f"]) == 2, server)["f"]
    assert arrived[0].header.key == arrived[1].header.key  # which the caller tells apart
    connect(asker, server)  # a new meeting has new keys
    before = server.counters["bad_tag"] + server.counters["stale"]
    fresh = asker._links["f"]
    with suppress(PeerLost):
        fresh.wire.notify(fresh.agent, note)
    until(
        lambda _: server.counters["bad_tag"] + server.counters["stale"] == before + 1, server, asker
    )
    exchange(asker, server, **sample())
