"""Which network interface the data plane uses on a node without RDMA: that of the cluster.

UCX would listen on every interface and pick by bandwidth: a container bridge as soon as the network
that joins the nodes. With RDMA devices the choice is UCX's, since these are named otherwise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

VARIABLE = "UCX_NET_DEVICES"
_RDMA = Path("/sys/class/infiniband")


def choose(address: str | None) -> str | None:
    """Have UCX use the interface that has ``address``, unless it was told or there is RDMA.

    Before the first context of the process; UCX reads its environment then.

    Returns:
        What UCX will use; None: its own choice.
    """
    told = os.environ.get(VARIABLE)
    if told or address is None or (_RDMA.is_dir() and any(_RDMA.iterdir())):
        return told or None
    found = {
        name: [entry.address for entry in entries]
        for name, entries in psutil.net_if_addrs().items()
    }
    name = interface_of(address, found)
    if name is None:
        logger.warning(
            "no interface has this node's address %s; UCX takes what it likes, or set "
            "transport.net_devices",
            address,
        )
        return None
    os.environ[VARIABLE] = name
    return name


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """Name of the interface with an address; IPv6 scopes (``%eth0``) don't count. Pure."""
    bare = address.partition("%")[0]
    for name, addresses in interfaces.items():
        if bare in (entry.partition("%")[0] for entry in addresses):
            return name
    return None
