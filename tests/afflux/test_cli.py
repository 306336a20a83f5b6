"""The command line: exit codes, where errors go, and how quickly it answers."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from actors.errors import AffluxError
from afflux import __version__, watch
from afflux.main import app
from cluster.paths import project_root
from cluster.spec import ClusterSpec
from cluster.status import (
    ActorEvent,
    ActorStatus,
    ChangeReport,
    ClusterHandle,
    ClusterStatus,
    DownReport,
)

run = CliRunner().invoke
SPECS = project_root() / "deploy" / "specs"


def afflux(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "afflux", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=project_root(), check=False)


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, afflux.main;"
        "print([m for m in ('ray', 'vllm', 'torch', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    times = []
    for _ in range(3):
        began = time.perf_counter()
        assert afflux("--help").returncode == 0
        times.append(time.perf_counter() - began)
    assert min(times) < 2.0  # 0.2 s on an idle core; this machine may be busy


def test_version():
    assert run(app, ["--version"]).stdout.strip() == f"afflux {__version__}"


def test_an_error_is_text_on_stderr_and_a_traceback_only_on_demand():
    plain = afflux("spec", "check", "nowhere.yaml")
    assert plain.returncode == 1
    assert plain.stdout == ""
    assert plain.stderr.strip() == (
        "error: cannot read the spec nowhere.yaml: No such file or directory"
    )
    assert "Traceback" in afflux("--debug", "spec", "check", "nowhere.yaml").stderr


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["up", "--nonsense"], ["spec"], ["bench", "nonsense"], ["up", "a", "b"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str]):
    assert run(app, arguments).exit_code == 2


@pytest.mark.parametrize("file", sorted(SPECS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_specs_that_we_ship_check_out(file: Path):
    result = run(app, ["spec", "check", str(file), "--no-model"])
    assert result.exit_code == 0, result.output
    assert "attention" in result.stdout


def test_spec_check_reads_the_checkpoint(
    tmp_path: Path, moe_checkpoint: Callable[..., Path], dense_checkpoint: Path
):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": str(moe_checkpoint("qwen3_moe"))}}))
    good = run(app, ["spec", "check", str(file)])
    assert good.exit_code == 0, good.output
    assert "MoE layers" in good.stdout
    dense = run(app, ["spec", "check", str(file), "--set", f"model.path={dense_checkpoint}"])
    assert dense.exit_code == 1
    assert "dense" in dense.stderr
    many = run(app, ["spec", "check", str(file), "--set", "ffn.max=999", "--set", "ffn.count=999"])
    assert many.exit_code == 1
    assert "ffn.count is 999" in many.stderr


def test_spec_schema_is_a_json_schema():
    schema = json.loads(run(app, ["spec", "schema"]).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((SPECS / "embedded.yaml").read_text()), schema)


class FakeLauncher:
    """Stands in for ``cluster.launcher`` and ``cluster.verbs``: no Ray is needed here."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.left: tuple[int, ...] = ()
        self.error: Exception | None = None

    def up(
        self, spec: ClusterSpec, *, address: str | None, on_event: Callable[[ActorEvent], None]
    ) -> ClusterHandle:
        self.calls.append(("up", (spec, address)))
        on_event(ActorEvent(actor="", role=None, state="pending", detail="starting Ray"))
        states: Sequence[Any] = ("placed", "importing", "loading", "connected", "ready")
        for number, state in enumerate(states):
            event = ActorEvent(
                actor="ffn-0", role="ffn", state=state, seconds=number, number=number
            )
            on_event(event)
        if self.error:
            raise self.error
        return ClusterHandle(
            name=spec.name, url="http://127.0.0.1:8000", address="local", started_ray=True
        )

    def down(self, name: str, *, address: str | None) -> DownReport:
        self.calls.append(("down", (name, address)))
        return DownReport(name=name, found=name != "ghost", actors=("ffn-0",), left=self.left)

    def status(self, name: str, *, address: str | None) -> ClusterStatus:
        self.calls.append(("status", (name, address)))
        if name == "ghost":
            raise AffluxError("ghost is not running", code="not_running")
        actor = ActorStatus(
            name="ffn-0",
            role="ffn",
            state="ready",
            node_ip="127.0.0.1",
            pid=42,
            resources={"CPU": 0.5, "memory": 2.0**30},
            experts={0: 4, 1: 3},
            allocated_bytes=3 * 2**20,
            peers=("attention-0",),
        )
        return ClusterStatus(
            name=name,
            url="http://127.0.0.1:8000",
            health="ready",
            epoch=1,
            lanes="auto",
            model="verse",
            actors=(actor, actor.model_copy(update={"name": "ffn-1", "state": "draining"})),
            targets={"attention": 1, "ffn": 1},
            change=ChangeReport(
                number=7, verb="retire", text="ffn-1", phase="release", started_at=time.time()
            ),
            warm=1,
            warm_target=2,
            emulated=True,
            manager_pid=4711,
            metrics_url="http://127.0.0.1:9464",
        )

    def watch(
        self, name: str, *, interval_s: float, address: str | None
    ) -> Iterator[ClusterStatus]:
        self.calls.append(("watch", (name, interval_s, address)))
        for epoch in (1, 2):
            yield self.status(name, address=address).model_copy(update={"epoch": epoch})
        raise KeyboardInterrupt


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    import cluster

    fake = FakeLauncher()
    stand_in = SimpleNamespace(up=fake.up, down=fake.down, status=fake.status, watch=fake.watch)
    for module in ("launcher", "verbs"):
        monkeypatch.setitem(sys.modules, f"cluster.{module}", stand_in)
        monkeypatch.setattr(cluster, module, stand_in, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


@pytest.fixture
def spec_file(tmp_path: Path, moe_checkpoint: Callable[..., Path]) -> Path:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": str(moe_checkpoint("qwen3_moe"))}}))
    return file


def test_up_passes_overrides_and_shows_every_step(launcher: FakeLauncher, spec_file: Path):
    options = ["--set", "lanes=2", "--set", "ffn.engine.max_model_len=8", "--name", "mine"]
    options += ["--timeout", "7", "--address", "10.0.0.1:6379"]
    result = run(app, ["up", str(spec_file), *options])
    assert result.exit_code == 0, result.output
    spec, address = launcher.calls[0][1]
    assert (spec.lanes, spec.name, spec.startup_timeout_s) == (2, "mine", 7.0)
    assert spec.ffn.engine == {"max_model_len": 8}
    assert address == "10.0.0.1:6379"
    for word in ("starting Ray", "placed", "importing", "loading", "connected", "ready: http"):
        assert word in result.stdout
    assert "afflux down --name mine" in result.stdout


def test_up_refuses_a_bad_spec_before_it_launches(launcher: FakeLauncher, spec_file: Path):
    for bad in ("ffn.count=0", "ffn.cuont=1", "model.path=/nowhere", "attention.engine.nonsense=1"):
        result = run(app, ["up", str(spec_file), "--set", bad])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
    assert launcher.calls == []


def test_a_failed_start_is_an_error(launcher: FakeLauncher, spec_file: Path):
    launcher.error = AffluxError("ffn-0 died: no memory")
    result = run(app, ["up", str(spec_file)])
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: ffn-0 died: no memory"
    launcher.error = KeyError("surprise")
    result = run(app, ["up", str(spec_file)])
    assert result.exit_code == 1
    assert "KeyError: 'surprise'" in result.stderr
    assert "Traceback" not in result.stderr


def test_down_says_what_it_stopped_and_fails_when_something_stays(launcher: FakeLauncher):
    assert "1 actors stopped" in run(app, ["down"]).stdout
    ghost = run(app, ["down", "--name", "ghost"])
    assert ghost.exit_code == 0
    assert "ghost is not running" in ghost.stdout
    launcher.left = (123,)
    result = run(app, ["down"])
    assert result.exit_code == 1
    assert "123" in result.stderr


def test_status_as_table_and_as_json(launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    table = run(app, ["status"]).stdout
    for word in ("ffn-0", "0.5 CPU, 1 GiB", "3..4 x 2 layers", "3.0 MiB", "42"):
        assert word in table
    data = json.loads(run(app, ["status", "--json"]).stdout)
    assert ClusterStatus.model_validate(data).actors[0].experts == {0: 4, 1: 3}
    ghost = run(app, ["status", "--name", "ghost"])
    assert (ghost.exit_code, ghost.stderr.strip()) == (1, "error: ghost is not running")


def test_status_shows_targets_changes_and_that_devices_are_emulated(launcher: FakeLauncher):
    text = run(app, ["status"]).stdout
    for words in (
        "EMULATED DEVICES",
        "attention 0/1",
        "ffn 1/1 (1 draining)",
        "warm workers 1/2",
        "manager 4711",
        "metrics http://127.0.0.1:9464",
        "under way: change 7 (retire ffn-1): release, ",
    ):
        assert words in text


def test_status_watch_repeats_until_interrupted_and_ends_quietly(launcher: FakeLauncher):
    result = run(app, ["status", "--watch", "--interval", "0.5"])
    assert result.exit_code == 0, result.output
    assert launcher.calls[0] == ("watch", ("afflux", 0.5, None))
    assert [f"epoch {n}" in result.stdout for n in (1, 2)] == [True, True]
    assert result.stderr == ""
    lines = run(app, ["status", "-w", "--json"]).stdout.splitlines()
    assert [ClusterStatus.model_validate_json(line).epoch for line in lines] == [1, 2]
    ghost = run(app, ["status", "--watch", "--name", "ghost"])
    assert (ghost.exit_code, ghost.stderr.strip()) == (1, "error: ghost is not running")


def test_status_watch_redraws_on_a_terminal(launcher: FakeLauncher):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    reports = launcher.watch("mine", interval_s=1.0, address=None)
    watch.show(reports, console, as_json=False)
    assert "epoch 1" in out.getvalue() and "epoch 2" in out.getvalue()
    assert "\x1b[" in out.getvalue()  # moves the cursor back up


def test_the_address_may_come_from_the_environment(
    launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    run(app, ["status"])
    assert launcher.calls == [("status", ("afflux", "10.0.0.2:6379"))]


@pytest.mark.parametrize("name", ["dataplane", "decode"])
def test_bench_hands_over_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import benchmarks

    asked: list[Any] = []
    stand_in = SimpleNamespace(
        BATCHES=(1,), run=lambda json_path=None, **_: asked.append(json_path)
    )
    monkeypatch.setitem(sys.modules, f"benchmarks.{name}", stand_in)
    monkeypatch.setattr(benchmarks, name, stand_in, raising=False)
    assert run(app, ["bench", name, "--json", str(tmp_path / "r.json")]).exit_code == 0
    assert asked == [tmp_path / "r.json"]
