"""What is on its way through the experts: one layer of one lane, and the frames that it became.

Plain data of ``experts_client``; no behaviour.
"""

from dataclasses import dataclass, field

import torch

from actors.routing import Share
from actors.transport.frame import FrameHeader


@dataclass(slots=True, eq=False)
class Part:
    """What one FFN actor is asked in one frame of a piece."""

    actor: str
    share: Share | None = None  # None = every pair of the piece
    rows: torch.Tensor | None = None  # rows of the piece that the answer belongs to; None = all
    step: int = 0
    layer: int = 0
    chunk: int = 0
    session: int = 0
    sent_at: float = 0.0
    deadline: float = 0.0
    wire_s: float = 0.0  # of an emulated wire, both ways
    header: FrameHeader | None = None  # of the answer
    partial: torch.Tensor | None = None  # the answer, [rows, H]


@dataclass(slots=True, eq=False)
class Piece:
    """Rows of a ticket that fit a frame, and what became of them."""

    lane: int
    layer: int
    step: int
    epoch: int
    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    out: torch.Tensor
    slot: int  # of its frames, at every peer
    chunk: int  # number of the next frames, so that answers are told apart
    parts: list[Part] = field(default_factory=list)
    queued: list[Part] = field(default_factory=list)  # wait for an earlier answer on their slot
    missing: int = 0
    sent: int = 0  # how often
    version: int = 0  # of the routes that the parts were made by
    sent_at: float = 0.0
    deadline: float = 0.0  # the earliest of the parts'
    ready_at: float = 0.0  # when an emulated wire has delivered
    disturbed: bool = False  # waited for more than its own frames: its times say nothing


@dataclass(slots=True, eq=False)
class Ticket:
    """One layer of one lane on its way through the experts; pieces are sent in their order."""

    out: torch.Tensor
    pieces: list[Piece]
