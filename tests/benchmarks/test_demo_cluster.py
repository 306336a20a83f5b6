"""What ``make demo-cluster`` says where it can't run; it is watched by people elsewhere."""

import pytest

from benchmarks import demo_cluster


def test_it_says_why_it_can_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_cluster, "why_not", lambda: "making hosts needs root")
    assert demo_cluster.main() == 1
    assert capsys.readouterr().err == "error: making hosts needs root\n"
