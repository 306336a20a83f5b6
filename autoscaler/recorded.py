"""The latency model of a recording, calibrated as the controller would have while it was made.

Not for requests (``recording.read_requests``) nor for figures for people (``summary``).
"""

from __future__ import annotations

from os import PathLike
from statistics import median

from autoscaler.calibrate import Calibrator
from autoscaler.model import Model
from autoscaler.policy import SLO, System
from autoscaler.recording import Header, entries, read_header
from autoscaler.recording_lines import BadRecording
from autoscaler.telemetry import Telemetry

REFIT_S = 5.0
WINDOW_S = 20.0
_SLOTS = 256  # vLLM's usual, where the recording does not say


def model_of(path: str | PathLike[str]) -> Model:
    """The model at the end of a recording.

    Raises:
        BadRecording: no recording, or stages in it that were never measured.
    """
    header = read_header(path)
    if header.layers is None or header.top_k is None:
        raise BadRecording(
            f"{path} does not say how many layers and experts per token the model has, so stage "
            "times can't be told from it; give them with --latency"
        )
    calibrator = Calibrator(header.layers, header.top_k)
    telemetry = Telemetry(WINDOW_S, slo_of(header))
    system = system_of(header)
    model: Model | None = None
    fitted = now = 0.0
    for entry in entries(path):
        now = entry.at
        if entry.kind == "change":
            telemetry.changed(now)
        if entry.kind in ("change", "decision"):
            continue
        telemetry.take(entry.name, entry.data, now)
        calibrator.take(entry.name, entry.data, now)
        if now - fitted >= REFIT_S:
            fitted = now
            model = calibrator.model(telemetry.snapshot(now), system, now) or model
    if now:
        model = calibrator.model(telemetry.snapshot(now), system, now) or model
    if model is None:
        raise BadRecording(
            f"{path}: too little was recorded to tell the stage times; record for longer under "
            "load, or give them with --latency"
        )
    return model


def prepare_seconds(path: str | PathLike[str]) -> float | None:
    """Median seconds that changes took to start their actors; None where none was recorded."""
    took = [
        float(entry.data["seconds"]["prepare"])
        for entry in entries(path)
        if entry.kind == "change" and "prepare" in entry.data.get("seconds", {})
    ]
    return median(took) if took else None


def slo_of(header: Header) -> SLO:
    """The targets that the deployment had; the spec's defaults where the recording has none."""
    return SLO(header.ttft_s or 2.0, header.tpot_s or 0.2, header.percentile)


def system_of(header: Header) -> System:
    """What of the deployment did not change."""
    return System(
        slots=header.slots or _SLOTS,
        kv_tokens=header.kv_tokens,
        lanes=header.lanes if isinstance(header.lanes, int) else 1,
        top_k=header.top_k,
        experts=header.experts,
    )
