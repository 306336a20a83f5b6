"""``afflux spec``: check a spec without starting anything, and print the schema."""

from pathlib import Path
from typing import Annotated

import typer

from afflux.up import Overrides

app = typer.Typer(no_args_is_help=True, help="Check specs; print their JSON Schema.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Spec in YAML.")],
    set_: Overrides = None,
    model: Annotated[bool, typer.Option(help="Also check the checkpoint that it names.")] = True,
) -> None:
    """Check a spec and the checkpoint that it names, and print what it asks for."""
    from rich.console import Console

    from afflux.tables import print_spec
    from cluster import companion, preflight
    from cluster.spec import load_spec

    wanted = load_spec(file, set_ or [])
    companion.check(wanted)
    preflight.check_engine_args(wanted)
    checkpoint = preflight.check_model(wanted, file) if model else None
    print_spec(Console(), wanted, checkpoint)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    import json

    from cluster.spec import ClusterSpec

    typer.echo(json.dumps(ClusterSpec.model_json_schema(), indent=2))
