"""Container and service files: linted, and what they name exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.paths import project_root

ROOT = project_root()
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("Dockerfile*"))
UNIT = ROOT / "deploy" / "systemd" / "afflux.service"


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run([program, "--no-color", str(path)], capture_output=True, text=True)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_has_nothing_to_say(path: Path):
    found = hadolint(path)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_linter_would_find_a_mistake(tmp_path: Path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && apt-get install wget\n")
    assert "DL3006" in hadolint(bad).stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_this_python_as_nobody_special_and_find_their_files(path: Path):
    text = path.read_text()
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert all(
        image.startswith(f"python:{minor}.") for image in re.findall(r"^FROM (\S+)", text, re.M)
    )
    assert "USER 1000" in text  # by number: Kubernetes must see that it is not root
    kind = "cpu" if path.suffix == ".cpu" else "gpu"
    assert f"requirements/install.sh /opt/venv {kind}" in text
    (served,) = re.findall(r'"serve", "run", "([^"]+)"', text)
    assert (ROOT / served).is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not any(served.startswith(name) for name in ignored)


def test_the_service_runs_what_there_is():
    text = UNIT.read_text()
    commands = re.findall(r"^Exec\w+=\S+/afflux (\w+)", text, re.M)
    assert commands == ["up", "down"]
    for command in re.findall(r"^Exec\w+=\S+/(afflux .*)$", text, re.M):
        words = [word for word in command.split() if word.startswith("--")]
        shown = subprocess.run(
            [sys.executable, "-m", *command.split()[:2], "--help"],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        ).stdout
        assert all(word in shown for word in words), command


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_reads_the_unit(tmp_path: Path):
    text = UNIT.read_text().replace("/opt/afflux/.venv/bin/afflux", shutil.which("true") or "")
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^(User|WorkingDirectory)=.*\n", "", text, flags=re.M))
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
