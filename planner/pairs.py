"""Workloads: where the prompt and output lengths of requests come from.

A workload draws requests for the simulator and gives their moments to the sizing. It has no
arrival times: a trace (planner/traces.py) or the load of a simulation adds those. How to name one
in a command is planner/workload.py's job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from planner.errors import PlannerError
from planner.lengths import (
    Lengths,
    LogNormal,
    Marginal,
    round_lengths,
    rounded_lognormal_moments,
)
from planner.moments import Moments, check_pairs, independent_moments, moments_from, moments_of


class Workload(Protocol):
    """Requests with a prompt and an output length."""

    @property
    def name(self) -> str:
        """What to call it in a report."""

    @property
    def reuse(self) -> float:
        """Share of all prompt tokens found in a prefix cache, 0 to 1; 0 when unknown."""

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length per request, tokens."""

    @property
    def mean_output(self) -> float:
        """Mean output length per request, tokens."""

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        """Draw ``n`` requests: prompt lengths (0 or more) and output lengths (1 or more)."""

    def moments(self) -> Moments:
        """Mean and variance of a slot's load: exact where there is a closed form."""


@dataclass(frozen=True)
class Independent:
    """Prompt and output lengths that say nothing about each other.

    Raises:
        PlannerError: outputs that can be 0, or a reuse outside 0 to 1.
    """

    prompt: Marginal
    output: Marginal
    name: str = ""
    reuse: float = 0.0

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{self.prompt.spec},{self.output.spec}")
        check_reuse(self.reuse)
        if self.output.smallest < 1:
            raise PlannerError(
                f"output lengths {self.output.spec} can be 0: a request makes one token at least"
            )

    @property
    def mean_prompt(self) -> float:
        return self.prompt.raw_moments()[0]

    @property
    def mean_output(self) -> float:
        return self.output.raw_moments()[0]

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        return self.prompt.sample(rng, n), self.output.sample(rng, n)

    def moments(self) -> Moments:
        return independent_moments(self.prompt.raw_moments(), self.output.raw_moments())


@dataclass(frozen=True)
class LogNormalJoint:
    """Lognormal prompts and outputs whose logarithms are correlated.

    Real traces are: long prompts often ask for long answers, or for short ones. A positive
    correlation raises the load above that of independent lengths.

    Args:
        prompt, output: the marginals; what is drawn is rounded, at least 1.
        correlation: of the logarithms, -1 to 1.

    Raises:
        PlannerError: a correlation outside -1 to 1, or a reuse outside 0 to 1.
    """

    prompt: LogNormal
    output: LogNormal
    correlation: float
    name: str = ""
    reuse: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.correlation <= 1:
            raise PlannerError(f"correlation is {self.correlation}: expected a number from -1 to 1")
        if not self.name:
            lengths = f"{self.prompt.spec},{self.output.spec}"
            object.__setattr__(self, "name", f"{lengths},correlation:{self.correlation:g}")
        check_reuse(self.reuse)

    @property
    def mean_prompt(self) -> float:
        return self.prompt.raw_moments()[0]

    @property
    def mean_output(self) -> float:
        return self.output.raw_moments()[0]

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        z = rng.standard_normal((2, n))
        z[0] = self.correlation * z[1] + (1 - self.correlation**2) ** 0.5 * z[0]
        p, d = (
            round_lengths(np.exp(lengths.mu + lengths.sigma * normal))
            for lengths, normal in zip((self.prompt, self.output), z, strict=True)
        )
        return p, d

    def moments(self) -> Moments:
        """Exact but for the rounding of prompts: within 0.1 % once they average 20 tokens.

        Weighting by P^b, which is lognormal given the output, tilts the normal behind the output
        length: E[D^a P^b] = E[P^b] E[D^a] with mu_D moved by b * correlation * sigma_P * sigma_D.
        """
        p, d = self.prompt, self.output
        shift = self.correlation * p.sigma * d.sigma
        p1, p2, _ = p.raw_moments()
        once, twice = (rounded_lognormal_moments(d.mu + times * shift, d.sigma) for times in (1, 2))
        return moments_from(
            output=d.raw_moments(),
            mixed=(p1 * once[0], p2 * twice[0], p1 * once[1]),
            prompt_mean=p1,
        )


@dataclass(frozen=True, eq=False)
class Joint:
    """Observed requests: draws pick one of them, both lengths together.

    Args:
        prompt: int64[n], tokens, 0 or more; in order of arrival where there is one.
        output: int64[n], tokens, 1 or more.

    Raises:
        PlannerError: no requests, arrays that are not such lengths or differ in shape, or a reuse
            outside 0 to 1.
    """

    prompt: Lengths
    output: Lengths
    name: str = "observed requests"
    reuse: float = 0.0

    def __post_init__(self) -> None:
        prompt, output = check_pairs(self.prompt, self.output)
        for name, lengths in (("prompt", prompt), ("output", output)):
            lengths.setflags(write=False)  # moments() is kept
            object.__setattr__(self, name, lengths)
        check_reuse(self.reuse)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def mean_prompt(self) -> float:
        return float(self.prompt.mean())

    @property
    def mean_output(self) -> float:
        return float(self.output.mean())

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Lengths, Lengths]:
        chosen = rng.integers(len(self), size=n)
        return self.prompt[chosen], self.output[chosen]

    def replay(self) -> Iterator[tuple[int, int]]:
        """The requests themselves, once, in their order."""
        return zip(self.prompt.tolist(), self.output.tolist(), strict=True)

    def moments(self) -> Moments:
        """Estimated, with a confidence interval; computed once."""
        return self._estimate

    @cached_property
    def _estimate(self) -> Moments:
        return moments_of(self.prompt, self.output)


def check_reuse(reuse: float) -> None:
    """Raises PlannerError unless ``reuse`` is a share."""
    if not 0 <= reuse <= 1:
        raise PlannerError(
            f"reuse is {reuse}: expected the share of prompt tokens found in a prefix cache, 0 to 1"
        )
