"""What ``afflux plan --list-models`` and ``--list-systems`` print."""

from __future__ import annotations

from rich.console import Console

from afflux.planning import number, print_rows, say
from planner.explore.model import bundled_models, read_model
from planner.explore.systems import SYSTEMS


def show(*, models: bool, systems: bool) -> None:
    """The lists that were asked for."""
    console = Console()
    if models:
        _models(console)
    if systems:
        _systems(console)


def _models(console: Console) -> None:
    rows = []
    for name in bundled_models():
        model = read_model(name)
        rows.append(
            (
                name,
                str(model.layers),
                str(model.experts),
                str(model.top_k),
                model.attention.kind.upper(),
                f"{model.expert_bytes:.3g}",
            )
        )
    columns = ("name", "layers", "experts", "top", "attention", "bytes per\nparameter")
    print_rows(console, "Bundled models", columns, rows, left=("attention",))
    say(console, "any other: --model FOLDER with its Hugging Face config.json")


def _systems(console: Console) -> None:
    rows = []
    for name, system in SYSTEMS.items():
        gpu = system.gpu
        rows.append(
            (
                name,
                number(gpu.memory / 2**30),
                number(gpu.bandwidth / 1e12),
                number(gpu.flops.get("bf16", 0.0) / 1e12),
                number(gpu.flops["fp8"] / 1e12) if "fp8" in gpu.flops else "-",
                str(system.node),
                ", ".join(f"{tier.name} {tier.bandwidth / 1e9:g}" for tier in system.tiers),
            )
        )
    columns = (
        "name",
        "GiB",
        "TB/s",
        "bf16\nTFLOP/s",
        "fp8\nTFLOP/s",
        "GPUs per\nnode",
        "tiers, GB/s per GPU",
    )
    print_rows(console, "Known systems", columns, rows, left=("tiers, GB/s per GPU",))
    for name, system in SYSTEMS.items():
        say(console, f"{name}: {system.gpu.source}")
