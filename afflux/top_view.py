"""How ``afflux top`` looks: a view of the metrics and the last changes as something rich can draw.

Fits the 80 columns of a plain terminal. Colours say what deserves a look: yellow, then red.
Nothing is computed here but texts; ``dashboards/top.py`` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dashboards.top import STAGES, AttentionRow, FFNRow, View
from dashboards.window import Spread

if TYPE_CHECKING:
    from cluster.status import ChangeReport

WAIT_SHARES = (0.5, 0.75)
"""Yellow from the first, red from the second: an attention actor's share of waiting."""
KV_SHARES = (0.8, 0.95)
BALANCES = (1.5, 2.0)
BOARDING_SHARES = (1.0, 2.0)  # of a ride's own length
BAR = 6

_ONE_LINE: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
_BAD = ("error", "rejected", "replayed")
_LATENCIES = (
    ("TTFT", "ttft", "ttft"),
    ("between tokens", "itl", ""),
    ("per output token", "tpot", "tpot"),
    ("whole request", "e2e", ""),
)


def top_view(view: View, changes: Sequence[ChangeReport] = (), note: str = "") -> Group:
    """Everything, to be drawn anywhere.

    Args:
        changes: newest last.
        note: a line of its own, e.g. that the manager does not answer.
    """
    parts: list[RenderableType] = [_head(view), _traffic(view), Text(), _latencies(view), Text()]
    if view.attention:
        parts += [_attention(view), Text()]
    if view.ffn:
        parts += [_ffn(view), Text()]
    parts.append(_hops(view))
    parts += [line for line in (_ended(view), _faults(view)) if line is not None]
    if changes:
        parts += [Text(), *(_change(report) for report in reversed(changes))]
    parts += [Text(f"no page from {url}: {why}", "red") for url, why in view.missing.items()]
    if note:
        parts.append(Text(note, "yellow"))
    return Group(*parts)


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it, two digits at least; ``-`` when there is none."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_short(value / size)} {unit}"
    return f"{_short(value / 1e-6)} us" if value > 0 else "0 s"


def amount(value: float | None) -> str:
    """A number, two digits at least, with k, M, G behind it from 10000 on."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= max(size, 1e4):
            return f"{_short(value / size)}{unit}"
    return _short(value)


def level(value: float | None, limits: tuple[float, float]) -> str:
    """The colour of a value that is better when it is small."""
    if value is None or value < limits[0]:
        return ""
    return "red" if value >= limits[1] else "yellow"


def bar(parts: Sequence[tuple[float | None, str, str]], width: int = BAR) -> Text:
    """Shares of one whole beside each other.

    Args:
        parts: share (0 to 1), character and style of each; the rest of the width is dotted.
    """
    text = Text()
    at, used = 0.0, 0
    for share, character, style in parts:
        at += share or 0.0
        end = min(width, round(at * width))
        text.append(character * (end - used), style)
        used = max(used, end)
    return text.append("·" * (width - used), "dim")


def _head(view: View) -> Text:
    text = Text(**_ONE_LINE)
    text.append(f"{datetime.fromtimestamp(view.at):%H:%M:%S} ", "dim")
    text.append(view.deployment or "afflux", "bold")
    if view.healthy is not None:
        text.append(" healthy" if view.healthy else " degraded", "green" if view.healthy else "red")
    text.append(f"  {view.model or '-'}  epoch {_whole(view.epoch)}")
    for role in sorted({*view.states, *view.targets}):
        states = view.states.get(role, {})
        ready, wanted = states.get("ready", 0), view.targets.get(role)
        part = f"  {role} {ready}" + ("" if wanted is None else f"/{wanted}")
        text.append(part, "" if wanted in (None, ready) else "yellow")
        others = [f"{count} {state}" for state, count in states.items() if state != "ready"]
        if others:
            text.append(f" ({', '.join(others)})", "yellow")
    text.append(f"  A/F {_ratio(view.ratio)}")
    if view.target_ratio is not None and view.target_ratio != view.ratio:
        text.append(f" of {_ratio(view.target_ratio)}", "yellow")
    if view.warm_target:
        text.append(f"  warm {_whole(view.warm)}/{view.warm_target}")
    return text


def _traffic(view: View) -> Text:
    text = Text(**_ONE_LINE)
    text.append(f"requests: {_whole(view.running)} running, ")
    text.append(f"{_whole(view.waiting)} waiting", "yellow" if view.waiting else "")
    text.append(f", {amount(view.requests_per_s)}/s")
    text.append("   tokens/s: ")
    text.append(amount(view.generation_tokens_per_s), "bold")
    text.append(f" out, {amount(view.prompt_tokens_per_s)} prompt")
    return text


def _ended(view: View) -> Text | None:
    counts = {**view.outcomes, "rejected": view.rejected, "replayed": view.replayed}
    words = [
        Text(f"{count} {what}", "yellow" if what in _BAD else "")
        for what, count in counts.items()
        if count
    ]
    if not words:
        return None
    return Text("ended: ", **_ONE_LINE).append_text(Text(", ").join(words))


def _latencies(view: View) -> Table:
    over = "since they began" if view.window_s is None else f"over {view.window_s:.0f} s"
    table = _table(f"latency {over}", "p50", "p90", "p99", "mean", "count", "target", "met")
    for title, field, slo in _LATENCIES:
        spread: Spread = getattr(view, field)
        target = view.slo_s.get(slo)
        met = view.attained.get(slo)
        table.add_row(
            title,
            *(
                Text(seconds(value), _late(value, target))
                for value in (spread.p50, spread.p90, spread.p99)
            ),
            seconds(spread.mean),
            str(spread.count),
            seconds(target),
            Text(_percent(met), _missed(met, view.objective)),
        )
    return table


def _attention(view: View) -> Table:
    return _rows(
        ("attention", "compute+wait", "steps/s", "step", "tokens", "lanes", "hop", "reqs",
         "KV", "epoch"),
        view.attention,
        lambda row: (
            _shares(row),
            amount(row.steps_per_s),
            seconds(row.step_s),
            amount(row.batch_tokens),
            "-" if row.lanes is None else f"{row.lanes:.1f}",
            seconds(row.hop_s),
            _requests(row),
            Text(_percent(row.kv_usage), level(row.kv_usage, KV_SHARES)),
            _epoch(row.epoch, view.epoch),
        ),
    )  # fmt: skip


def _ffn(view: View) -> Table:
    return _rows(
        ("ffn", "compute+other", "rides/s", "ride", "tokens", "wait", "queue", "experts",
         "balance", "epoch"),
        view.ffn,
        lambda row: (
            _busy(row),
            amount(row.rides_per_s),
            seconds(row.ride_s),
            amount(row.batch_tokens),
            Text(seconds(row.boarding_s), _boarding(row)),
            _whole(row.queue),
            _whole(row.experts),
            Text(_ratio(row.balance), level(row.balance, BALANCES)),
            _epoch(row.epoch, view.epoch),
        ),
    )  # fmt: skip


def _rows(
    titles: Sequence[str], rows: Sequence[Any], cells: Callable[[Any], Sequence[RenderableType]]
) -> Table:
    table = _table(*titles)
    table.columns[1].justify = "left"
    for row in rows:
        table.add_row(row.actor, *cells(row))
    return table


def _shares(row: AttentionRow) -> Text:
    if row.compute is None or row.wait is None:
        return Text("-")
    colour = level(row.wait, WAIT_SHARES) or "cyan"
    text = bar([(row.compute, "█", "green"), (row.wait, "▒", colour)])
    return text.append(f" {_percent(row.compute)}+{_percent(row.wait)}")


def _requests(row: AttentionRow) -> Text:
    """Running, and those that wait in its scheduler."""
    text = Text(_whole(row.running))
    return text.append(f"+{row.waiting}", "yellow") if row.waiting else text


def _busy(row: FFNRow) -> Text:
    if row.busy is None:
        return Text("-")
    compute = min(row.compute or 0.0, row.busy)
    text = bar([(compute, "█", "green"), (row.busy - compute, "▒", "cyan")])
    return text.append(f" {_percent(compute)}+{_percent(row.busy - compute)}")


def _boarding(row: FFNRow) -> str:
    if row.boarding_s is None or not row.ride_s:
        return ""
    return level(row.boarding_s / row.ride_s, BOARDING_SHARES)


def _hops(view: View) -> Table:
    """Mean of a frame's round trip, its parts, the slowest in bold, and bytes."""
    stages = [stage for stage in STAGES if stage in view.hops_s]
    slowest = max(stages, key=lambda stage: view.hops_s[stage], default="")
    table = _table("hop", *(stage.replace("_", " ") for stage in stages), *view.bytes_per_s)
    table.add_row(
        seconds(view.hops_s.get("total")),
        *(
            Text(seconds(view.hops_s[stage]), "bold" if stage == slowest else "")
            for stage in stages
        ),
        *(f"{amount(rate)}B/s" for rate in view.bytes_per_s.values()),
    )
    return table


def _faults(view: View) -> Text | None:
    found = [f"{count} {kind}" for kind, count in view.faults.items() if count]
    return Text(f"data plane: {', '.join(found)}", "yellow", **_ONE_LINE) if found else None


def _change(report: ChangeReport) -> Text:
    from afflux.tables import COLOURS, phases

    text = Text(**_ONE_LINE)
    text.append(f"{datetime.fromtimestamp(report.started_at):%H:%M:%S} ", "dim")
    text.append(f"{report.phase:<11} ", COLOURS.get(report.phase, "yellow"))
    text.append(f"{report.verb} {report.text}")
    if report.seconds:
        text.append(f"  {phases(report)}", "dim")
    if report.error:
        text.append(f"  {report.error}", "red")
    return text


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.columns[0].justify = "left"
    return table


def _late(value: float | None, target: float | None) -> str:
    return "" if target is None else level(value, (0.8 * target, target))


def _missed(met: float | None, objective: float | None) -> str:
    return "red" if met is not None and objective is not None and met < objective else ""


def _epoch(epoch: int | None, newest: int | None) -> Text:
    behind = epoch is not None and newest is not None and epoch < newest
    return Text(_whole(epoch), "yellow" if behind else "")


def _whole(value: int | None) -> str:
    return "-" if value is None else str(value)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _short(value: float) -> str:
    """0.12, 1.2, 12, 123, 1234."""
    digits = 0 if value >= 9.95 or value == 0 else 1 if value >= 0.995 else 2
    return f"{value:.{digits}f}"
