"""The frame header: what one message on the data plane says about itself.

A frame is one contiguous one-sided write into the receiver's slot plus one NIXL notification that
carries the header below, so a frame needs no other message to be understood. Everything here is
pure: no sockets, no tensors. Not for the bytes of the payload: see ``geometry``.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from actors.errors import FrameError

MAGIC = b"AFX1"
PROTOCOL = 3
TAG_BYTES = 8
DENSE = 1
"""Flag: ids and weights are [tokens, top_k] and there are no row numbers."""

MAX_ERROR_TEXT = 200
DIGEST_BYTES = 8


class Kind(IntEnum):
    """What a frame is for."""

    DISPATCH = 1  # attention -> FFN: hidden states, expert ids, weights
    COMBINE = 2  # FFN -> attention: weighted partial sums
    ERROR = 3  # refusal; carries a code and a text in the notification, no payload
    BYE = 4  # the sender is closing this link; no payload


class FrameHeader(NamedTuple):
    """All fields of a frame, in wire order. A tuple because it is built on every hop.

    Times are nanoseconds of the monotonic clock of the process that took them: ``queued_ns`` and
    ``sent_ns`` of the attention side (echoed in the answer), the other four of the FFN side.
    Clocks of different hosts can't be compared without ``hops.OffsetEstimator``.
    """

    kind: int
    dtype: int
    flags: int
    lane: int
    layer: int
    chunk: int
    top_k: int
    tokens: int
    pairs: int
    epoch: int
    source: int
    session: int
    step: int
    digest: bytes
    queued_ns: int = 0
    sent_ns: int = 0
    recv_ns: int = 0
    start_ns: int = 0
    end_ns: int = 0
    reply_ns: int = 0

    @property
    def dense(self) -> bool:
        return bool(self.flags & DENSE)

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        """(step, layer, lane, chunk, epoch): what pairs an answer with its question."""
        return (self.step, self.layer, self.lane, self.chunk, self.epoch)

    def describe(self) -> str:
        """One line for error messages and logs."""
        return (
            f"{_kind_name(self.kind)} step {self.step} layer {self.layer} lane {self.lane} "
            f"chunk {self.chunk} epoch {self.epoch} tokens {self.tokens} pairs {self.pairs}"
        )


_BODY = struct.Struct("<4sBBBBBHHHIIIIIQ8sQQQQQQ")
HEADER_BYTES = _BODY.size + TAG_BYTES
# Plain numbers: looking up an enum's members costs a tenth of a microsecond each.
_KINDS = frozenset(int(kind) for kind in Kind)
_ERROR = int(Kind.ERROR)


def _kind_name(kind: int) -> str:
    return Kind(kind).name if kind in _KINDS else f"kind {kind}"


def tagger(key: bytes) -> Any:
    """What ``pack`` and ``unpack`` tag and check frames with; made once per link.

    Args:
        key: of ``trust.link_key``; b"" makes a checksum that anybody can make.
    """
    return hashlib.blake2b(digest_size=TAG_BYTES, key=key)


UNKEYED = tagger(b"")


def pack(header: FrameHeader, tail: bytes = b"", tag: Any = UNKEYED) -> bytes:
    """Header (and the text of an ERROR) as bytes, with a tag that shows who made it.

    Args:
        tag: of ``tagger``, with the link's key.

    Raises:
        ValueError: a field does not fit its width; says which header.
    """
    try:
        body = _BODY.pack(MAGIC, PROTOCOL, *header) + tail
    except struct.error as error:
        raise ValueError(f"frame header field out of range ({error}): {header}") from error
    made = tag.copy()
    made.update(body)
    return body + made.digest()


def unpack(note: bytes, tag: Any = UNKEYED) -> FrameHeader:
    """The header in a notification.

    Raises:
        FrameError: too short, wrong magic, other protocol version, or a tag that does not match
            (code ``bad_tag``): damaged, or made by somebody without the link's key.
    """
    size = len(note)
    if size < HEADER_BYTES:
        raise FrameError(f"frame of {size} bytes is shorter than a header ({HEADER_BYTES} bytes)")
    fields = _BODY.unpack_from(note)
    if fields[0] != MAGIC:
        raise FrameError(f"frame starts with {fields[0]!r}, expected {MAGIC!r}")
    if fields[1] != PROTOCOL:
        raise FrameError(
            f"frame speaks protocol {fields[1]}, this process speaks {PROTOCOL}; "
            "run the same afflux version on all actors",
            code="bad_protocol",
        )
    expected = tag.copy()
    expected.update(note[:-TAG_BYTES])
    if not hmac.compare_digest(expected.digest(), note[-TAG_BYTES:]):
        raise FrameError(
            f"frame of {size} bytes is damaged, or from a stranger: its tag does not match",
            code="bad_tag",
        )
    header = FrameHeader._make(fields[2:])
    if size != HEADER_BYTES and header.kind != _ERROR:
        raise FrameError(f"frame of {size} bytes, expected {HEADER_BYTES}: {header.describe()}")
    if header.kind not in _KINDS:
        raise FrameError(f"frame of unknown kind {header.kind}, expected 1 to {max(Kind)}")
    return header


def pack_error(header: FrameHeader, code: str, text: str, tag: Any = UNKEYED) -> bytes:
    """An ERROR frame; the text is cut to ``MAX_ERROR_TEXT`` bytes."""
    tail = code.encode()[:64] + b"\0" + text.encode()[:MAX_ERROR_TEXT]
    return pack(header._replace(kind=Kind.ERROR), tail, tag)


def unpack_error(note: bytes) -> tuple[str, str]:
    """(code, text) of an ERROR frame that ``unpack`` accepted."""
    code, _, text = note[_BODY.size : -TAG_BYTES].partition(b"\0")
    return code.decode(errors="replace"), text.decode(errors="replace")
