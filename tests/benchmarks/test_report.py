"""Reports are flat, complete and written where they were asked for."""

import json

import pytest

from benchmarks.report import commit, machine, make_report, print_summary, versions, write_report


def test_summary_is_flat_and_says_where_it_comes_from(tmp_path, capsys):
    report = make_report("demo", {"rtt_us": 12.5, "match": True}, {"rounds": [1, 2]})
    path = tmp_path / "deep" / "demo.json"
    write_report(report, path)
    read = json.loads(path.read_text())
    assert read == report
    assert read["summary"]["rtt_us"] == 12.5
    assert {"bench", "machine", "versions", "commit", "time"} <= set(read["summary"])
    assert not any(isinstance(value, (dict, list)) for value in read["summary"].values())
    print_summary(report)
    assert "rtt_us" in capsys.readouterr().out


def test_no_path_writes_nothing(tmp_path):
    write_report(make_report("demo", {}), None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_number_becomes_null(tmp_path):
    report = make_report("demo", {"a": float("nan")}, {"rows": [(1.0, float("inf"))]})
    write_report(report, tmp_path / "demo.json")
    read = json.loads((tmp_path / "demo.json").read_text())
    assert read["summary"]["a"] is None and read["details"]["rows"] == [[1.0, None]]


def test_nested_summary_is_refused():
    with pytest.raises(ValueError, match="'nested'"):
        make_report("demo", {"nested": {"a": 1}})  # type: ignore[dict-item]


def test_origin_is_filled():
    assert "cores" in machine()
    assert "torch" in versions()
    assert commit()
