"""Hosts to test on, made of this one: network, mount, UTS, IPC and PID namespaces on a bridge.

Each has an address and a hostname, /tmp, /dev/shm, /run and a home of its own, and an sshd that
lets one key in: what ``ray up`` needs. They share the kernel, the cores, the clock and the rest of
the file system, so nothing here says how fast real hosts are. Needs root, iproute2, openssh-server
and rsync. Not isolation: whoever is root in one is root here.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.link import Link
from cluster.paths import project_root

TOOLS = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "sshd", "rsync", "mount")
PRIVATE = ("/tmp", "/run", "/root")
"""Folders that every host has of its own."""

_SHM = "1g"
_START_S = 20.0
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # where Debian puts sshd and ip; not in every PATH

_INIT = r"""
set -e
host=$1 folder=$2 kept=$3 private=$4 shm=$5
hostname "$host"
for path in $private; do
  own=$folder$path
  mkdir -p "$own"
  for keep in $kept; do
    case "$keep" in "$path"/*)
      mkdir -p "$folder$keep"
      mount --bind "$keep" "$folder$keep" ;;
    esac
  done
  mount --rbind "$own" "$path"
done
mount -t tmpfs -o size="$shm" tmpfs /dev/shm
mount -t sysfs sysfs /sys  # with the interfaces of this host
mkdir -p /run/sshd /run/lock
chmod 1777 /tmp
echo ready
read -r _  # the network is there
exec "$(command -v sshd)" -D -e -f "$folder/sshd_config" 2>"$folder/sshd.log"
"""


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        pid: of its first process, as seen from outside; its end is the end of all of its processes.
        port: the bridge's end of its link.
        folder: what it calls /tmp, /root and so on is here.
    """

    name: str
    address: str
    pid: int
    port: str
    folder: Path
    key: Path

    def command(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs ``words`` there, in its home, with a login's environment."""
        settings = {
            "HOME": "/root",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:{_SBIN}",
            "LANG": "C.UTF-8",
            **(env or {}),
        }
        named = [f"{key}={value}" for key, value in settings.items()]
        inside = ["nsenter", "--target", str(self.pid), "--all", "--wd=/root"]
        return [*inside, "env", "-i", *named, *words]

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, timeout: float = 60, **more: Any
    ) -> str:
        """Run a command there; returns what it printed.

        Raises:
            subprocess.CalledProcessError: it failed; ``stderr`` says why.
        """
        command = self.command(words, env)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **more)
        try:
            ended.check_returncode()
        except subprocess.CalledProcessError as error:
            error.add_note(f"{ended.stdout[-3000:]} {ended.stderr[-3000:]}".strip())
            raise
        return ended.stdout

    def end(self) -> None:
        """Take its power away: all processes at once, and its interface with them."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Hosts:
    """A bridge and the hosts on it; see ``hosts``."""

    bridge: str
    address: str
    """This machine's on the bridge."""

    each: list[Host] = field(default_factory=list)
    links: dict[str, Link] = field(default_factory=dict)
    trunk: Link | None = None
    _apart: set[str] = field(default_factory=set)

    def __getitem__(self, index: int) -> Host:
        return self.each[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.each)

    def shape(
        self, host: Host, *, delay_s: float = 0.0, loss: float = 0.0, mbit: float | None = None
    ) -> None:
        """Make a host's link worse, both ways; without arguments as it was.

        Args:
            delay_s: added to each packet, each way.
            loss: share of packets that vanish, 0..1, each way.
            mbit: rate in Mbit/s, each way.
        """
        link = self.links.pop(host.name, None)
        if link is not None:
            link.close()
        bridge = self._far if host.name in self._apart else self.bridge
        if delay_s or loss or mbit is not None:
            self.links[host.name] = Link(bridge, host.port, delay_s=delay_s, loss=loss, mbit=mbit)
        else:
            _ip("link", "set", host.port, "master", bridge)

    def part(
        self,
        apart: Sequence[Host],
        *,
        delay_s: float = 0.0,
        loss: float = 0.0,
        mbit: float | None = None,
    ) -> None:
        """Put some hosts on a switch of their own, behind one shared link; once, before ``shape``.

        Args:
            delay_s, loss, mbit: of that link, as for ``shape``.
        """
        _ip("link", "add", self._far, "type", "bridge")
        _ip("link", "set", self._far, "up")
        near, far = f"{self.bridge}t", f"{self.bridge}u"
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        _ip("link", "set", far, "master", self._far, "up")
        _ip("link", "set", near, "up")
        self.trunk = Link(self.bridge, near, delay_s=delay_s, loss=loss, mbit=mbit)
        for host in apart:
            self._apart.add(host.name)
            _ip("link", "set", host.port, "master", self._far)

    def close(self) -> None:
        """Take shaped links and the second switch down."""
        for link in self.links.values():
            link.close()
        if self.trunk is not None:
            self.trunk.close()
            _quietly("link", "del", f"{self.bridge}t")
            _quietly("link", "del", self._far)

    @property
    def _far(self) -> str:
        return f"{self.bridge}r"

    def cut(self, host: Host) -> None:
        """Nothing passes any more, and nobody is told."""
        self.shape(host)
        _ip("link", "set", host.port, "nomaster")

    def mend(self, host: Host) -> None:
        """The end of ``cut``."""
        self.shape(host)


def why_not() -> str | None:
    """Why hosts can't be made here; None if they can."""
    if os.geteuid() != 0:
        return "making hosts needs root"
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return (
            f"making hosts needs {', '.join(missing)} "
            "(apt install iproute2 openssh-client openssh-server rsync)"
        )
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"this kernel or container refuses namespaces: {tried.stderr.strip()}"
    return None


def command_line(run: Callable[[Path | None], object], doc: str) -> int:
    """What a benchmark on such hosts does as ``python -m``: its one option is ``--json FILE``.

    Returns:
        The process's exit code.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="file for the report")
    given = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    run(given.json)
    return 0


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make so many hosts; at the end everything is gone, whatever was started there included.

    Raises:
        RuntimeError: a host did not start; says what it printed.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(reason)
    tag = secrets.token_hex(2)
    net = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
    with ExitStack() as stack:
        # not below /tmp: every host has another one
        folder = Path(tempfile.mkdtemp(prefix="afflux-hosts-", dir="/var/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        key = _keygen(folder / "id_ed25519")
        found = Hosts(f"afb{tag}", f"{net}.1")
        _ip("link", "add", found.bridge, "type", "bridge")
        stack.callback(_quietly, "link", "del", found.bridge)
        _ip("addr", "add", f"{found.address}/24", "dev", found.bridge)
        _ip("link", "set", found.bridge, "up")
        stack.callback(found.close)
        for number in range(count):
            address = f"{net}.{10 + number}"
            found.each.append(_start(stack, found, f"host{number}", address, tag, folder, key))
        yield found


def _keygen(path: Path) -> Path:
    """A new pair of keys without a passphrase; the path of the private one."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True
    )
    return path


def _start(
    stack: ExitStack, found: Hosts, name: str, address: str, tag: str, folder: Path, key: Path
) -> Host:
    own = folder / name
    own.mkdir()
    host_key = _keygen(own / "host_key")
    (own / "sshd_config").write_text(
        f"ListenAddress {address}\nHostKey {host_key}\nAuthorizedKeysFile {key}.pub\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
        # keys of a test in a folder of a test
        "StrictModes no\nMaxStartups 64\nMaxSessions 64\nPidFile none\n"
    )
    kept = {project_root(), Path(sys.prefix), Path(sys.base_prefix), folder}
    spaces = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
    words = [name, str(own), " ".join(map(str, kept)), " ".join(PRIVATE), _SHM]
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    process = subprocess.Popen(
        ["unshare", *spaces, "--mount-proc", "bash", "-c", _INIT, "init", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": path},
    )
    stack.callback(_end, process)
    assert process.stdin is not None and process.stdout is not None
    said = process.stdout.readline().strip()
    if said != "ready":
        raise RuntimeError(f"{name} did not start: {said} {process.stdout.read()}".strip())
    (first,) = psutil.Process(process.pid).children()
    port = f"af{tag}{name.removeprefix('host')}"
    _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(first.pid))
    # goes with its other end, but that may take the kernel a while
    stack.callback(_quietly, "link", "del", port)
    _ip("link", "set", port, "master", found.bridge, "up")
    host = Host(name, address, first.pid, port, own, key)
    for line in (
        f"addr add {address}/24 dev eth0",
        "link set lo up",
        "link set eth0 up",
        # leads nowhere; but it is by the way out that programs find out which address is theirs
        f"route add default via {found.address}",
    ):
        subprocess.run(
            ["nsenter", "--target", str(first.pid), "--net", "ip", *line.split()], check=True
        )
    process.stdin.write("\n")
    process.stdin.flush()
    _await_sshd(host)
    return host


def _await_sshd(host: Host) -> None:
    """Until it lets us in."""
    script = f"for _ in $(seq {int(_START_S * 10)}); do {ssh(host, 'true')} && exit; sleep .1; done"
    ended = subprocess.run(["bash", "-c", f"{script}; exit 1"], capture_output=True, text=True)
    if ended.returncode:
        log = host.folder / "sshd.log"
        said = log.read_text() if log.exists() else ""
        raise RuntimeError(f"{host.name}: sshd lets nobody in: {ended.stderr[-500:]} {said}")


def ssh(host: Host, command: str) -> str:
    """The shell command that runs one there over SSH, as root."""
    settings = (
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "ConnectTimeout=2",
        "BatchMode=yes",
    )
    options = ["-i", str(host.key), *(word for one in settings for word in ("-o", one))]
    return shlex.join(["ssh", *options, f"root@{host.address}", command])


def _end(process: subprocess.Popen[str]) -> None:
    """``unshare`` takes the host's first process with it, and that one all others."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.kill()
    process.wait()


def _ip(*words: str) -> None:
    ended = subprocess.run(["ip", *words], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {ended.stderr.strip()}")


def _quietly(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True)
