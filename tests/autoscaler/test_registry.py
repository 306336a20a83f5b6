"""Policies by name, by entry point, and by module:Class; parameters that are refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from actors.errors import AffluxError
from autoscaler import registry
from autoscaler.policy import Parameters, Policy, Proposal, View
from autoscaler.registry import BadPolicy


class MineParameters(Parameters):
    much: int = 3


class Mine:
    name: ClassVar[str] = "mine"
    Parameters: ClassVar[type[Parameters]] = MineParameters

    def __init__(self, parameters: MineParameters):
        if parameters.much == 13:
            raise AffluxError("13 brings bad luck; take another number")
        self.parameters = parameters

    def propose(self, view: View) -> Proposal | None:
        return None


class NoPolicy:
    pass


not_even_a_class = 3

HERE = f"{__name__}:Mine"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    # pytest imports this module under a name that the import system does not find.
    import sys

    monkeypatch.setitem(sys.modules, "my_policies", sys.modules[__name__])


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_policy_of_ours_is_made_from_its_defaults(name: str):
    policy = registry.make(name)
    assert isinstance(policy, Policy)
    assert policy.name == name


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_parameter_is_described(name: str):
    for key, info in registry.find(name).Parameters.model_fields.items():
        assert info.description, f"{name}.{key}"


def test_a_policy_of_the_users_own_by_path():
    policy = registry.make("my_policies:Mine", {"much": 4})
    assert policy.parameters.much == 4  # type: ignore[attr-defined]


def test_a_policy_of_the_users_own_by_entry_point(monkeypatch: pytest.MonkeyPatch):
    points = [
        EntryPoint("mine", "my_policies:Mine", registry.GROUP),
        EntryPoint("static", "my_policies:Mine", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert registry.make("mine").name == "mine"
    assert registry.make("static").name == "static", "ours win"
    assert registry.names()["mine"] == "my_policies:Mine"


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("slo_fedback", {}, "there is no policy 'slo_fedback'.*optimal_ratio.*module:Class"),
        ("no_such_module:Mine", {}, "can't be imported"),
        ("my_policies:Yours", {}, "can't be imported"),
        ("my_policies:NoPolicy", {}, "is no policy"),
        ("my_policies:not_even_a_class", {}, "is no policy"),
        ("my_policies:Mine", {"many": 3}, "it knows much\n.*many"),
        ("my_policies:Mine", {"much": "x"}, "much: .*given 'x'"),
        ("my_policies:Mine", {"much": 13}, "bad luck"),
        ("static", {"attention": 0, "fnn": 1}, r"(?s)attention: .*0.*fnn: "),
        ("slo_feedback", {"high": 0.5, "low": 0.6}, "low is 0.6 and high 0.5"),
        ("slo_feedback", {"high": float("nan")}, "high"),
        ("predictive", {"inner": {"policy": "nobody"}}, "no policy 'nobody'"),
        ("predictive", {"inner": {"policy": "static", "parameters": {"x": 1}}}, "static.*\n.*x"),
        ("predictive", {"season": 60}, "at least 4 periods"),
        ("schedule", {"zone": "Europe/Atlantis"}, "Europe/Atlantis"),
        ("schedule", {"windows": [{"days": ["monday"]}]}, "windows.0.days.0"),
        ("schedule", {"windows": [{"min_ffn": 3, "max_ffn": 2}]}, "min_ffn is 3 and max_ffn 2"),
    ],
)
def test_refusals_say_what_would_fit(name: str, parameters: dict[str, object], words: str):
    with pytest.raises(BadPolicy, match=words):
        registry.make(name, parameters)
