"""``make demo-cluster``: the embedded model over four hosts made of this one, and one gets lost.

A head, an attention host and two FFN hosts that share nothing but the network (``hosts``), joined
by ``ray start``. Needs root. Not a test: those are in ``tests/e2e/test_hosts.py``.
"""

from __future__ import annotations

import os
import sys
import time

from afflux.demo import PROMPT, ask
from benchmarks.host_cluster import HostCluster, host_cluster
from benchmarks.hosts import why_not


def main() -> int:
    """Run it. Returns the process's exit code."""
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    began = time.monotonic()
    try:
        print("four hosts, and a Ray node on each ...", flush=True)
        with host_cluster(attention=1, ffn=2) as cluster:
            for host in cluster.hosts:
                print(f"  {host.name}  {host.address}  {cluster.role(host)}")
            _serve(cluster)
    except Exception as error:
        said = getattr(error, "stderr", None)  # of a command on a host
        print(f"error: {type(error).__name__}: {said or error}", file=sys.stderr)
        return 1
    print(f"\ndone after {time.monotonic() - began:.0f} s; nothing is left")
    return 0


def _serve(cluster: HostCluster) -> None:
    prompt = os.environ.get("PROMPT") or PROMPT
    print(
        "\nafflux up deploy/specs/several-hosts.yaml --address auto   (on the head) ...", flush=True
    )
    cluster.up()
    print(cluster.afflux("status"))
    print(cluster.afflux("status", "--topology"))
    ask(f"{cluster.url}/v1", prompt)
    lost = cluster.ffn[-1]
    print(f"\n{lost.name} is lost: its processes are killed, its experts are gone")
    cluster.kill(lost)
    ask(f"{cluster.url}/v1", prompt)
    print()
    print(cluster.afflux("status"))
    cluster.afflux("down", timeout=120)


if __name__ == "__main__":
    sys.exit(main())
