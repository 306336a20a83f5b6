"""``afflux observe``: a Prometheus on this machine for a deployment, and pictures of what it knows.

For a look at one deployment; who has a Prometheus already points it at the manager's service
discovery instead (``deploy/prometheus/``). What the commands do lives in ``dashboards/``.
"""

import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afflux.top import MetricsUrl, metrics_url_of
from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from dashboards.local import Running

app = typer.Typer(
    no_args_is_help=True, help="Run a Prometheus for a deployment on this machine, and draw."
)

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FORMS = "a time like 2026-01-31T12:00:00 (local), Unix seconds, now, or -30m (also s, h, d)"


@app.command()
def up(
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="On 127.0.0.1; 0: any free one.  [default: 9090 if free]"
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long data are kept.")] = 15,
    metrics_url: MetricsUrl = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Start Prometheus; one that runs already gets the deployment's new address."""
    from cluster.paths import project_root
    from dashboards import local

    local.executable()  # without one, nobody needs to be asked
    url = metrics_url or metrics_url_of(name, address)
    template = project_root() / "deploy" / "prometheus" / "prometheus.yml"
    running = local.start(_folder(name), template, f"{url.rstrip('/')}/sd", port=port, days=days)
    flags = _flags(name)
    typer.echo(f"Prometheus: {running.url} (pid {running.pid}), reads {running.discovery}")
    typer.echo(f"next:  afflux observe status{flags}   who answers it")
    typer.echo(f"       {running.url}/alerts   rules and alerts")
    typer.echo(
        "       in Grafana, add a Prometheus data source with this URL; then\n"
        "       GRAFANA_TOKEN=... afflux dashboards push --url http://GRAFANA:3000"
    )
    typer.echo(f"       afflux observe down{flags}   stop; data stay")


@app.command()
def down(
    delete_data: Annotated[
        bool, typer.Option("--delete-data", help="Also delete what it has collected.")
    ] = False,
    name: Name = DEFAULT_NAME,
) -> None:
    """Stop Prometheus."""
    from dashboards import local

    stopped = local.stop(_folder(name), remove_data=delete_data)
    text = f"no Prometheus of {name} runs here" if stopped is None else f"stopped {stopped.url}"
    typer.echo(text + ("; its data are deleted" if delete_data else ""))


@app.command()
def status(
    name: Name = DEFAULT_NAME,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Show whether Prometheus runs, and which pages answer it. Exit code 1 when one does not."""
    from dashboards import local

    running = _running(name)
    found = local.targets(running)
    healths = [target.health for target in found]
    if as_json:
        pages = [vars(target) for target in found]
        typer.echo(json.dumps({**vars(running), "targets": pages}, indent=2))
    else:
        typer.echo(f"Prometheus: {running.url} (pid {running.pid}), reads {running.discovery}")
        typer.echo(f"{healths.count('up')} of {len(found)} pages answer")
        for target in found:
            error = f"  {target.error}" if target.error else ""
            typer.echo(f"  {target.health:<8} {target.job:<8} {target.url}{error}")
    if "down" in healths or not found:
        raise typer.Exit(1)


@app.command()
def draw(
    start: Annotated[str, typer.Option(metavar="TIME", help=f"{_FORMS}.")] = "-30m",
    end: Annotated[str, typer.Option(metavar="TIME", help="Likewise.")] = "now",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write.")] = Path(
        "pictures"
    ),
    panel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TITLE", help="Only this panel; repeatable, all into panels.png, in order."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A Prometheus; without it, the one of 'afflux observe up'."),
    ] = None,
    name: Name = DEFAULT_NAME,
) -> None:
    """Draw the dashboards as PNG from what Prometheus has; Grafana is not needed."""
    from dashboards import draw as drawing
    from dashboards.build import build_all

    now = time.time()
    begin, until = _moment(start, now, "--start"), _moment(end, now, "--end")
    if begin >= until:
        raise typer.BadParameter(f"{start} is not before --end {end}", param_hint="--start")
    source, boards = url or _running(name).url, list(build_all().values())
    try:
        paths = drawing.draw(source, boards, begin, until, out, titles=panel or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--panel") from None
    for path in paths:
        typer.echo(str(path))


def moment(text: str, now: float) -> float:
    """A time in words as Unix seconds.

    Args:
        now: Unix time that relative ones count from.

    Raises:
        ValueError: it is none of the forms.
    """
    text = text.strip()
    if text == "now":
        return now
    try:
        if match := re.fullmatch(r"-([0-9.]+)([smhd])", text):
            return now - float(match[1]) * _UNITS[match[2]]
        if re.fullmatch(r"[0-9.]+", text):
            return float(text)
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(f"cannot read the time {text!r}; expected {_FORMS}") from None


def _moment(text: str, now: float, option: str) -> float:
    try:
        return moment(text, now)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _running(name: str) -> "Running":
    from actors.errors import AffluxError
    from dashboards import local

    running = local.find(_folder(name))
    if running is None:
        raise AffluxError(
            f"no Prometheus of {name} runs here; start it with: afflux observe up{_flags(name)}",
            "no_prometheus",
        )
    return running


def _folder(name: str) -> Path:
    from cluster.records import state_folder

    return state_folder() / "observe" / name


def _flags(name: str) -> str:
    return "" if name == DEFAULT_NAME else f" --name {name}"
