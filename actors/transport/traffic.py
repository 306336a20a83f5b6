"""What went over a wire since the endpoint began: frames, bytes, hop times. Peers come and go, the
totals stay and never fall. Counted at the asking (attention) end; not per peer (``hops``)."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.transport.hops import HopTotals

_SHARED_MEMORY = frozenset({"posix", "sysv", "cma", "knem", "xpmem", "sm", "shm", "mm"})
_RDMA = frozenset({"rc", "ud", "dc", "ib", "srd", "gga"})


@dataclass
class Traffic:
    """Totals of one wire.

    Args:
        transport: see ``transport_name``.

    Attributes:
        dispatch_bytes, combine_bytes: payload; headers and notifications are not in it.
        hops: of the peers that are gone, or of all in what ``Endpoint.traffic`` gives out.
    """

    transport: str
    dispatch_frames: int = 0
    dispatch_bytes: int = 0
    combine_frames: int = 0
    combine_bytes: int = 0
    hops: HopTotals = field(default_factory=HopTotals)

    def copy(self) -> Traffic:
        """Independent of this one from now on."""
        return Traffic(
            self.transport,
            self.dispatch_frames,
            self.dispatch_bytes,
            self.combine_frames,
            self.combine_bytes,
            self.hops.copy(),
        )


def transport_name(local: bool, ucx_tls: str | None) -> str:
    """How frames travel, as far as it is known: "shm", "tcp", "rdma", "cuda", or "auto".

    Args:
        local: over the wire that is shared memory and nothing else.
        ucx_tls: transports that UCX may use, or None for any. UCX does not tell which one it took,
            so a list of several kinds is "auto" too.
    """
    if local:
        return "shm"
    if ucx_tls is None or ucx_tls.startswith("^"):
        return "auto"
    kinds = {_kind(word) for word in ucx_tls.split(",")} - {"self"}
    return kinds.pop() if len(kinds) == 1 else "auto"


def _kind(word: str) -> str:
    name = word.strip().lstrip("\\").partition(":")[0].partition("/")[0]
    family = name.partition("_")[0]
    if name in _SHARED_MEMORY:
        return "shm"
    if family in _RDMA:
        return "rdma"
    return family if family in ("self", "tcp", "cuda") else "auto"
