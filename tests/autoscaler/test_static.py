"""The static policy."""

from __future__ import annotations

import pytest

from autoscaler import registry
from autoscaler.limits import Counts
from autoscaler.reasons import Reason
from tests.autoscaler.views import snapshot, view


@pytest.mark.parametrize(
    ("parameters", "numbers"),
    [
        ({}, (None, None)),
        ({"attention": 3}, (3, None)),
        ({"ffn": 5}, (None, 5)),
        ({"attention": 2, "ffn": 6}, (2, 6)),
    ],
)
def test_it_proposes_its_parameters_whatever_happens(parameters, numbers):
    policy = registry.make("static", parameters)
    for seen in (snapshot(), snapshot(ttft=50.0, waiting=100), snapshot(running=0, attention=1)):
        proposal = policy.propose(view(seen))
        assert (proposal.attention, proposal.ffn) == numbers
        assert proposal.reason is (Reason.FIXED if parameters else Reason.AS_IT_IS)


def test_a_lost_worker_is_missing_from_what_there_is():
    assert view(snapshot(attention=3, attention_preparing=1)).there == Counts(4, 4)
