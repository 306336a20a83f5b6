"""A worse link for a host of ``hosts``: delay, loss, a rate.

A process takes the packets off the host's link, keeps them as long as they shall be late, and hands
them to the bridge. The kernel has ``tc netem`` for that where it was built with it, which those of
virtual machines often are not; this needs none. It does not reorder, and passes what offloading
makes of packets (up to 64 KiB) through whole, so that loss is per such packet. Linux only.
"""

from __future__ import annotations

import heapq
import random
import select
import socket
import subprocess
import sys
import time

_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 3
_HEADER = 10  # struct virtio_net_hdr
_MOST = 65536 + 64
_QUEUE_S = 0.2
"""A full link drops what would have to wait for longer."""


class Link:
    """See the module; takes ``port`` off ``bridge`` if it has to, and puts it back.

    Args:
        delay_s, loss, mbit: as ``Hosts.shape``.

    Raises:
        RuntimeError: ``ip`` refused, or packets may not be taken.
    """

    def __init__(
        self, bridge: str, port: str, *, delay_s: float, loss: float, mbit: float | None
    ) -> None:
        self._bridge, self._port, self._near = bridge, port, f"{port}n"
        far = f"{port}f"
        for words in (
            f"link add {self._near} type veth peer name {far}",
            f"link set {port} nomaster",
            f"link set {far} master {bridge} up",
            f"link set {self._near} up",
        ):
            ended = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if ended.returncode:
                raise RuntimeError(f"ip {words}: {ended.stderr.strip()}")
        ends = [port, self._near, str(delay_s), str(loss), str(mbit or 0)]
        self._line = subprocess.Popen([sys.executable, __file__, *ends], stdout=subprocess.PIPE)
        assert self._line.stdout is not None
        if self._line.stdout.readline() != b"ready\n":
            raise RuntimeError("the line between host and bridge did not start; see above")

    def close(self) -> None:
        """The link as it was."""
        self._line.kill()
        self._line.communicate()
        for words in (f"link del {self._near}", f"link set {self._port} master {self._bridge}"):
            # the host may be gone, and its port with it
            subprocess.run(["ip", *words.split()], capture_output=True)


def _open(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 20)
    end.bind((interface, _ETH_P_ALL))
    end.setblocking(False)
    return end


def relay(one: str, other: str, delay_s: float, loss: float, mbit: float) -> None:
    """Carry packets between two interfaces until killed."""
    ends = [_open(one), _open(other)]
    free = [0.0, 0.0]  # when each way can take the next packet
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    print("ready", flush=True)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], pause)[0]:
            way = ends.index(end)
            while True:
                try:
                    packet = end.recv(_MOST)
                except BlockingIOError:
                    break
                except OSError:  # the interface is gone, and a host with it
                    return
                now = time.monotonic()
                if loss and random.random() < loss:
                    continue
                due = now
                if mbit:
                    due = max(now, free[way]) + (len(packet) - _HEADER) * 8 / (mbit * 1e6)
                    if due - now > _QUEUE_S:
                        continue
                    free[way] = due
                number += 1
                heapq.heappush(waiting, (due + delay_s, number, 1 - way, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, way, packet = heapq.heappop(waiting)
            try:
                ends[way].send(packet)
            except OSError:
                pass  # a full queue or an interface that is gone: a link drops


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6]))
