"""What actors and frontends told of stage times and lengths, as samples by load.

Takes raw batches (``collect``, ``take_requests``) in the order in which a sender sent them and
knows what their figures mean; an actor's first steps count for nothing. Pure: all time comes with
the calls. Not for fitting (``calibrate``) or for windows (``telemetry``).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.telemetry import RIDE_COLUMNS, STEP_COLUMNS
from autoscaler.histories import bins_between, wire_between
from autoscaler.samples import Floats, Samples

LENGTHS = 64
"""Requests whose lengths are remembered; few, for a load that shifts is to show soon."""
STEPS = 256
"""Steps whose lanes are remembered."""
_STEP = {name: place for place, name in enumerate(STEP_COLUMNS)}
_RIDE = {name: place for place, name in enumerate(RIDE_COLUMNS)}


class Measured:
    """Samples of one deployment. Seconds are of a step through all layers.

    Args:
        layers: MoE layers of the model.
        top_k: experts per token.
        warmup_steps, warmup_s: an actor's first steps and seconds, which count for nothing.

    Attributes:
        attention: tokens, requests and lanes of a lane's step: its seconds, and those of the whole
            step outside of the layers.
        prefill: prompt tokens, other context tokens, decoding requests and lanes of a step: seconds
            of all lanes.
        ffn: requests whose experts are all at the actor: seconds.
        transfer: tokens of a frame: seconds there and back.
    """

    def __init__(self, layers: int, top_k: int, *, warmup_steps: int = 3, warmup_s: float = 2.0):
        self.attention = Samples(3, 2)
        self.prefill = Samples(4)
        self.ffn = Samples(1)
        self.transfer = Samples(1)
        self._layers = layers
        self._top_k = top_k
        self._warmup_steps = warmup_steps
        self._warmup_s = warmup_s
        self._before: dict[str, Mapping[str, Any]] = {}
        self._lanes: deque[float] = deque(maxlen=STEPS)
        self._prompts: deque[tuple[int, int]] = deque(maxlen=LENGTHS)
        self._outputs: deque[int] = deque(maxlen=LENGTHS)

    @property
    def counts(self) -> dict[str, int]:
        """Samples by stage."""
        return {stage: len(samples) for stage, samples in self._stages().items()}

    def forget(self, before: float) -> None:
        """Drop stage times of before."""
        for samples in self._stages().values():
            samples.forget(before)

    def _stages(self) -> dict[str, Samples]:
        return {
            "attention": self.attention,
            "ffn": self.ffn,
            "transfer": self.transfer,
            "prefill": self.prefill,
        }

    @property
    def lanes(self) -> int:
        """Of most steps lately; 1 while there were none."""
        return int(Counter(self._lanes).most_common(1)[0][0]) if self._lanes else 1

    @property
    def lanes_mean(self) -> float:
        """Of the steps lately; nan while there were none."""
        return float(np.mean(self._lanes)) if self._lanes else float("nan")

    @property
    def lengths(self) -> tuple[float, float, float]:
        """Mean prompt and output of the newest requests, and the prompts' share from the prefix
        cache; nan while there were none."""
        prompts, cached = np.array(self._prompts, dtype=float).reshape(-1, 2).sum(axis=0)
        if not prompts:
            return float("nan"), self._output_mean, float("nan")
        return prompts / len(self._prompts), self._output_mean, cached / prompts

    @property
    def _output_mean(self) -> float:
        return float(np.mean(self._outputs)) if self._outputs else float("nan")

    def take(self, name: str, batch: Mapping[str, Any], now: float) -> None:
        """Take in what an actor or a frontend told, as ``telemetry.Telemetry.take`` does.

        A batch that comes again, or after a newer one of the same sender, changes nothing.
        """
        before = self._before.get(name)
        if before is not None and before["incarnation"] != batch["incarnation"]:
            before = None
        if before is not None and batch["number"] <= before["number"]:
            return
        left_out = ("steps", "events", "experts")
        self._before[name] = {key: batch[key] for key in batch if key not in left_out}
        match batch["role"]:
            case "attention":
                self._take_steps(batch, before, now)
            case "ffn":
                self._take_rides(batch, before, now)
            case "frontend":
                self._take_requests(batch, before)

    def _take_steps(
        self, batch: Mapping[str, Any], before: Mapping[str, Any] | None, now: float
    ) -> None:
        rows = np.asarray(batch["steps"], dtype=np.float64).reshape(-1, len(STEP_COLUMNS))
        numbers = np.arange(batch["number"] - len(rows) + 1, batch["number"] + 1)
        seen = 0 if before is None else before["number"]
        counts = numbers > max(seen, self._warmup_steps)
        counts &= rows[:, _STEP["at"]] >= (batch["began"] or 0.0) + self._warmup_s
        counts &= rows[:, _STEP["interrupted"]] == 0
        if counts.any():
            self._learn_steps(rows[counts], now)
        if before is not None and before.get("wire") and batch.get("wire"):
            self._learn_wire(wire_between(before["wire"], batch["wire"]), now)

    def _learn_steps(self, rows: Floats, now: float) -> None:
        column = {name: rows[:, place] for name, place in _STEP.items()}
        lanes = np.maximum(column["lanes"], 1.0)
        self._lanes.extend(lanes[-64:].tolist())
        # Of the first layer nothing is told, and with one layer nothing at all.
        inside = column["compute"]
        if self._layers > 1:
            inside = column["layers"] * self._layers / (self._layers - 1)
        outside = np.maximum(column["compute"] - inside, 0.0)
        chunk = column["prefill_tokens"]
        decoding = chunk == 0
        load = np.column_stack((column["context"] / lanes, column["requests"] / lanes, lanes))
        times = np.column_stack((inside / lanes, outside))
        self.attention.add(load[decoding], times[decoding], now)
        others = np.maximum(column["context"] - chunk, 0.0)
        load = np.column_stack((chunk, others, column["decoding"], lanes))
        self.prefill.add(load[~decoding], inside[~decoding, None], now)

    def _learn_wire(self, less: Mapping[str, Any], now: float) -> None:
        if less["hops"] < 1 or less["frames"] < 1:
            return
        tokens = less["tokens"] / less["frames"]
        seconds = (less["seconds"]["wire_out"] + less["seconds"]["wire_back"]) / less["hops"]
        self.transfer.add(np.array([[tokens]]), np.array([[seconds * self._layers]]), now)

    def _take_rides(
        self, batch: Mapping[str, Any], before: Mapping[str, Any] | None, now: float
    ) -> None:
        began = batch["began"]
        if before is None or began is None or before["clock"] < began + self._warmup_s:
            return  # the difference holds its first calls
        bins = bins_between(before["bins"], batch["bins"])
        rides = bins[:, _RIDE["rides"]]
        load = bins[:, _RIDE["pairs"]] / rides / self._top_k
        seconds = bins[:, _RIDE["seconds"]] / rides * self._layers
        self.ffn.add(load[:, None], seconds[:, None], now)

    def _take_requests(self, batch: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        seen = 0 if before is None else before["number"]
        for event in batch["events"]:
            if event.number <= seen:
                continue
            if not hasattr(event, "outcome"):  # its first token: the prompt's length is known
                self._prompts.append((event.prompt or 0, event.cached or 0))
            elif event.outcome in ("stop", "length") and event.output:
                self._outputs.append(event.output)
