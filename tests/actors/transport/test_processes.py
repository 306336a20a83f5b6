"""Peers in processes of their own: death is seen at once and hurts nobody else."""

import os
import resource
import signal
import threading
import time

import pytest
import torch

from actors.errors import PeerLost, PeerRefused
from actors.transport.backoff import Backoff
from actors.transport.endpoint import Endpoint
from tests.actors.transport.echo import DIGEST, GEOMETRY, Peer, meet


def ask(endpoint, peer, *, lane=0, layer=3, tokens=5, step=1):
    x = torch.randn(tokens, GEOMETRY.hidden)
    ids = torch.zeros(tokens, GEOMETRY.top_k, dtype=torch.int32)
    weights = torch.ones(tokens, GEOMETRY.top_k)
    endpoint.dispatch(peer, lane, layer=layer, step=step, epoch=1, x=x, ids=ids, weights=weights)
    return x


def answer(endpoint, peers=(), seconds=20):
    arrivals = endpoint.wait(seconds, peers)
    assert arrivals, "no answer"
    return arrivals[0]


@pytest.fixture
def endpoint():
    made = Endpoint("attention-0", GEOMETRY, DIGEST)
    yield made
    made.close()


def test_dead_peer_others_unaffected_and_successor(endpoint):
    peers = [Peer(name, ["attention-0"]) for name in ("ffn-0", "ffn-1")]
    successor = Peer("ffn-0", ["attention-0"])
    try:
        meet(endpoint, *peers)
        for peer in peers:
            x = ask(endpoint, peer.name)
            assert torch.equal(answer(endpoint).x, x * 2)

        peers[0].kill()
        start = time.monotonic()
        with pytest.raises(PeerLost, match="attention-0 lost ffn-0"):
            ask(endpoint, "ffn-0")
        assert time.monotonic() - start < 0.5
        assert list(endpoint.lost) == ["ffn-0"]
        assert endpoint.peers == ["ffn-1"]
        x = ask(endpoint, "ffn-1")
        assert torch.equal(answer(endpoint).x, x * 2)

        meet(endpoint, successor)
        x = ask(endpoint, "ffn-0")
        assert torch.equal(answer(endpoint).x, x * 2)
        assert endpoint.lost == {}
    finally:
        for peer in [*peers, successor]:
            peer.stop()


def dies_with_a_frame(endpoint, peer):
    ask(endpoint, "ffn-0", layer=77)  # taken, never answered
    assert endpoint.wait(0.2, ["ffn-0"]) == []
    threading.Timer(0.2, peer.kill).start()
    start = time.monotonic()
    with pytest.raises(PeerLost):
        endpoint.wait(20, ["ffn-0"])
    assert time.monotonic() - start < 5


def test_frozen_peer_is_a_timeout_and_recovers_and_death_is_found_by_probing(endpoint):
    peer = Peer("ffn-0", ["attention-0"])
    try:
        meet(endpoint, peer)
        ask(endpoint, "ffn-0")
        answer(endpoint)
        os.kill(peer.process.pid, signal.SIGSTOP)
        x = ask(endpoint, "ffn-0", step=2)
        assert endpoint.wait(0.3, ["ffn-0"]) == []
        os.kill(peer.process.pid, signal.SIGCONT)
        late = answer(endpoint)
        assert late.header.step == 2
        assert torch.equal(late.x, x * 2)
        ask(endpoint, "ffn-0", layer=99)
        with pytest.raises(PeerRefused, match="layer 99 is not here"):
            answer(endpoint).raise_if_refused()
        dies_with_a_frame(endpoint, peer)
    finally:
        peer.stop()


def test_over_tcp():
    endpoint = Endpoint("attention-0", GEOMETRY, DIGEST, ucx_tls="tcp,self")
    peer = Peer("ffn-0", ["attention-0"], "tcp,self")
    try:
        meet(endpoint, peer)
        for tokens in (1, 32):
            x = ask(endpoint, "ffn-0", tokens=tokens)
            assert torch.equal(answer(endpoint).x, x * 2)
        dies_with_a_frame(endpoint, peer)
    finally:
        peer.stop()
        endpoint.close()


def test_idle_endpoint_uses_little_cpu(endpoint):
    other = Endpoint("ffn-0", GEOMETRY, DIGEST)
    endpoint.connect(other.offer("attention-0"))
    backoff = Backoff()

    def idle(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            endpoint.poll()
            backoff.pause()

    idle(0.3)
    before = resource.getrusage(resource.RUSAGE_THREAD)
    idle(2.0)
    after = resource.getrusage(resource.RUSAGE_THREAD)
    used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    assert used / 2.0 < 0.1  # one that spins uses all of a core


def test_membership_changes_while_another_thread_polls(endpoint):
    stop = threading.Event()

    def poll():
        while not stop.is_set():
            endpoint.poll()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        start = time.monotonic()
        for number in range(5):
            other = Endpoint(f"ffn-{number}", GEOMETRY, DIGEST)
            theirs = other.offer("attention-0")
            other.connect(endpoint.offer(other.name))
            endpoint.connect(theirs)
            endpoint.disconnect(other.name)
        assert time.monotonic() - start < 10
    finally:
        stop.set()
        thread.join()
