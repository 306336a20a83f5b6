"""``afflux bench``: the measurements that the README quotes. They live in ``benchmarks/``."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure; every figure in the README comes from here.")

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]


@app.command()
def dataplane(json_file: JsonFile = None) -> None:
    """Round trips and bandwidth of the data plane, beside raw NIXL and memcpy."""
    from benchmarks import dataplane as benchmark

    benchmark.run(json_path=json_file)


@app.command()
def decode(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two batches, to see it work.")] = False,
) -> None:
    """Decode with attention and experts apart, beside plain vLLM on the same cores."""
    from benchmarks import decode as benchmark

    benchmark.run(json_path=json_file, quick=quick)
