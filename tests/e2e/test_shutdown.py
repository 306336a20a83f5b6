"""The end of the shared deployment: it comes late, since files run in the order of their names."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

from cluster import launcher, ray_head, records
from cluster.spec import ClusterSpec
from cluster.status import ClusterHandle


def test_down_leaves_nothing(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    """Ends the shared deployment, so it comes last; the fixture's ``down`` then finds nothing."""
    import ray

    record = records.load(spec.name)
    assert record is not None and record.ray is not None
    pids = [process.pid for process in ray_head.processes(record.ray)]
    assert len(pids) > 5
    if ray.is_initialized():  # the session's own connection
        ray.shutdown()
    report = launcher.down(spec.name)
    assert report.found and report.stopped_ray and report.left == ()
    assert len(report.actors) == 3
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert not Path(record.ray.folder).exists()
    assert records.load(spec.name) is None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((spec.frontend.host, spec.frontend.port))
    if Path("/dev/shm").is_dir():
        mine = [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in pids)]
        assert mine == []
    assert not launcher.down(spec.name, address="local").found, "down is idempotent"
