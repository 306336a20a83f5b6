"""Every placement of 1A1F over two racks beside the one that afflux chooses, in tokens/s.

Five hosts made of this one (``hosts``): a head, and in each of two racks an attention and an FFN
host. A host's link carries ``INSIDE`` Mbit/s, the one between the racks a tenth. Hosts carry no
labels of where they are: links are measured. Needs root; shows placement, not how fast real hosts
are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.host_cluster import HostCluster, host_cluster
from benchmarks.hosts import Host, command_line
from benchmarks.load import Load, make_requests
from benchmarks.report import make_report, print_table, write_report

INSIDE = 30.0
ACROSS = INSIDE / 10
STREAMS = 16
ROUNDS = 3
ROUND_S = 10.0
HOST = "afflux.io/host"


def run(json_path: Path | None = None) -> dict[str, Any]:
    """Measure; prints a table and returns the report.

    Raises:
        RuntimeError: hosts can't be made here.
    """
    with host_cluster(attention=2, ffn=2, labels=lambda host: f"{HOST}={host.name}") as cluster:
        racks = {
            host.name: "ab"[n % 2] for n, host in enumerate([*cluster.attention, *cluster.ffn])
        }
        apart = [host for host in cluster.hosts if racks.get(host.name) == "b"]
        cluster.hosts.part(apart, mbit=ACROSS)
        for host in (*cluster.attention, *cluster.ffn):
            cluster.hosts.shape(host, mbit=INSIDE)
        rows: list[dict[str, Any]] = []
        chosen = _chosen(cluster)
        for attention, ffn in product(cluster.attention, cluster.ffn):
            rates = _rates(cluster, attention, ffn)
            rows.append(
                {
                    "attention": f"{attention.name} ({racks[attention.name]})",
                    "ffn": f"{ffn.name} ({racks[ffn.name]})",
                    "tokens_per_s": median(rates),
                    "rounds": rates,
                    "chosen": chosen == (attention.address, ffn.address),
                }
            )
    return _report(rows, json_path)


def _chosen(cluster: HostCluster) -> tuple[str, str]:
    """The nodes that afflux puts the two actors on when it may."""
    _up(cluster, {}, {})
    try:
        nodes = {actor["role"]: actor["node_ip"] for actor in cluster.status()["actors"]}
        print(cluster.afflux("status", "--topology"))
        return nodes["attention"], nodes["ffn"]
    finally:
        cluster.afflux("down", timeout=120)


def _rates(cluster: HostCluster, attention: Host, ffn: Host) -> list[float]:
    """Tokens/s of some rounds with the actors on these hosts."""
    _up(cluster, {HOST: attention.name}, {HOST: ffn.name})
    load = Load(cluster.url, "verse", make_requests(0, 64), concurrency=STREAMS)
    try:
        load.wait_done(STREAMS, 120.0)
        rates = []
        for _ in range(ROUNDS):
            before = load.progress().tokens
            load.wait_done(sys.maxsize, ROUND_S)
            rates.append((load.progress().tokens - before) / ROUND_S)
        load.stop()
        failed = [stream.error for stream in load.streams() if stream.error]
        if failed:
            raise RuntimeError(f"{len(failed)} streams failed: {failed[0]}")
        return rates
    finally:
        load.close()
        cluster.afflux("down", timeout=120)


def _up(cluster: HostCluster, attention: dict[str, str], ffn: dict[str, str]) -> None:
    settings = ["attention.count=1", "ffn.count=1"]
    for role, more in (("attention", attention), ("ffn", ffn)):
        labels = {"afflux.io/role": role, **more}
        pairs = ", ".join(f"{key}: {value}" for key, value in labels.items())
        settings.append(f"{role}.labels={{{pairs}}}")
    cluster.up(settings)


def _report(rows: Sequence[dict[str, Any]], json_path: Path | None) -> dict[str, Any]:
    rates = [row["tokens_per_s"] for row in rows]
    (chosen,) = [row["tokens_per_s"] for row in rows if row["chosen"]]
    print_table(
        f"1A1F over two racks: {INSIDE:g} Mbit/s per host, {ACROSS:g} between racks",
        ("attention on", "FFN on", "tokens/s", "of the best", ""),
        [
            (
                row["attention"],
                row["ffn"],
                f"{row['tokens_per_s']:.0f}",
                f"{row['tokens_per_s'] / max(rates):.2f}",
                "chosen" if row["chosen"] else "",
            )
            for row in rows
        ],
    )
    summary = {
        "chosen_over_worst": chosen / min(rates),
        "chosen_over_best": chosen / max(rates),
        "inside_mbit": INSIDE,
        "across_mbit": ACROSS,
        "streams": STREAMS,
    }
    report = make_report("placement", summary, {"placements": list(rows)})
    write_report(report, json_path)
    return report


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__ or ""))
