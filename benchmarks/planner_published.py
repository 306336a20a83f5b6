"""The planner beside published measurements, errors printed: exchanges, a decode, AFD on Ascend.

Also makes the constants of ``planner.explore.calibration`` again from the measured tables. What is
compared, and where each number is from, is said in ``planner.explore.published``; what needs the
measured tables of aiconfigurator-core (the ``plan`` extra) is left out without it, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.report import make_report, print_summary, print_table, write_report
from planner.errors import PlannerError
from planner.explore import published
from planner.explore.calibration import BLACKWELL, HOPPER, Calibration, Measurement, fit
from planner.explore.exchanges import blackwell_tables, hopper_tables
from planner.explore.kernels.aic import AicDB
from planner.explore.kernels.aic_package import BACKENDS
from planner.explore.kernels.base import KernelDB, Provenance
from planner.explore.kernels.roofline import RooflineDB
from planner.explore.model import read_model
from planner.explore.system import find_system

_MODEL, _ASCEND_MODEL = "deepseek-v3", "deepseek-v3.2"
Found = TypeVar("Found")


def run(json_path: Path | str | None) -> dict[str, Any]:
    """All comparisons: prints tables, writes JSON, returns the report."""
    missing: list[str] = []
    summary: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for part in (_fits, _deepep, _decode, _ascend):
        flat, full = part(missing)
        summary.update(flat)
        details.update(full)
    summary["left_out"] = "; ".join(dict.fromkeys(missing)) or "nothing"
    report = make_report("planner_published", summary, details)
    print_summary(report)
    write_report(report, json_path)
    return report


def _fits(missing: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The calibrations again, and what the ones in use make of each table."""
    flat: dict[str, Any] = {}
    full: dict[str, Any] = {}
    for used, tables in ((HOPPER, hopper_tables), (BLACKWELL, blackwell_tables)):
        measured: list[Measurement] | None = _unless_missing(tables, missing)
        if measured is None:
            continue
        again = fit(used.name, used.source, measured)
        rows = published.table_rows(used, measured)
        print_table(
            f"Calibration of {used.name} against the tables it is fitted to: "
            f"{_constants(again)} (in use: {_constants(used)})",
            ("table", "tier", "n", "median error", "p90", "worst", "mean, signed"),
            [
                (r.source, r.tier, r.count, _percent(r.median), _percent(r.p90), _percent(r.worst),
                 _percent(r.bias, signed=True))
                for r in rows
            ],
        )  # fmt: skip
        errors = np.repeat([r.median for r in rows], [r.count for r in rows])
        flat[f"{used.name}_median_error"] = float(np.median(errors))
        full[used.name] = {"fit": asdict(again), "tables": [asdict(r) for r in rows]}
    return flat, full


def _deepep(missing: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = published.deepep_rows()
    print_table(
        "DeepEP low latency on H800, 128 tokens, us (not fitted: prediction from H100/H200 tables)",
        ("exchange", "GPUs", "published", "ours", "error"),
        [
            (r.op, r.gpus, 1e6 * r.published, 1e6 * r.ours, _percent(r.error, signed=True))
            for r in rows
        ],
    )
    errors = np.abs([r.error for r in rows])
    flat = {
        "deepep_median_error": float(np.median(errors)),
        "deepep_max_error": float(errors.max()),
    }
    return flat, {"deepep": [asdict(r) for r in rows]}


def _decode(missing: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    rows: list[tuple[str, published.DecodeRow]] = []
    for name in ("roofline", *(f"aic {backend}" for backend in BACKENDS)):
        found = _unless_missing(partial(_decodes, name), missing, name)
        rows += [(name, row) for row in found or ()]
    print_table(
        "DeepSeek-V3 decode on H800, 128 GPUs, 4K context: tokens/s/GPU (the MoE times in "
        "vLLM's and SGLang's tables grow with the tokens of all GPUs, not with a GPU's share)",
        ("setting", "kernels", "batch", "TPOT ms", "published", "ours", "error", "measured"),
        [
            (row.name, name, row.batch, 1e3 * row.tpot, row.published, row.ours,
             _percent(row.error, signed=True), _percent(_measured(row)))
            for name, row in rows
        ],
    )  # fmt: skip
    flat = {
        f"h800_error_{name.replace(' ', '_')}": row.error
        for name, row in rows
        if not row.name.endswith("ms")
    }
    return flat, {"h800": [{"kernels": name, **asdict(row)} for name, row in rows]}


def _decodes(source: str) -> list[published.DecodeRow]:
    """The profile's batch, and what holds 50 ms, by one source of kernel times."""
    model, system = read_model(_MODEL, kv_precision="bf16"), find_system("h800")
    db: KernelDB = RooflineDB(system)
    for backend in BACKENDS:
        if source == f"aic {backend}":
            db = AicDB(system, backend, balanced=True)
    return [published.decode_row(model, db), published.decode_within(model, db)]


def _ascend(missing: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = published.ascend_rows(read_model(_ASCEND_MODEL), RooflineDB(published.ASCEND))
    ratios = published.ratio_rows(rows)
    print_table(
        "DeepSeek-V3.2 decode on Ascend 910C dies: nothing measured there, a data sheet's roofline",
        ("run", "prompt", "batch", "tokens/s/die", "ours", "step ms", "ours ms"),
        [
            (r.run.name, r.run.prompt, r.run.batch, r.run.published, r.ours, 1e3 * r.run.step,
             1e3 * r.step)
            for r in rows
        ],
    )  # fmt: skip
    print_table(
        "AFD over EP64 per die",
        ("run", "prompt", "published", "ours", "error of the ratio"),
        [
            (r.name, r.prompt, _percent(r.published, signed=True), _percent(r.ours, signed=True),
             _percent(r.error, signed=True))
            for r in ratios
        ],
    )  # fmt: skip
    flat = {}
    for r in ratios:
        flat[f"ascend_{r.name.lower()}_{r.prompt // 1024}k"] = r.ours
        flat[f"ascend_{r.name.lower()}_{r.prompt // 1024}k_error"] = r.error
    flat["ascend_step_worst_error"] = min(r.step / r.run.step - 1 for r in rows)
    return flat, {"ascend": [asdict(r) for r in rows], "ascend_ratios": [asdict(r) for r in ratios]}


def _unless_missing(make: Callable[[], Found], missing: list[str], what: str = "") -> Found | None:
    """None, and why, where measured data are not there."""
    try:
        return make()
    except PlannerError as error:
        missing.append(f"{what}: {error}" if what else str(error))
        return None


def _constants(found: Calibration) -> str:
    links = ", ".join(
        f"{tier} {link.share:.3f} of the bandwidth + {1e6 * link.overhead:.1f} us"
        for tier, link in sorted(found.links.items())
    )
    return f"{links}, {1e9 * found.per_peer:.0f} ns per peer, spread {found.spread:.2f}"


def _measured(row: published.DecodeRow) -> float:
    """Share of the kernel times that is measured, or lies between measurements."""
    known = (Provenance.MEASURED, Provenance.INTERPOLATED)
    return sum(row.shares.get(provenance, 0.0) for provenance in known)


def _percent(share: float, signed: bool = False) -> str:
    return f"{100 * share:{'+' if signed else ''}.1f} %"


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    run(parser.parse_args().json)
