"""Bytes that no HTTP server should choke on: seeded, for tests of whoever listens."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress

LINE = 70_000
"""Bytes of an oversized line or header: more than servers of the standard library take."""


def noise(seed: int, count: int, paths: Sequence[str]) -> Iterator[bytes]:
    """Random, truncated, flipped, oversized and repeated requests.

    Args:
        paths: of the server, some of which are asked for.
    """
    dice = random.Random(f"noise {seed}")
    for _ in range(count):
        path = dice.choice(paths)
        body = dice.randbytes(dice.randrange(200))
        verb = dice.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "XYZZY", "\x00"))
        good = (
            f"{verb} {path} HTTP/1.{dice.randrange(2)}\r\nHost: x\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        match dice.randrange(7):
            case 0:
                yield dice.randbytes(dice.randrange(1, 400))
            case 1:
                yield good[: dice.randrange(1, len(good))]
            case 2:
                flipped = bytearray(good)
                for _ in range(dice.randrange(1, 6)):
                    flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
                yield bytes(flipped)
            case 3:
                length = dice.choice((-1, 2**63, 10**30, "ten", ""))
                yield f"POST {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode() + body
            case 4:
                yield good * dice.randrange(2, 5)
            case 5:
                lines = "".join(f"X-{n}: {n}\r\n" for n in range(dice.randrange(300)))
                yield f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode()
            case 6:
                wide = dice.randrange(50) == 0
                long = "a" * (LINE if wide else dice.randrange(4000))
                yield f"GET {path}?{long} HTTP/1.1\r\n{long}: {long[:9]}\r\n\r\n".encode()


def send(host: str, port: int, data: bytes, *, wait: bool = True) -> bytes:
    """What a server says to these bytes, at most 64 KiB of it; empty when it just hangs up.

    Args:
        wait: for the answer; else leave at once.
    """
    said = b""
    with suppress(ConnectionError), socket.create_connection((host, port), timeout=20) as end:
        end.sendall(data)
        if wait:
            end.shutdown(socket.SHUT_WR)
            while len(said) < 65536 and (part := end.recv(65536)):
                said += part
    return said
