"""The only file that talks to NIXL: one agent, its cheapest calls, its errors made ours.

A process has one or two wires. The *remote* wire reaches any peer and lets UCX detect dead peers
itself, which makes UCX carry notifications over TCP even inside one host (measured: 15 us each
way, whatever the size). The *local* wire is for peers on the same host: shared memory only, and
without UCX's error handling, which shared memory can't do (4 us each way). A dead peer is seen
there too, because a write into a dead process fails at once. Not for frames or slots.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from actors.errors import AffluxError, PeerLost

# Read when the libraries are loaded. UCX's warnings at process exit (requests to peers that died)
# would reach a user's terminal otherwise. NIXL logs every agent it makes.
os.environ.setdefault("UCX_LOG_LEVEL", "error")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

import torch
from nixl._api import nixl_agent, nixl_agent_config

LOCAL = "local"
REMOTE = "remote"
_LOCAL_TLS = "posix,sysv,cma,self"
_LOST = (
    "nixlRemoteDisconnectError",
    "nixlNotFoundError",
    "nixlCancelledError",
    "nixlBackendError",
)


class Wire:
    """One NIXL agent with the UCX backend, polled (no progress thread).

    Not thread-safe: the endpoint holds a lock around every call.

    Args:
        name: agent name, unique among all processes that ever meet.
        kind: ``LOCAL`` or ``REMOTE``.
        ucx_tls: UCX transport list for the remote wire; None leaves UCX its choice.
    """

    def __init__(self, name: str, kind: str, ucx_tls: str | None = None):
        self.name = name
        self.kind = kind
        tls = _LOCAL_TLS if kind == LOCAL else ucx_tls
        with _environment("UCX_TLS", tls):
            config = nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = nixl_agent(name, config)
            mode = "none" if kind == LOCAL else "peer"
            self._agent.create_backend("UCX", {"ucx_error_handling_mode": mode})
        # The wrapper's string look-ups cost more than the calls themselves.
        self._native: Any = self._agent.agent
        binding = __import__(type(self._native).__module__, fromlist=["nixlAgent"])
        self._write = binding.NIXL_WRITE
        self._read = binding.NIXL_READ
        self._ok = binding.NIXL_SUCCESS
        self._lost = tuple(getattr(binding, name) for name in _LOST)
        self.take_notes = self._native.getNotifs
        """take_notes({}) -> {agent name: [bytes]}; also makes progress."""

    def register(self, *memory: torch.Tensor) -> Any:
        """Make tensors reachable for peers; returns what ``deregister`` wants."""
        return self._agent.register_memory(list(memory))

    def deregister(self, registration: Any) -> None:
        self._agent.deregister_memory(registration)

    def metadata(self, registration: Any) -> bytes:
        """What a peer needs to write into this registration, and only into this one."""
        return self._agent.get_partial_agent_metadata(registration, True, ["UCX"])

    def add(self, metadata: bytes) -> str:
        """Learn about a peer's agent; returns its name."""
        name = self._agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else name

    def remove(self, agent: str) -> None:
        """Forget a peer's agent; no error when it is already gone."""
        with suppress(*self._lost):
            self._agent.remove_remote_agent(agent)

    def prepare(self, agent: str, regions: list[tuple[int, int, int]], memory: str) -> Any:
        """Prepared descriptors of (address, bytes, device); ``agent`` "" means this process."""
        return self._agent.prep_xfer_dlist(agent, regions, memory)

    def handle(self, local: Any, remote: Any, index: int) -> int:
        """A reusable write of descriptor ``index``; free it with ``release``."""
        return self._native.makeXferReq(
            self._write, local._handle, [index], remote._handle, [index], b"", [], False
        )

    def reading(self, local: Any, remote: Any, count: int) -> int:
        """A read of the first ``count`` descriptors, otherwise like ``handle``."""
        which = list(range(count))
        return self._native.makeXferReq(
            self._read, local._handle, which, remote._handle, which, b"", [], False
        )

    def release(self, handle: int) -> None:
        """Free a write or a read."""
        with suppress(Exception):  # in flight to a dead peer: NIXL keeps it until the agent goes
            self._native.releaseXferReq(handle)

    def post(self, handle: int, note: bytes | None) -> bool:
        """Start a write or a read; True when it is already complete.

        Raises:
            PeerLost: the transport says that the peer is gone.
        """
        try:
            if note is None:
                return self._native.postXferReq(handle) == self._ok
            return self._native.postXferReq(handle, note) == self._ok
        except self._lost as error:
            raise PeerLost(f"the transport lost the peer ({error})") from error

    def done(self, handle: int) -> bool:
        """True when what was posted is complete; raises PeerLost like ``post``."""
        try:
            return self._native.getXferStatus(handle) == self._ok
        except self._lost as error:
            raise PeerLost(f"the transport lost the peer ({error})") from error

    def notify(self, agent: str, note: bytes) -> None:
        """A notification without data; raises PeerLost like ``post``."""
        try:
            self._native.genNotif(agent, note)
        except self._lost as error:
            raise PeerLost(f"the transport lost the peer ({error})") from error


def local_wire_usable() -> bool:
    """Whether this process may write into other processes' memory (cross-memory attach).

    Container runtimes and hardened kernels may forbid it; then only the remote wire exists. UCX
    itself copes with Yama's scope 1, not with 2 and 3.
    """
    if _read("/proc/sys/kernel/yama/ptrace_scope") not in ("", "0", "1"):
        return False
    try:
        write = ctypes.CDLL(None, use_errno=True).process_vm_writev
    except (OSError, AttributeError):
        return False
    write.restype = ctypes.c_ssize_t
    source, target = ctypes.create_string_buffer(b"x"), ctypes.create_string_buffer(1)
    vector = ctypes.c_size_t * 2
    local = vector(ctypes.addressof(source), 1)
    remote = vector(ctypes.addressof(target), 1)
    count = ctypes.c_ulong(1)
    return write(os.getpid(), local, count, remote, count, ctypes.c_ulong(0)) == 1


def host_identity() -> str:
    """Equal in two processes only if they can share memory: boot, namespaces and user."""
    parts = [_read("/proc/sys/kernel/random/boot_id") or os.uname().nodename]
    for namespace in ("pid", "ipc", "user"):
        try:
            parts.append(os.readlink(f"/proc/self/ns/{namespace}"))
        except OSError:
            parts.append("?")
    return "|".join([*parts, str(os.getuid())])


def wanted_tls(ucx_tls: str | None) -> str | None:
    """The transport list a user asked for, by argument or environment; None for UCX's choice."""
    asked = ucx_tls or os.environ.get("UCX_TLS")
    return None if asked in (None, "", "all") else asked


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """UCX takes its transports from the environment when a context is made, and only then."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    except Exception as error:
        raise AffluxError(
            f"NIXL could not start with {name}={value or before or 'default'}: {error}; "
            "check transport.ucx_tls",
            code="transport_unavailable",
        ) from error
    finally:
        if value is not None:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
