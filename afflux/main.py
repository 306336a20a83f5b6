"""The ``afflux`` command: puts the groups together and turns errors into one clear message.

Modules of the other folders are imported inside the commands, so that ``afflux --help`` and shell
completion stay quick.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from actors.errors import AffluxError
from afflux import (
    __version__,
    bench,
    change,
    dashboards,
    fit,
    model,
    observe,
    plan,
    policy,
    simulate,
    size,
    spec,
    telemetry,
    top,
    up,
)
from planner.errors import PlannerError


class _Group(TyperGroup):
    """Shows an error as text on stderr with exit code 1; a traceback only with ``--debug``."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TyperException, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            expected = isinstance(error, AffluxError | PlannerError)
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(str(error) if expected else f"{type(error).__name__}: {error}", err=True)
            if not expected:
                typer.echo(
                    "(not foreseen; 'afflux --debug ...' shows where it comes from)", err=True
                )
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    help="Serve mixture-of-experts models with attention and experts on separate Ray actors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"afflux {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="AFFLUX_DEBUG", help="Show tracebacks.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Options that come before the command."""


app.command("up")(up.up)
app.command("down")(up.down)
app.command("status")(up.status)
app.command("scale")(change.scale)
app.command("retire")(change.retire)
app.command("flip")(change.flip)
app.command("rebalance")(change.rebalance)
app.command("changes")(change.changes)
app.command("top")(top.top)
app.command("size", epilog=size.EPILOG)(size.size)
app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("simulate", epilog=simulate.EPILOG)(simulate.simulate)
app.command("fit", epilog=fit.EPILOG)(fit.fit)
app.add_typer(policy.app, name="policy")
app.add_typer(model.app, name="model")
app.add_typer(spec.app, name="spec")
app.add_typer(observe.app, name="observe")
app.add_typer(telemetry.app, name="telemetry")
app.add_typer(dashboards.app, name="dashboards")
app.add_typer(bench.app, name="bench")
