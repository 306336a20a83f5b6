"""Rules and alerts: promtool accepts them, and each alert has a case of both kinds."""

from __future__ import annotations

import re

import pytest
import yaml

from dashboards import promtool, rules
from dashboards.build import build_all
from dashboards.expressions import expressions

RULES = rules.load()
ALERTS = [rule for rule in RULES if rule.alert]
TESTS = [
    yaml.safe_load(file.read_text())
    for file in sorted((rules.folder() / "tests").glob("*.test.yml"))
]

needs_promtool = pytest.mark.skipif(promtool.find() is None, reason=promtool.HOW_TO_GET_IT)


@needs_promtool
def test_promtool_accepts_everything_and_its_tests_pass() -> None:
    assert promtool.problems(one.expr for one in expressions()) == []


@needs_promtool
def test_promtool_sees_what_is_wrong() -> None:
    found = promtool.problems(["up", "sum(up"])
    assert found and all(problem.startswith("promtool check rules: ") for problem in found)


def test_every_alert_of_the_issue_is_there() -> None:
    assert {rule.name for rule in ALERTS} >= {
        "AffluxSLOBurnFast",
        "AffluxSLOBurnSlow",
        "AffluxControllerStalled",
        "AffluxManagerStalled",
        "AffluxScaleFailing",
        "AffluxActorCrashLoop",
        "AffluxFFNImbalance",
        "AffluxTargetDown",
    }


@pytest.mark.parametrize("alert", [rule.name for rule in ALERTS])
def test_each_alert_has_a_case_that_fires_and_one_that_does_not(alert: str) -> None:
    cases = [
        bool(case["exp_alerts"])
        for file in TESTS
        for test in file["tests"]
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == alert
    ]
    assert set(cases) == {True, False}


def test_rules_are_named_as_agreed() -> None:
    for rule in RULES:
        pattern = r"Afflux[A-Z]\w+" if rule.alert else r"afd:[a-z_]+:(rate|increase)\d+[mh]"
        assert re.fullmatch(pattern, rule.name), rule.name
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("alert", ALERTS, ids=[rule.name for rule in ALERTS])
def test_alerts_say_how_bad_it_is_and_what_to_do(alert: rules.Rule) -> None:
    assert alert.labels["severity"] in ("page", "ticket")
    assert len(alert.annotations["description"]) > 100
    assert alert.annotations["summary"]
    assert alert.annotations["dashboard"] in build_all()


def test_every_recording_rule_is_used() -> None:
    others = "\n".join(one.expr for one in expressions())
    for rule in RULES:
        if not rule.alert:
            assert rule.name in others, rule.name


def test_prometheus_asks_the_manager_who_there_is() -> None:
    config = yaml.safe_load((rules.folder() / "prometheus.yml").read_text())
    assert config["rule_files"] == list(rules.RULE_FILES)
    (job,) = config["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"].endswith(":9464/sd")
    # a retired actor's series must be gone within 15 s
    assert discovery["refresh_interval"] == "5s"
    assert config["global"]["scrape_interval"] == "5s"


def test_a_broken_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("rules")
    (folder / "recording.rules.yml").write_text("groups: 5")
    monkeypatch.setattr(rules, "folder", lambda: folder)
    with pytest.raises(rules.RulesError, match=r"recording\.rules\.yml holds no rules"):
        rules.load()
