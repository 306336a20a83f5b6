"""Naming a workload: presets, pairs of lengths, traces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.workload import (
    PRESETS,
    Fixed,
    Geometric,
    Independent,
    Joint,
    LogNormal,
    LogNormalJoint,
    workload,
)


@pytest.mark.parametrize(
    ("name", "context", "found", "output"),
    [
        ("chat", 4608, 4096, 256),
        ("coding", 6144, 2048, 1024),
        ("agentic", 524544, 524288, 8192),
    ],
)
def test_presets_are_the_papers(name: str, context: int, found: int, output: int) -> None:
    """arXiv 2605.28302: prefix KV + ISL tokens of context, the prefix found in the cache."""
    preset = workload(name)
    assert preset is PRESETS[name]
    assert preset.name == name
    assert preset.mean_prompt == context
    assert preset.mean_output == output
    assert preset.reuse * context == pytest.approx(found)
    assert preset.moments().theta == pytest.approx(context + output - 1)


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["chat"]  # type: ignore[index]


def test_pairs_of_lengths() -> None:
    base = workload("fixed:100,geometric:500")
    assert base == Independent(Fixed(100), Geometric(500))
    assert base.moments().theta == pytest.approx(599)
    cached = workload("fixed:100, geometric:500, reuse:0.5")
    assert cached == Independent(Fixed(100), Geometric(500), name=cached.name, reuse=0.5)
    joint = workload("lognormal:1155:1.2,lognormal:211:0.9,correlation:0.3,reuse:0.25")
    assert joint == LogNormalJoint(
        LogNormal(1155, 1.2), LogNormal(211, 0.9), 0.3, name=joint.name, reuse=0.25
    )


@pytest.mark.parametrize("text", ["fixed:100,geometric:500", "fixed:1,fixed:2,reuse:0.5"])
def test_names_read_back(text: str) -> None:
    assert workload(workload(text).name) == workload(text)


def test_traces_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,3\n1,20,4\n")
    for source in (file, str(file)):
        found = workload(source)
        assert isinstance(found, Joint)
        assert list(found.replay()) == [(10, 3), (20, 4)]
        assert found.name == str(file)
    monkeypatch.chdir(tmp_path)
    os.link(file, "chat")
    assert workload("chat") is PRESETS["chat"]  # the preset wins
    assert isinstance(workload("./chat"), Joint)
    os.link(file, "fixed:1,fixed:2")
    assert isinstance(workload("fixed:1,fixed:2"), Joint)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("chatt", r"unknown workload 'chatt': expected a preset \(chat, coding, agentic\)"),
        ("", "unknown workload ''"),
        ("missing.csv", "no trace at 'missing.csv': there is no such file"),
        ("./missing", "no trace at './missing'"),
        ("fixed:100", r"1 length\(s\) in 'fixed:100': expected prompt and output lengths"),
        ("fixed:1,fixed:2,fixed:3", r"3 length\(s\)"),
        ("uniform:3,fixed:4", "unknown lengths 'uniform:3': expected fixed:100"),
        ("fixed:1,fixed:2,reuse:x", "'reuse:x' in .*: expected a number"),
        ("fixed:1,fixed:2,reuse:2", "reuse is 2.0"),
        ("fixed:1,fixed:0", "fixed:0 can be 0"),
        ("fixed:1,fixed:2,correlation:0.3", "only two lognormal lengths can be correlated"),
        ("lognormal:9:1,lognormal:9:1,correlation:3", "correlation is 3.0"),
    ],
)
def test_refused_names(text: str, says: str) -> None:
    with pytest.raises(PlannerError, match=says) as error:
        workload(text)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match=r"cannot read trace .*: Is a directory"):
        workload(tmp_path)
