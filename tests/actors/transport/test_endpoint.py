"""Two endpoints in one process: frames arrive bit for bit, bad ones are refused, links come back.

What needs a second process (death, other peers unaffected) is in ``test_processes``.
"""

import time

import pytest
import torch

import actors.transport.endpoint as endpoint_module
from actors.errors import PeerLost, PeerMismatch, PeerRefused
from actors.transport import frame
from actors.transport.endpoint import Endpoint
from actors.transport.frame import Kind
from actors.transport.geometry import Geometry

DIGEST = "ab" * 32
GEOMETRY = Geometry(64, 2, torch.float32, 32, 3)


def connect(one, other):
    mine, theirs = one.offer(other.name), other.offer(one.name)
    one.connect(theirs)
    other.connect(mine)


def until(condition, *endpoints, seconds=5.0):
    """Poll endpoints until the condition holds; returns what arrived, by endpoint."""
    arrived = {endpoint.name: [] for endpoint in endpoints}
    deadline = time.monotonic() + seconds
    while not condition(arrived):
        assert time.monotonic() < deadline, "nothing arrived"
        for endpoint in endpoints:
            arrived[endpoint.name] += endpoint.poll()
    return arrived


def exchange(asker, server, *, lane=0, rows=None, x=None, ids=None, weights=None, layer=3, step=1):
    """One question and its answer (twice the input); returns both arrivals."""
    asker.dispatch(
        server.name, lane, layer=layer, step=step, epoch=5, x=x, ids=ids, weights=weights, rows=rows
    )
    (question,) = until(lambda a: a[server.name], asker, server)[server.name]
    seen = tuple(t.clone() if t is not None else None for t in
                 (question.x, question.ids, question.weights, question.rows))  # fmt: skip
    now = time.monotonic_ns()
    server.combine(question, question.x * 2, compute_start_ns=now, compute_end_ns=now + 10)
    (answer,) = until(lambda a: a[asker.name], asker, server)[asker.name]
    return question, seen, answer


def sample(geometry=GEOMETRY, tokens=5, pairs=None):
    x = torch.randn(tokens, geometry.hidden).to(geometry.dtype)
    shape = (tokens, geometry.top_k) if pairs is None else (pairs,)
    ids = torch.randint(0, 8, shape)
    weights = torch.rand(shape)
    rows = None if pairs is None else torch.randint(0, tokens, shape)
    return {"x": x, "ids": ids, "weights": weights, "rows": rows}


@pytest.fixture(scope="module")
def endpoints():
    """Making an endpoint costs a good part of a second on a busy machine; meeting does not."""
    made = [Endpoint(name, GEOMETRY, DIGEST) for name in ("attention-0", "ffn-0")]
    yield made
    for endpoint in made:
        endpoint.close()


@pytest.fixture
def pair(endpoints):
    asker, server = endpoints
    connect(asker, server)
    yield asker, server
    for endpoint in endpoints:
        for peer in list(endpoint._links):
            endpoint.disconnect(peer)
        endpoint.poll()
        endpoint.counters.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bit_exact_dense_and_pairs(dtype):
    geometry = Geometry(96, 3, dtype, 40, 8)
    asker, server = (Endpoint(name, geometry, DIGEST) for name in ("a", "f"))
    connect(asker, server)
    for number, (tokens, pairs) in enumerate([(1, None), (40, None), (7, 1), (7, 21), (33, 50)]):
        sent = sample(geometry, tokens, pairs)
        question, seen, answer = exchange(asker, server, lane=number, step=number, **sent)
        assert question.header.dense == (pairs is None)
        assert seen[0].dtype == dtype
        assert torch.equal(seen[0], sent["x"])
        assert torch.equal(seen[1].long(), sent["ids"])
        assert torch.equal(seen[2], sent["weights"])
        if pairs is not None:
            assert torch.equal(seen[3].long(), sent["rows"])
        assert torch.equal(answer.x, sent["x"] * 2)
        assert answer.header.key == question.header.key == (number, 3, number, 0, 5)
    asker.close()
    server.close()


def test_strided_input_and_answer_in_place(pair):
    asker, server = pair
    wide = torch.randn(5, 128)
    sent = sample() | {"x": wide[:, ::2]}
    asker.dispatch("ffn-0", 2, layer=1, step=1, epoch=1, **sent)
    (question,) = until(lambda a: a["ffn-0"], asker, server)["ffn-0"]
    assert torch.equal(question.x, wide[:, ::2])
    torch.add(question.x, 1, out=server.result_view(question, 5))
    server.combine(question, compute_start_ns=1, compute_end_ns=2)
    (answer,) = until(lambda a: a["attention-0"], asker, server)["attention-0"]
    assert torch.equal(answer.x, wide[:, ::2] + 1)


def test_question_written_in_place(pair):
    asker, server = pair
    sent = sample(tokens=4, pairs=6)
    views = asker.send_views("ffn-0", 1, 4, 6, dense=False)
    for view, name in zip(views, ("x", "ids", "weights", "rows"), strict=True):
        view.copy_(sent[name])
    x, ids, weights, rows = views
    _, seen, _ = exchange(asker, server, lane=1, x=x, ids=ids, weights=weights, rows=rows)
    assert torch.equal(seen[0], sent["x"])
    assert torch.equal(seen[3].long(), sent["rows"])


def test_lanes_carry_frames_side_by_side(pair):
    asker, server = pair
    samples = [sample(tokens=lane + 2) for lane in range(3)]
    for lane, sent in enumerate(samples):
        asker.dispatch("ffn-0", lane, layer=lane, step=1, epoch=1, **sent)
    questions = until(lambda a: len(a["ffn-0"]) == 3, asker, server)["ffn-0"]
    for question in reversed(questions):
        server.combine(question, question.x * 3, compute_start_ns=1, compute_end_ns=2)
    answers = until(lambda a: len(a["attention-0"]) == 3, asker, server)["attention-0"]
    assert sorted(answer.header.lane for answer in answers) == [0, 1, 2]
    for answer in answers:
        assert torch.equal(answer.x, samples[answer.header.lane]["x"] * 3)


def test_pieces_of_a_lane_are_on_their_way_at_the_same_time(pair):
    asker, server = pair
    samples = [sample(tokens=5, pairs=7) for _ in range(4)]
    for chunk in (0, 1):
        x, ids, weights, rows = asker.send_views("ffn-0", 2, 5, 7, dense=False, chunk=chunk)
        for view, name in zip((x, ids, weights, rows), samples[chunk], strict=True):
            view.copy_(samples[chunk][name])
        sent = {"x": x, "ids": ids, "weights": weights, "rows": rows, "chunk": chunk}
        asker.dispatch("ffn-0", 2, layer=0, step=1, epoch=1, **sent)
    first, second = until(lambda a: len(a["ffn-0"]) == 2, asker, server)["ffn-0"]
    for question, chunk in ((first, 0), (second, 1)):
        assert torch.equal(question.x, samples[chunk]["x"])
    torch.mul(first.x, 2, out=server.result_view(first, 5))
    server.combine(first, compute_start_ns=1, compute_end_ns=2)
    (answer,) = until(lambda a: a["attention-0"], asker, server)["attention-0"]
    # into the slots that are free by now; the second piece still lies in its own
    asker.dispatch("ffn-0", 2, layer=0, step=1, epoch=1, chunk=2, **samples[2])
    (third,) = until(lambda a: a["ffn-0"], asker, server)["ffn-0"]
    assert torch.equal(second.x, samples[1]["x"])
    server.combine(second, second.x * 3, compute_start_ns=1, compute_end_ns=2)
    (other,) = until(lambda a: a["attention-0"], asker, server)["attention-0"]
    assert torch.equal(answer.x, samples[0]["x"] * 2)
    assert torch.equal(other.x, samples[1]["x"] * 3)
    assert torch.equal(third.x, samples[2]["x"])
    assert [a.header.chunk for a in (answer, other, third)] == [0, 1, 2]


def test_hop_is_measured(pair):
    asker, server = pair
    _, _, answer = exchange(asker, server, **sample())
    hop = answer.hop
    assert hop is not None
    assert hop.compute == pytest.approx(0.01)
    assert hop.total >= hop.wire_out + hop.wire_back > 0
    assert asker.hops()["ffn-0"]["total"]["count"] == 1


def test_refusal_reaches_the_asker(pair):
    asker, server = pair
    asker.dispatch("ffn-0", 0, layer=9, step=4, epoch=1, **sample())
    (question,) = until(lambda a: a["ffn-0"], asker, server)["ffn-0"]
    server.refuse(question, "unknown_layer", "layer 9 is not here")
    (answer,) = until(lambda a: a["attention-0"], asker, server)["attention-0"]
    assert answer.header.kind == Kind.ERROR
    assert answer.header.layer == 9
    with pytest.raises(PeerRefused, match=r"ffn-0 refused .*layer 9 is not here") as caught:
        answer.raise_if_refused()
    assert caught.value.code == "unknown_layer"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"digest": "cd" * 32}, "digest is abababababababab here and cdcdcdcdcdcdcdcd there"),
        ({"hidden": 32}, "hidden is 64 here and 32 there"),
        ({"dtype": torch.bfloat16}, "dtype is float32 here and bfloat16 there"),
        ({"lanes": 2, "top_k": 1}, "top_k is 2 here and 1 there; lanes is 3 here and 2 there"),
    ],
)
def test_mismatch_names_both_sides(change, says):
    terms = {"hidden": 64, "top_k": 2, "dtype": torch.float32, "max_tokens": 32, "lanes": 3}
    digest = change.pop("digest", DIGEST)
    one = Endpoint("attention-0", GEOMETRY, DIGEST)
    other = Endpoint("ffn-0", Geometry(**(terms | change)), digest)
    with pytest.raises(PeerMismatch, match=says) as caught:
        one.connect(other.offer("attention-0"))
    assert "attention-0 and ffn-0" in str(caught.value)
    assert one.peers == []


def test_offer_for_somebody_else_is_refused():
    one, other = Endpoint("a", GEOMETRY, DIGEST), Endpoint("f", GEOMETRY, DIGEST)
    with pytest.raises(PeerMismatch, match="f made for b"):
        one.connect(other.offer("b"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 33}, "33 tokens; a frame holds 1 to 32"),
        ({"lane": 3}, "lane 3, expected 0 to 2"),
        ({"x": torch.zeros(5, 63)}, r"\(5, 63\).*expected \[tokens, 64\]"),
        ({"x": torch.zeros(5, 64, dtype=torch.float16)}, "torch.float16"),
        ({"weights": torch.zeros(5, 3)}, r"weights \(5, 3\), expected \(5, 2\)"),
        ({"ids": torch.zeros(7, dtype=torch.int32)}, r"ids are \(7,\)"),
    ],
)
def test_bad_questions_stay_at_home(pair, change, says):
    asker, server = pair
    lane = change.pop("lane", 0)
    sent = sample(tokens=change.pop("tokens", 5)) | change
    with pytest.raises(ValueError, match=says):
        asker.dispatch("ffn-0", lane, layer=1, step=1, epoch=1, **sent)
    exchange(asker, server, **sample())


def forge(asker, **fields):
    """Send a valid question whose header is then changed on the way."""
    link = asker._links["ffn-0"]
    good = frame.FrameHeader(
        1, 3, 1, 0, 1, 0, 2, 5, 10, 1, asker._source, link.remote_session, 1, asker.digest
    )
    link.wire.notify(link.agent, frame.pack(good._replace(**fields), tag=link.tag))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"digest": b"x" * 8}, "digest_mismatch"),
        ({"dtype": 1}, "bad_dtype"),
        ({"tokens": 33, "pairs": 66}, "bad_frame"),
        ({"tokens": 2**32 - 1}, "bad_frame"),
        ({"pairs": 9}, "bad_frame"),
        ({"lane": 3}, "bad_frame"),
        ({"top_k": 1}, "bad_frame"),
    ],
)
def test_frames_that_do_not_fit_are_answered_with_an_error(pair, fields, code):
    asker, server = pair
    forge(asker, **fields)
    arrived = until(lambda a: a["attention-0"], asker, server)
    assert arrived["ffn-0"] == []
    (answer,) = arrived["attention-0"]
    assert answer.error is not None
    assert answer.error[0] == code
    assert server.counters[code] == 1
    exchange(asker, server, **sample())


def test_noise_and_stale_frames_are_counted_and_dropped(pair):
    asker, server = pair
    link = asker._links["ffn-0"]
    for note in (b"", b"AFX1", b"\0" * 500, b"AFX1" + b"\xff" * 120):
        link.wire.notify(link.agent, note)
    forge(asker, session=link.remote_session ^ 1)
    counters = server.counters
    until(
        lambda _: counters["bad_frame"] + counters["bad_protocol"] == 4 and counters["stale"],
        *pair,
    )
    exchange(asker, server, **sample())


def test_disconnect_tells_the_peer_and_others_go_on(pair):
    asker, server = pair
    third = Endpoint("ffn-1", GEOMETRY, DIGEST)
    connect(asker, third)
    exchange(asker, server, **sample())
    server.disconnect("attention-0")
    until(lambda _: "ffn-0" in asker.lost, asker, server)
    assert asker.peers == ["ffn-1"]
    with pytest.raises(PeerLost, match="closed the connection"):
        asker.dispatch("ffn-0", 0, layer=1, step=1, epoch=1, **sample())
    exchange(asker, third, **sample())
    third.close()


def test_restarted_peer_joins_under_its_old_name(pair):
    asker, server = pair
    exchange(asker, server, **sample())
    old = asker._links["ffn-0"]
    successor = Endpoint("ffn-0", GEOMETRY, DIGEST)
    connect(asker, successor)  # nobody told us that the old one is gone
    with pytest.raises(PeerLost):
        asker._live(type("Late", (), {"_link": old})())
    exchange(asker, successor, **sample())
    # The old incarnation does not know yet and writes on: dropped, not mistaken for the new one.
    server.dispatch("attention-0", 0, layer=1, step=1, epoch=1, **sample())
    until(lambda _: asker.counters["stranger"] or server.lost, asker, server, successor)
    exchange(asker, successor, **sample())
    successor.close()


def test_offer_is_stable_until_both_are_connected_and_connect_may_repeat():
    one, other = Endpoint("a", GEOMETRY, DIGEST), Endpoint("f", GEOMETRY, DIGEST)
    first = one.offer("f")
    assert one.offer("f").session == first.session
    theirs = other.offer("a")
    one.connect(theirs)
    one.connect(theirs)
    other.connect(first)
    exchange(one, other, **sample())
    assert one.offer("f").session != first.session


def test_unknown_peer_and_closed_endpoint():
    one = Endpoint("a", GEOMETRY, DIGEST)
    with pytest.raises(PeerLost, match="a is not connected to f") as caught:
        one.dispatch("f", 0, layer=1, step=1, epoch=1, **sample())
    assert caught.value.code == "peer_unknown"
    one.disconnect("f")
    one.close()
    one.close()
    assert one.poll() == []
    with pytest.raises(PeerLost, match="closed"):
        one.offer("f")


def test_three_askers_and_three_servers():
    askers = [Endpoint(f"attention-{i}", GEOMETRY, DIGEST) for i in range(3)]
    servers = [Endpoint(f"ffn-{i}", GEOMETRY, DIGEST) for i in range(3)]
    for asker in askers:
        for server in servers:
            connect(asker, server)
    for step in range(5):
        sent = {}
        for asker in askers:
            for server in servers:
                for lane in range(3):
                    question = sent[asker.name, server.name, lane] = sample()
                    asker.dispatch(server.name, lane, layer=1, step=step, epoch=1, **question)
        waiting, deadline = len(sent), time.monotonic() + 20
        while waiting:
            assert time.monotonic() < deadline
            for server in servers:
                for arrival in server.poll():
                    server.combine(arrival, arrival.x * 2, compute_start_ns=1, compute_end_ns=2)
            for asker in askers:
                for arrival in asker.poll():
                    question = sent[asker.name, arrival.peer, arrival.header.lane]
                    assert torch.equal(arrival.x, question["x"] * 2)
                    assert arrival.header.step == step
                    waiting -= 1
    for endpoint in askers + servers:
        endpoint.close()


def test_many_sizes_reuse_few_handles(pair):
    asker, server = pair
    for step in range(120):
        exchange(asker, server, lane=step % 3, step=step, **sample(tokens=1 + step % 32))
    assert len(asker._links["ffn-0"].handles) <= 3 * 34


def test_wait_ends_at_its_deadline(pair):
    asker, _ = pair
    start = time.monotonic()
    assert asker.wait(0.1, ["ffn-0"]) == []
    assert 0.09 <= time.monotonic() - start < 1.0


def test_a_local_wire_is_renewed_when_many_have_left_and_those_who_stay_notice_nothing(monkeypatch):
    """UCX keeps what it had for a peer of the same host until the worker goes: so it must go."""
    monkeypatch.setattr(endpoint_module, "_DEPARTED", 2)
    lasting, guest, first = (Endpoint(name, GEOMETRY, DIGEST) for name in ("a", "f-new", "f-old"))
    if "local" not in lasting._wires:
        pytest.skip("processes may not write into each other's memory here")
    connect(lasting, first)
    seen = {lasting._links["f-old"].wire.name}
    for step in range(7):
        connect(lasting, guest)
        seen.add(lasting._links["f-new"].wire.name)
        exchange(lasting, guest, step=step, **sample())
        exchange(lasting, first, step=step, **sample())
        lasting.disconnect("f-new")
        until(lambda _: guest.lost, guest)
        assert len(lasting._polled) <= 2  # the first one's, and the newest
    assert 3 <= len(seen) <= 5
    exchange(lasting, first, step=8, **sample())
    lasting.disconnect("f-old")
    assert lasting._polled == []
    for endpoint in (lasting, guest, first):
        endpoint.close()
