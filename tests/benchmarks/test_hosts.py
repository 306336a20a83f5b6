"""Hosts made of namespaces: apart from each other, reached over SSH, gone afterwards."""

import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.hosts import Host, Hosts, hosts, ssh, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7)) as server:
    print("ready", flush=True)
    while True:
        peer, _ = server.accept()
        with peer:
            while data := peer.recv(1 << 16):
                peer.sendall(data)
"""


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    with hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def echo(two: Hosts) -> Iterator[Host]:
    """The first host, where everything comes back from port 7."""
    host = two[0]
    command = host.command(["python", "-c", ECHO, host.address])
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    yield host
    server.kill()  # nsenter; what it started there ends with its host
    server.stdout.close()
    server.wait()


def trips(host: Host, count: int) -> list[float]:
    """Seconds that messages of 64 bytes take there and back."""
    found = []
    with socket.create_connection((host.address, 7), timeout=5) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter()
            peer.sendall(bytes(64))
            got = 0
            while got < 64:
                got += len(peer.recv(64))
            found.append(time.perf_counter() - began)
    return found


def carried(host: Host, seconds: float) -> float:
    """Bytes per second there and back."""
    block, got = bytes(1 << 16), 0
    with socket.create_connection((host.address, 7), timeout=5) as peer:
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            peer.sendall(block)
            left = len(block)
            while left:
                left -= len(peer.recv(left))
            got += len(block)
        return got / (time.perf_counter() - began)


def test_each_has_a_name_an_address_and_folders_of_its_own(two: Hosts) -> None:
    assert [host.run("hostname").strip() for host in two] == ["host0", "host1"]
    for host in two:
        assert host.address in host.run("ip", "-4", "addr", "show", "eth0")
        host.run("bash", "-c", "hostname | tee /tmp/who ~/who /dev/shm/who")
    for host in two:
        for folder in ("/tmp", "~", "/dev/shm"):
            assert host.run("bash", "-c", f"cat {folder}/who").strip() == host.name
    assert not Path("/tmp/who").exists() and not Path("/dev/shm/who").exists()
    assert two[0].run("ls", "/proc").split().count("1") == 1
    assert len(two[0].run("ps", "-e").splitlines()) < 10, "processes of others are not seen"


def test_they_see_each_other_and_the_code(two: Hosts) -> None:
    one, other = two
    said = subprocess.run(
        one.command(["bash", "-c", ssh(other, "hostname; python3 -c 'print(6*7)'")]),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert said.stdout.split() == ["host1", "42"], said.stderr
    one.run("python", "-c", "import cluster.spec")


def test_a_link_is_made_worse_and_mended(two: Hosts, echo: Host) -> None:
    before = statistics.median(trips(echo, 50))
    two.shape(echo, delay_s=0.01)
    late = statistics.median(trips(echo, 20))
    two.shape(echo, mbit=8)
    slow = carried(echo, 1.0)
    two.shape(echo)
    after = statistics.median(trips(echo, 50))
    assert 0.02 < late < 0.02 + 0.02
    assert before < 0.01 and after < 0.01
    assert 0.2e6 < slow < 1e6, "8 Mbit/s are 1 MB/s each way, one after the other"


def test_a_lossy_link_loses_a_share(two: Hosts, echo: Host) -> None:
    two.shape(echo, loss=0.3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(1000):
            sender.sendto(b"x", (echo.address, 9))  # nobody listens; the interface counts
    before = received(echo)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(2000):
            sender.sendto(b"x", (echo.address, 9))
            time.sleep(0.0002)
    time.sleep(0.2)
    two.shape(echo)
    assert 0.6 < (received(echo) - before) / 2000 < 0.8


def received(host: Host) -> int:
    return int(host.run("cat", "/sys/class/net/eth0/statistics/rx_packets"))


def test_a_cut_link_says_nothing(two: Hosts, echo: Host) -> None:
    two.cut(echo)
    with pytest.raises(TimeoutError), socket.create_connection((echo.address, 7), timeout=0.5):
        pass
    two.mend(echo)
    assert trips(echo, 1)


def test_a_host_ends_with_all_of_its_processes_and_leaves_nothing() -> None:
    with hosts(1) as made:
        host = made[0]
        host.run("bash", "-c", "sleep 1234.5 >/dev/null 2>&1 & disown")
        (sleeper,) = (p for p in psutil.process_iter() if p.cmdline()[-1:] == ["1234.5"])
        host.end()
        sleeper.wait(5)
        folder, bridge = host.folder, made.bridge
    assert not folder.exists()
    assert not Path("/sys/class/net", bridge).exists()
