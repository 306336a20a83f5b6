"""The data plane keeps to the cluster's interface."""

import os

import pytest

from actors.transport import interfaces
from actors.transport.interfaces import VARIABLE, choose, interface_of

THERE = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.5", "fe80::1%eth0"],
    "docker0": ["172.17.0.1"],
}


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(interfaces, "_RDMA", tmp_path / "none")


@pytest.mark.parametrize(
    ("address", "name"),
    [("10.0.0.5", "eth0"), ("127.0.0.1", "lo"), ("fe80::1", "eth0"), ("10.0.0.6", None)],
)
def test_the_interface_with_the_address(address: str, name: str | None):
    assert interface_of(address, THERE) == name


def test_it_is_told_to_ucx():
    assert choose("127.0.0.1") == os.environ[VARIABLE] == "lo"


def test_what_somebody_has_said_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "mlx5_0:1")
    assert choose("127.0.0.1") == os.environ[VARIABLE] == "mlx5_0:1"


def test_rdma_is_left_to_ucx(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(interfaces, "_RDMA", tmp_path)
    assert choose("127.0.0.1") is None


def test_an_address_of_nobody_is_said(caplog: pytest.LogCaptureFixture):
    assert choose("203.0.113.9") is None
    assert "203.0.113.9" in caplog.text and "transport.net_devices" in caplog.text
