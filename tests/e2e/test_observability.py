"""A real Prometheus reads a real deployment, and every expression that we ship is asked of it.

On the shared deployment, which is left as it was found: one attention and two FFN actors. What only
errors fill is filled by causing the error. Nothing here looks at Grafana: a real one was not
available where this was built (``tests/dashboards`` checks dashboards and pushes).
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cluster as cluster_package
from actors.metrics import catalogue
from cluster import launcher
from cluster.spec import ClusterSpec
from cluster.status import ClusterHandle
from dashboards import local
from dashboards.ask import get
from dashboards.expressions import ERRORS_ONLY, NEEDS_GPU, expressions, only_errors_fill
from tests.e2e.conftest import KEY
from tests.e2e.streams import Streams
from tests.e2e.test_elastic import Deployment, until

RULES = Path(cluster_package.__file__).parent.parent / "deploy" / "prometheus"
NO_CAUSE = {
    ("annotation", "Alerts"): "promtool's test cases make every alert fire",
    ("panel", "Exceptions in replicas"): "no way is known to make one leave our replica",
}
"""What this test can't cause, and why."""

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def discovery(cluster: ClusterHandle, spec: ClusterSpec) -> str:
    """The manager's service discovery."""
    url = launcher.status(spec.name).metrics_url
    assert url is not None
    return f"{url}/sd"


@pytest.fixture(scope="module")
def prometheus(discovery: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Our configuration, rules and alerts in a real Prometheus that looks every second."""
    try:
        local.executable()
    except local.NoPrometheus as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(RULES, folder / "deploy")
    template = folder / "deploy" / "prometheus.yml"
    text = template.read_text(encoding="utf-8")
    for slow, quick in (
        ("evaluation_interval: 15s", "evaluation_interval: 3s"),
        ("refresh_interval: 5s", "refresh_interval: 1s"),
    ):
        assert slow in text
        text = text.replace(slow, quick)
    template.write_text(text, encoding="utf-8")
    for rules in (folder / "deploy").glob("*.rules.yml"):
        rules.write_text(rules.read_text(encoding="utf-8").replace("interval: 15s", "interval: 3s"))
    running = local.start(folder / "data", template, discovery, port=0)
    try:
        yield running.url
    finally:
        local.stop(folder / "data")


@pytest.fixture(scope="module")
def deployment(cluster: ClusterHandle, spec: ClusterSpec) -> Deployment:
    return Deployment(cluster, spec)


@pytest.fixture(scope="module")
def history(prometheus: str, discovery: str, deployment: Deployment) -> Iterator[str]:
    """Traffic, changes of the ratio, a lost actor of each role, and refusals."""
    first(prometheus, discovery, deployment)
    deployment.warm(2)  # here and below: imports beside traffic take minutes on two cores
    with traffic(deployment):
        grown = launcher.scale(deployment.name, attention=2, ffn=3)
        assert grown.phase == "done", grown
    for role in ("ffn", "attention"):
        deployment.warm()
        with traffic(deployment):
            before = losses(prometheus)
            deployment.process(deployment.actors(role)[0]).kill()
            until(lambda n=before: losses(prometheus) > n, "a loss is seen")
            deployment.until_whole("whole again")
    asyncio.run(crowd(deployment))
    yield prometheus
    shrunk = launcher.scale(deployment.name, attention=1, ffn=2)
    assert shrunk.phase in ("done", "noop"), shrunk
    deployment.until_whole("back to 1A2F")


def first(prometheus: str, discovery: str, deployment: Deployment) -> None:
    """Wait until Prometheus has read every process that there is."""
    deployment.until_whole("whole")
    # a frontend, the manager and the controller besides
    until(lambda: len(listed(discovery)) == len(deployment.status().actors) + 3, "all are listed")
    until(lambda: read(prometheus) == listed(discovery), "all that are listed are read")


def listed(discovery: str) -> set[str]:
    """Processes of ours that the manager tells Prometheus of, as ``host:port``."""
    groups = httpx.get(discovery, timeout=10).json()
    return {
        target
        for group in groups
        if group["labels"]["job"] == "afflux"
        for target in group["targets"]
    }


def read(prometheus: str) -> set[str]:
    """Processes of ours that Prometheus could read at its last attempt, as ``host:port``."""
    series = asked(prometheus, 'up{job="afflux"} == 1')
    return {one["metric"]["instance"] for one in series}


def traffic(deployment: Deployment) -> Streams:
    return deployment.streams(again=True, tokens=40)


async def crowd(deployment: Deployment) -> None:
    """More requests than are taken, and one from a stranger."""
    body = {"model": deployment.spec.served_name, "prompt": "The sea", "max_tokens": 20}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=deployment.url, timeout=180, limits=limits) as http:
        headers = {"Authorization": f"Bearer {KEY}"}
        answers = await asyncio.gather(
            *(http.post("/v1/completions", json=body, headers=headers) for _ in range(80)),
            http.post("/v1/completions", json=body, headers={"Authorization": "Bearer none"}),
        )
    assert {answer.status_code for answer in answers} == {200, 401, 429}


def asked(prometheus: str, expression: str) -> list[dict]:
    """Series of an instant query."""
    return get(prometheus, "/api/v1/query", {"query": expression})["result"]


def losses(prometheus: str) -> float:
    series = asked(prometheus, "sum(afd_actors_lost_total)")
    return float(series[0]["value"][1]) if series else 0.0


def test_every_expression_gives_data(history: str) -> None:
    """Panels, variables, annotations, rules, alerts; alerts need only be understood."""
    empty: list[str] = []
    deadline = time.monotonic() + 60
    for one in expressions():
        place = (one.kind, one.place)
        if place in NEEDS_GPU or place in NO_CAUSE:
            asked(history, one.expr)  # it is understood at least
            continue
        while not asked(history, one.expr) and one.kind != "alert":
            if time.monotonic() > deadline:
                empty.append(f"{one.source} {one.kind} {one.place}: {one.expr}")
                break
            time.sleep(0.5)
    assert not empty, "\n".join(empty)


def test_errors_that_fill_panels_were_caused(history: str) -> None:
    listed = {(one.kind, one.place) for one in expressions() if only_errors_fill(one)}
    left = {place for place in ERRORS_ONLY if place not in NO_CAUSE}
    assert left <= listed
    for one in expressions():
        if (one.kind, one.place) in left:
            until(lambda one=one: asked(history, one.expr) != [], f"{one.place} has data")


def test_every_metric_that_we_export_is_there(history: str) -> None:
    """And no other of our prefix: what the catalogue lists and what is exported are the same."""
    names = set(get(history, "/api/v1/label/__name__/values"))
    ours = {name for name in names if name.startswith("afd_")}
    wanted: set[str] = set()
    for metric in catalogue.METRICS:
        if metric.kind == "histogram":
            wanted |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            wanted.add(metric.name)
    assert ours == wanted


def test_figures_agree_with_what_was_served(
    history: str, discovery: str, deployment: Deployment
) -> None:
    """Tokens are counted exactly, once, whatever happened to actors meanwhile."""

    def total(name: str) -> float:
        return sum(float(series["value"][1]) for series in asked(history, f"sum({name})"))

    before = scraped(discovery, "afd_generation_tokens_total")
    with deployment.streams(tokens=33) as streams:
        pass
    made = sum(len(tokens) for _, tokens in streams.tokens)
    after = scraped(discovery, "afd_generation_tokens_total")
    assert after - before == made
    until(lambda: total("afd_generation_tokens_total") == after, "Prometheus has it too")
    quantile = "histogram_quantile(0.5, sum by (le) (rate(afd_{}_seconds_bucket[5m])))"
    ttft = float(asked(history, quantile.format("time_to_first_token"))[0]["value"][1])
    e2e = float(asked(history, quantile.format("e2e_request_latency"))[0]["value"][1])
    assert 0 < ttft < e2e < 60


def scraped(discovery: str, name: str) -> float:
    """Sum of a counter over the frontends, read from them and not from Prometheus."""
    total = 0.0
    for page in pages(discovery):
        for family in text_string_to_metric_families(httpx.get(page, timeout=10).text):
            total += sum(s.value for s in family.samples if s.name == name)
    return total


def pages(discovery: str, path: str = "/metrics") -> list[str]:
    """Addresses of the pages of this deployment's processes."""
    groups = httpx.get(discovery, timeout=10).json()
    return [
        f"http://{target}{path}"
        for group in groups
        if group["labels"].get("__metrics_path__", "/metrics") == path
        and group["labels"]["job"] != "ray"
        for target in group["targets"]
    ]


def test_vllms_own_metrics_keep_their_names(history: str, discovery: str) -> None:
    (page,) = pages(discovery, "/vllm/metrics")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = httpx.get(page, headers=accept, timeout=10).text
    assert "vllm:time_to_first_token_seconds_bucket" in text
    assert asked(history, "vllm:generation_tokens_total") != []


def test_scrapes_never_fail_while_the_ratio_changes(
    history: str, discovery: str, deployment: Deployment
) -> None:
    """Every page that is listed, over and over; who was retired is gone from Prometheus in 15 s."""
    failures: list[str] = []
    ended = threading.Event()

    def read() -> None:
        with httpx.Client(timeout=10) as http:
            while not ended.is_set():
                for page in pages(discovery):
                    try:
                        http.get(page).raise_for_status()
                    except httpx.HTTPError as error:
                        if page in pages(discovery):  # it has not left meanwhile
                            failures.append(f"{page}: {error!r}")
                ended.wait(0.2)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with traffic(deployment):
            assert launcher.scale(deployment.name, ffn=3).phase in ("done", "noop")
            gone = deployment.actors("ffn")[0].name
            pid = deployment.process(deployment.actors("ffn")[0]).pid
            assert launcher.retire(deployment.name, gone).phase == "done"
            until(lambda: not psutil.pid_exists(pid), "its process has ended")
            series = f'{{__name__=~"afd_.+", actor_id="{gone}"}}'
            until(lambda: asked(history, series) == [], "its series are gone", seconds=15)
    finally:
        ended.set()
        reader.join()
    assert not failures
