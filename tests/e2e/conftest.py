"""One real deployment for all end-to-end tests: own Ray, real actors, real HTTP.

The embedded model over one attention and two FFN actors on free ports, started and stopped through
the launcher exactly as the command line does it. Tests that need another deployment are few and
start it themselves.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster import launcher, records
from cluster.spec import ClusterSpec, load_spec
from cluster.status import ActorEvent, ClusterHandle

KEY = "e2e-key-one"
OTHER_KEY = "e2e-key-two"
ADMIN_KEY = "e2e-admin-key"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts processes: let others leave it out (-m 'not e2e')."""
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.e2e)


def free_port() -> int:
    """A TCP port that nothing listens on, outside the range that Ray's processes pick from."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private state folder, so that tests neither see nor stop a user's deployments."""
    home = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        patch.setenv("AFFLUX_API_KEYS", f"{KEY}, {OTHER_KEY}")
        patch.setenv("AFFLUX_ADMIN_KEYS", ADMIN_KEY)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield home


@pytest.fixture(scope="session")
def spec(state_home: Path) -> ClusterSpec:
    """The embedded spec on a free port, compiled engines off: start-up time is what costs here."""
    return load_spec(
        None,
        [
            "name=e2e",
            f"frontend.port={free_port()}",
            "attention.engine.enforce_eager=true",
            "model.dtype=float32",  # tokens are compared: in float32 no two logits are ever equal
            # two cores that other machines share may leave a process waiting for seconds
            "transport.timeout_s=4",
            "membership.silence_s=8",
            "membership.wait_s=240",
            # one for the test that runs while the other gets ready for the next
            "warm_workers=2",
            "attention.max=3",
            "attention.resources.cpus=0.2",
            "ffn.max=5",
            "ffn.resources.cpus=0.2",
            "frontend.max_requests=48",
            "metrics.port=0",
            "metrics.expert_tokens=true",
            "autoscaler.mode=advise",  # watches every test, and changes nothing of its own
            "autoscaler.policy=static",
            "autoscaler.interval_s=0.5",
            "autoscaler.window_s=10",
            "autoscaler.cooldown_s=1",
            "autoscaler.shrink_cooldown_s=1",
            # A small model that may write blanks between JSON tokens writes nothing else.
            "attention.engine.structured_outputs_config={backend: xgrammar, "
            "disable_any_whitespace: true}",
        ],
    )


@pytest.fixture(scope="session")
def events() -> list[ActorEvent]:
    """What the launcher told while the shared deployment started."""
    return []


@pytest.fixture(scope="session")
def cluster(spec: ClusterSpec, events: list[ActorEvent]) -> Iterator[ClusterHandle]:
    """The shared deployment."""
    handle = launcher.up(spec, address="local", on_event=events.append)
    try:
        yield handle
    finally:
        report = launcher.down(spec.name)
        assert report.left == ()


@pytest.fixture(scope="session")
def url(cluster: ClusterHandle) -> str:
    """Where the shared deployment answers."""
    return cluster.url


@pytest.fixture(scope="session")
def model(spec: ClusterSpec) -> str:
    """The name of the served model."""
    return spec.served_name


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """The OpenAI SDK with a valid key."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=180) as sdk:
        yield sdk


@pytest.fixture
def async_client(url: str) -> openai.AsyncOpenAI:
    """The asynchronous OpenAI SDK with the other valid key."""
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=OTHER_KEY, max_retries=0, timeout=180)


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    """Plain HTTP with a valid key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=180) as plain:
        yield plain


@pytest.fixture
def in_ray(cluster: ClusterHandle) -> Iterator[None]:
    """This process is connected to the shared deployment's Ray."""
    record = records.load(cluster.name)
    assert record is not None
    with launcher.connected(record):
        yield


@pytest.fixture
def engines(in_ray: None, spec: ClusterSpec) -> Callable[[], list[dict[str, Any]]]:
    """``engines()`` -> facts about the attention actors."""
    import ray

    from cluster.manager import find_manager

    manager = find_manager(spec.name)
    assert manager is not None

    def facts() -> list[dict[str, Any]]:
        actors = ray.get(manager.members.remote(), timeout=60)["attention"].values()
        return ray.get([actor.info.remote() for actor in actors], timeout=60)

    return facts


@pytest.fixture
def running(engines: Callable[[], list[dict[str, Any]]]) -> Callable[[], int]:
    """``running()`` -> requests that the attention actors' engines hold."""
    return lambda: sum(fact["running"] + fact["waiting"] for fact in engines())


@pytest.fixture
def pids_before() -> set[int]:
    """Processes that run now."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}
