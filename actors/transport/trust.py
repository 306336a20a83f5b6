"""Who belongs to the deployment: offers are sealed and frames tagged with keys of its secret.

The secret never travels on the data plane. Offers do not either (they go through Ray), but whoever
learned of one could not make another, and without the key that two offers and the secret make, no
frame passes. This is authentication, not encryption: payloads are readable, and a transport that
lets peers write by address trusts its network; see docs/security.md. Pure.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.transport.offer import Offer

NONCE_BYTES = 16


def nonce() -> bytes:
    """What makes every meeting's key another one."""
    return secrets.token_bytes(NONCE_BYTES)


def sealed(secret: bytes, offer: Offer) -> Offer:
    """The offer with its seal: HMAC-SHA256 of all other fields."""
    return replace(offer, seal=_seal(secret, offer))


def is_genuine(secret: bytes, offer: Offer) -> bool:
    """Whether somebody who has the secret made exactly this offer. In constant time."""
    return hmac.compare_digest(_seal(secret, offer), offer.seal)


def link_key(secret: bytes, one: bytes, other: bytes) -> bytes:
    """32 bytes that both ends of a link derive alike, of both offers' nonces."""
    return hmac.digest(secret, b"afflux link" + b"".join(sorted((one, other))), "sha256")


def _seal(secret: bytes, offer: Offer) -> bytes:
    # the repr of plain data (text, numbers, bytes, tuples) is the same in every process
    text = repr(replace(offer, seal=b"")).encode()
    return hmac.digest(secret, b"afflux offer" + text, "sha256")
