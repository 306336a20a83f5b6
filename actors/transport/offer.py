"""What two processes tell each other, through Ray, before they exchange frames."""

from __future__ import annotations

from dataclasses import dataclass

from actors.errors import PeerMismatch


@dataclass(frozen=True, slots=True)
class Offer:
    """One side's slots for one peer, and the terms both sides must share. Plain data only.

    ``wires`` maps a wire's kind to its NIXL metadata; ``host`` says who may share memory with
    this process. ``session`` names this meeting: the peer puts it in every frame it sends, so a
    frame of an earlier meeting is told apart. ``nonce`` and ``seal``: see ``trust``.
    """

    name: str
    peer: str
    session: int
    protocol: int
    digest: bytes
    dtype: str
    hidden: int
    top_k: int
    max_tokens: int
    lanes: int
    host: str
    address: int
    memory: str
    device: int
    wires: tuple[tuple[str, bytes], ...]
    nonce: bytes = b""
    seal: bytes = b""

    def check(self, other: Offer) -> None:
        """Refuse a peer that does not serve the same model in the same way.

        Args:
            other: the peer's offer; ``self`` is ours.

        Raises:
            PeerMismatch: names every field that differs with both sides' values.
        """
        different = [
            f"{field} is {_show(mine)} here and {_show(theirs)} there"
            for field in (
                "protocol", "digest", "dtype", "hidden", "top_k", "max_tokens", "lanes"
            )
            if (mine := getattr(self, field)) != (theirs := getattr(other, field))
        ]  # fmt: skip
        if different:
            raise PeerMismatch(
                f"{self.name} and {other.name} can't exchange frames: {'; '.join(different)}; "
                "start both with the same model, spec and afflux version"
            )
        if other.peer != self.name:
            raise PeerMismatch(
                f"{self.name} was given an offer that {other.name} made for {other.peer}; "
                f"pass the result of {other.name}'s offer({self.name!r})",
                code="offer_misdirected",
            )


def _show(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
