"""Headers survive the wire exactly, and nothing damaged is taken for a header."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import FrameError
from actors.transport import frame
from actors.transport.frame import FrameHeader, Kind

u8, u16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
headers = st.builds(
    FrameHeader,
    kind=st.sampled_from([int(kind) for kind in Kind]),
    dtype=u8, flags=u8, lane=u8, layer=u16, chunk=u16, top_k=u16,
    tokens=u32, pairs=u32, epoch=u32, source=u32, session=u32, step=u64,
    digest=st.binary(min_size=8, max_size=8),
    queued_ns=u64, sent_ns=u64, recv_ns=u64, start_ns=u64, end_ns=u64, reply_ns=u64,
)  # fmt: skip
PLAIN = FrameHeader(1, 1, 1, 0, 3, 0, 8, 64, 512, 7, 1, 2, 9, b"12345678")


@given(headers)
def test_round_trip(header):
    assert frame.unpack(frame.pack(header)) == header


@given(headers, st.data())
def test_every_truncation_is_refused(header, data):
    note = frame.pack(header)
    length = data.draw(st.integers(0, len(note) - 1))
    with pytest.raises(FrameError):
        frame.unpack(note[:length])


@given(headers, st.data())
def test_every_damaged_byte_is_refused(header, data):
    note = bytearray(frame.pack(header))
    note[data.draw(st.integers(0, len(note) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FrameError):
        frame.unpack(bytes(note))


@given(st.binary(max_size=400))
def test_noise_is_refused(note):
    with pytest.raises(FrameError):
        frame.unpack(note)


@given(headers, st.binary(min_size=1, max_size=32))
def test_trailing_bytes_are_refused(header, tail):
    if header.kind == Kind.ERROR:
        header = header._replace(kind=Kind.DISPATCH)
    with pytest.raises(FrameError):
        frame.unpack(frame.pack(header, tail))


def test_error_text_round_trip_and_limit():
    note = frame.pack_error(PLAIN, "unknown_layer", "layer 99 ist nicht hier: ä" + "x" * 500)
    assert frame.unpack(note).kind == Kind.ERROR
    code, text = frame.unpack_error(note)
    assert code == "unknown_layer"
    assert text.startswith("layer 99 ist nicht hier: ä")
    assert len(text.encode()) <= frame.MAX_ERROR_TEXT


def test_other_protocol_has_its_own_code():
    note = bytearray(frame.pack(PLAIN))
    note[4] += 1
    with pytest.raises(FrameError, match=f"protocol {frame.PROTOCOL + 1}") as caught:
        frame.unpack(bytes(note))
    assert caught.value.code == "bad_protocol"


def test_unknown_kind_is_refused():
    with pytest.raises(FrameError, match="kind 77"):
        frame.unpack(frame.pack(PLAIN._replace(kind=77)))


def test_a_field_that_does_not_fit_names_the_header():
    with pytest.raises(ValueError, match="layer=70000"):
        frame.pack(PLAIN._replace(layer=70000))
