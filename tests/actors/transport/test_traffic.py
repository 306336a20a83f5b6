"""Totals of the wire: names of transports, and what stays when peers come and go."""

import pytest

from actors.transport.hops import STAGES
from actors.transport.traffic import transport_name
from tests.actors.holders import DIGEST, GEOMETRY, TOP_K, Holder, question


@pytest.mark.parametrize(
    ("tls", "name"),
    [
        (None, "auto"),
        ("tcp", "tcp"),
        ("tcp,self", "tcp"),
        ("self", "auto"),
        ("posix,cma", "shm"),
        ("rc_mlx5,self", "rdma"),
        ("rc,ud_verbs", "rdma"),
        ("cuda_ipc,cuda_copy,self", "cuda"),
        ("rc,cuda_copy", "auto"),
        ("tcp,posix", "auto"),
        ("^tcp", "auto"),
        ("something_new", "auto"),
    ],
)
def test_names_of_transports(tls, name):
    assert transport_name(False, tls) == name
    assert transport_name(True, tls) == "shm"


def ask(endpoint, peer: str, tokens: int) -> int:
    """One round trip; returns the question's bytes in its slot."""
    x, weights, ids = question(tokens, 4)
    endpoint.dispatch(peer, 0, layer=0, step=1, epoch=1, x=x, ids=ids, weights=weights)
    (arrival,) = endpoint.wait(30.0)
    arrival.raise_if_refused()
    return GEOMETRY.layout(tokens, tokens * TOP_K, True).nbytes


@pytest.mark.timeout(120)
def test_totals_outlive_their_peers():
    from actors.transport.endpoint import Endpoint

    asker = Endpoint("attention-0", GEOMETRY, DIGEST, ucx_tls="tcp,self")
    (nothing,) = asker.traffic()
    assert (nothing.transport, nothing.dispatch_frames) == ("tcp", 0)
    questions = answers = frames = 0
    for name in ("ffn-a", "ffn-b"):
        holder = Holder(name, ucx_tls="tcp,self")
        holder.meet(asker)
        for tokens in (1, 5, 16):
            questions += ask(asker, name, tokens)
            answers += GEOMETRY.answer_bytes(tokens)
            frames += 1
        (before,) = asker.traffic()
        asker.disconnect(name)
        holder.stop()
        (totals,) = asker.traffic()
        assert totals.dispatch_frames == totals.combine_frames == frames
        assert (totals.dispatch_bytes, totals.combine_bytes) == (questions, answers)
        for stage in STAGES:
            assert totals.hops.stages[stage].count == frames
            assert totals.hops.stages[stage].sum_us == before.hops.stages[stage].sum_us
    assert nothing.dispatch_frames == 0  # a copy
    asker.close()
    assert asker.traffic()[0].hops.stages["total"].count == frames
