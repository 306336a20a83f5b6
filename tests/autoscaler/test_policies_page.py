"""docs/policies.md says what the code does: parameters, defaults, reasons, a working example."""

from __future__ import annotations

import re

import pytest
from pydantic_core import PydanticUndefined

from autoscaler import registry
from autoscaler.core import Core
from autoscaler.limits import Counts, Limits
from autoscaler.policies.inner import Inner
from autoscaler.reasons import Reason
from cluster.paths import project_root
from tests.autoscaler.views import SYSTEM, TARGETS, snapshot

PAGE = (project_root() / "docs" / "policies.md").read_text()
SECTIONS = dict(re.findall(r"^## (\S.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def shown(default: object) -> str:
    if isinstance(default, Inner):
        return default.policy
    return "null" if default is None else str(default)


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_parameter_is_on_the_page_with_its_default(name: str):
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", SECTIONS[name], re.M)
    fields = registry.find(name).Parameters.model_fields
    assert all(field.default is not PydanticUndefined for field in fields.values())
    assert dict(rows) == {key: shown(field.default) for key, field in fields.items()}


def test_every_reason_is_on_the_page():
    assert re.findall(r"^\| `(\w+)` \|", SECTIONS["Reasons"], re.M) == [str(r) for r in Reason]


def test_the_example_works():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    scope: dict[str, object] = {"__name__": "my_policy"}
    exec(code, scope)
    kind = scope["PerRate"]
    policy = kind(kind.Parameters(per_worker=2.0))  # type: ignore[attr-defined, operator]
    decision = Core(policy, Limits(), TARGETS, SYSTEM).tick(snapshot(arrival_rate=9.0))
    assert decision.target == Counts(5, 4)
    assert decision.detail == "9.0 requests/s"


def test_the_schedule_of_the_page_is_accepted():
    import yaml

    text = re.findall(r"```yaml\n(.*?)```", SECTIONS["schedule"], re.S)[0]
    given = yaml.safe_load(text)
    registry.make(given["policy"], given["parameters"])
