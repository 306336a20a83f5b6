"""The stage times of one system: t_A, t_F and t_C as curves over load, presets, and JSON.

Every stage of a step is a rising curve over the load it sees, as in arXiv 2601.21351: attention
over context tokens, experts and transfer over requests. Times are per *step*, one decode iteration
of one lane through all layers, in the unit that ``Latencies.unit`` names. Pure data: fitting curves
to measurements is ``fitting``, deciding anything from them is ``sizing`` and ``simulator``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from planner.curves import (
    Curve,
    Linear,
    PiecewiseLinear,
    Tabulated,
    X,
    check_keys,
    check_number,
    curve_data,
    read_curve,
)
from planner.errors import PlannerError

__all__ = [
    "PRESETS",
    "STAGES",
    "Curve",
    "Latencies",
    "Linear",
    "PiecewiseLinear",
    "Tabulated",
    "load_latencies",
]

FORMAT = "afflux-latencies"
VERSION = 1

STAGES = ("attention", "ffn", "transfer", "prefill")
_CURVES = (*STAGES, "outside")
_NO_TIME = Linear(0.0, 0.0)


@dataclass(frozen=True)
class Latencies:
    """The stage times of one system, per step of one lane, as functions of load.

    Symbols of arXiv 2601.21351: t_A, t_F, t_C. A system measured per layer has to be multiplied by
    its layers first (``fitting`` does).

    Args:
        attention: t_A over the context tokens of the lane's slots on one attention worker.
        ffn: t_F over the requests of the step at one FFN worker that holds all experts.
        transfer: t_C, both directions together, over the requests that ``transfer_load`` names.
        attention_per_request: attention-side time per request of the lane, whatever its context
            (projections, gate, sampling); 0 in the papers.
        prefill: time over the uncached prompt tokens of one request or chunk, at a prefill worker
            or on top of an attention step that carries the chunk.
        outside: time of a joint step of all lanes of an attention worker before and after its
            layers (scheduling, sampling), over its requests; 0 in the papers. Formulas and
            independent steps take it ``folded`` into the attention side.
        unit: of every time: "s", "cycles", ...
        source: where the numbers come from, for people.
        transfer_load: "ffn": requests at one FFN worker (v3 of the paper and later); "attention":
            requests of the lane at one attention worker (v1).
        weights_share: share in [0, 1] of the FFN intercept that is reading expert weights, which a
            worker with a share of the experts does only for its share.

    Raises:
        PlannerError: a number is negative, not finite or out of range; names the field.
    """

    attention: Curve
    ffn: Curve
    transfer: Curve
    attention_per_request: float = 0.0
    prefill: Curve = _NO_TIME
    outside: Curve = _NO_TIME
    unit: str = "s"
    source: str = ""
    transfer_load: Literal["ffn", "attention"] = "ffn"
    weights_share: float = 0.0

    def __post_init__(self) -> None:
        for name in _CURVES:
            if not isinstance(getattr(self, name), Curve):
                raise PlannerError(
                    f"{name} is {getattr(self, name)!r}, expected a curve such as Linear(a, b)"
                )
        for name in ("attention_per_request", "weights_share"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if self.weights_share > 1:
            raise PlannerError(f"weights_share is {self.weights_share:g}, expected 0 to 1")
        if self.transfer_load not in ("ffn", "attention"):
            raise PlannerError(
                f"transfer_load is {self.transfer_load!r}, expected 'ffn' or 'attention'"
            )
        if not isinstance(self.unit, str) or not self.unit:
            raise PlannerError(f"unit is {self.unit!r}, expected a name such as 's' or 'cycles'")

    def t_attention(self, tokens: X, requests: X | float = 0.0) -> X:
        """Attention time of a step of one lane on one worker.

        Args:
            tokens: context tokens of the lane's requests, summed.
            requests: how many requests that is; may be left out where the per-request time is 0.
        """
        return self.attention(tokens) + self.attention_per_request * requests

    def t_ffn(self, requests: X, share: float = 1.0) -> X:
        """Expert time of a step at one FFN worker.

        Args:
            requests: load of the worker in requests whose experts are all here; a worker that holds
                a share of the experts sees that share of every request.
            share: of the experts held by the worker, in (0, 1].

        Raises:
            PlannerError: the share is out of range.
        """
        time = self.ffn(requests)
        if share == 1.0:
            return time
        if not 0.0 < share < 1.0:
            raise PlannerError(f"share of the experts is {share:g}, expected above 0 and up to 1")
        return time - self.weights_share * self.ffn.intercept * (1.0 - share)

    def t_transfer(self, requests: X) -> X:
        """Transfer time of a step, there and back; ``transfer_load`` says whose requests."""
        return self.transfer(requests)

    def folded(self, lanes: int) -> Latencies:
        """The same with the time outside of the layers on the attention side, a lane's share each.

        What formulas and independent steps take; they know no other place for it.

        Raises:
            PlannerError: attention or ``outside`` is not ``Linear``.
        """
        if not isinstance(self.attention, Linear) or not isinstance(self.outside, Linear):
            raise PlannerError("only linear attention and outside times can be folded")
        return replace(
            self,
            attention=Linear(self.attention.a, self.attention.b + self.outside.b / lanes),
            attention_per_request=self.attention_per_request + self.outside.a,
            outside=Linear(0.0, 0.0),
        )

    def t_prefill(self, tokens: X) -> X:
        """Prefill time of one request or chunk with so many uncached prompt tokens."""
        return self.prefill(tokens)

    @property
    def linear(self) -> bool:
        """Whether attention, ffn and transfer are all ``Linear``, as closed forms need it."""
        return all(isinstance(c, Linear) for c in (self.attention, self.ffn, self.transfer))

    def scaled(
        self,
        *,
        attention: float = 1.0,
        ffn: float = 1.0,
        transfer: float = 1.0,
        prefill: float = 1.0,
        unit: str | None = None,
    ) -> Latencies:
        """The same system with times multiplied per stage: another device, or another unit.

        Args:
            unit: name of the new unit; None keeps it.
        """
        return replace(
            self,
            attention=self.attention.scaled(attention, attention),
            attention_per_request=self.attention_per_request * attention,
            ffn=self.ffn.scaled(ffn, ffn),
            transfer=self.transfer.scaled(transfer, transfer),
            prefill=self.prefill.scaled(prefill, prefill),
            outside=self.outside.scaled(attention, attention),
            unit=self.unit if unit is None else unit,
        )

    def to_json(self) -> str:
        """JSON that ``from_json`` reads back to an equal object.

        Raises:
            PlannerError: a curve is not one of this module's, so it can't be written.
        """
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for entry in fields(self):
            value = getattr(self, entry.name)
            data[entry.name] = curve_data(entry.name, value) if entry.name in _CURVES else value
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Latencies:
        """Read what ``to_json`` writes; stages after the first three may be left out.

        Raises:
            PlannerError: not JSON, another format or version, a key that is missing or unknown, or
                a value out of range; names the key, as in ``ffn.a``.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlannerError(f"latencies are not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlannerError(f'expected JSON with "format": "{FORMAT}", found {found!r}')
        if data.get("version") != VERSION:
            raise PlannerError(
                f"latencies are of version {data.get('version')!r}, this reads version {VERSION}"
            )
        given = {key: value for key, value in data.items() if key not in ("format", "version")}
        check_keys("latencies", given, {f.name for f in fields(cls)}, set(STAGES[:3]))
        for name in _CURVES:
            if name in given:
                given[name] = read_curve(name, given[name])
        return cls(**given)


PRESETS: Mapping[str, Latencies] = {
    "deepseek-v3-npu": Latencies(
        attention=Linear(0.00165, 50.0),
        ffn=Linear(0.083, 100.0),
        transfer=Linear(0.022, 20.0),
        unit="cycles",
        source="arXiv 2601.21351, DeepSeek-V3 on an NPU",
    ),
}
"""Systems by name; the paper's coefficients are per step, in cycles."""


def load_latencies(name: str | Path) -> Latencies:
    """A preset by its name, or a file that ``Latencies.to_json`` wrote.

    Raises:
        PlannerError: neither a preset nor a readable file, or what the file holds is refused; names
            the file.
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise PlannerError(
            f"latencies {str(name)!r}: neither a preset ({', '.join(sorted(PRESETS))}) nor a file "
            f"that can be read ({reason})"
        ) from error
    try:
        return Latencies.from_json(text)
    except PlannerError as error:
        raise PlannerError(f"{name}: {error}") from error
