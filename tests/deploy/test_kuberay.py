"""Manifests for Kubernetes against their schemas, and against what the specs in them ask for.

Kubernetes' own objects by kubernetes-validate, strictly (unknown fields are refused). KubeRay's and
the Prometheus operator's by ``schemas.py``: the fields that we use, by their documentation.
"""

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.app import build
from cluster.paths import project_root
from cluster.preflight import Node, lacking, needs
from cluster.spec import ClusterSpec, load_spec, make_spec
from tests.deploy import schemas

FOLDER = project_root() / "deploy" / "kuberay"
KUBERNETES = "1.34"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def check(document: dict[str, Any]) -> None:
    """Raises what the first schema that does not hold raises."""
    schema = schemas.OF.get((document["apiVersion"], document["kind"]))
    if schema is None:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)
    for group in groups(document):
        template = group["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def ray_cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterConfig", spec)


def groups(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = ray_cluster(document)
    if "headGroupSpec" in spec:
        yield spec["headGroupSpec"]
        yield from spec["workerGroupSpecs"]


@pytest.mark.parametrize("name", FILES)
def test_every_document_has_a_valid_schema(name: str):
    for document in read(name):
        check(document)


def spoil_top(found: dict[str, Any]) -> None:
    found["spec"]["rayClusterConfig"]["workerGroupSpec"] = []


def spoil_label(found: dict[str, Any]) -> None:
    found["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["labels"] = {"role": 3}


def spoil_resource(found: dict[str, Any]) -> None:
    found["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["resources"]["afd_attention"] = 8


def spoil_pod(found: dict[str, Any]) -> None:
    head = found["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    head["resource"] = head.pop("resources")


@pytest.mark.parametrize("spoil", [spoil_top, spoil_label, spoil_resource, spoil_pod])
def test_a_mistake_is_found(spoil):
    (found,) = copy.deepcopy(read("rayservice.yaml"))
    spoil(found)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(found)


def serve_config() -> dict[str, Any]:
    (service,) = read("rayservice.yaml")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def test_ray_serve_takes_the_configuration():
    from ray.serve.schema import ServeDeploySchema

    for text in (serve_config(), yaml.safe_load((FOLDER.parent / "docker/serve.yaml").read_text())):
        found = ServeDeploySchema.model_validate(text)
        (application,) = found.applications
        assert application.import_path == f"{build.__module__}:{build.__name__}"
        assert found.http_options.host == "0.0.0.0"


def specs() -> dict[str, ClusterSpec]:
    (application,) = serve_config()["applications"]
    return {
        "rayservice.yaml": make_spec(application["args"]["spec"], []),
        "raycluster.yaml": load_spec(FOLDER.parent / "specs" / "several-hosts.yaml"),
    }


@pytest.mark.parametrize("name", ["rayservice.yaml", "raycluster.yaml"])
def test_the_smallest_cluster_holds_the_spec(name: str):
    (document,) = read(name)
    cluster = ray_cluster(document)
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    cpus = float(head["rayStartParams"].get("num-cpus", 2))
    nodes = [Node("head", {"CPU": cpus, "memory": 2.0**34}, head["labels"])]
    for group in cluster["workerGroupSpecs"]:
        resources = {key: float(value) for key, value in group["resources"].items()}
        resources.setdefault("memory", 2.0**32)
        nodes += [
            Node(f"{group['groupName']}-{index}", resources, group["labels"])
            for index in range(group["replicas"])
        ]
    spec = specs()[name]
    assert lacking(needs(spec), nodes) == []
    # every port that something listens on has a name in the head's pod
    ports = {port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert {spec.frontend.port, spec.metrics.port} <= ports
    assert spec.metrics.host == spec.frontend.host == "0.0.0.0"


def test_what_ray_is_told_of_a_pod_is_what_the_pod_has():
    (document,) = read("rayservice.yaml")
    for group in ray_cluster(document)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["resources"]["CPU"] == limits["cpu"]
        assert group["resources"]["GPU"] == limits["nvidia.com/gpu"]
        assert int(group["resources"]["memory"]) == int(limits["memory"][:-2]) << 30


def test_versions_are_those_that_are_installed():
    import ray

    for name in ("rayservice.yaml", "raycluster.yaml"):
        assert ray_cluster(read(name)[0])["rayVersion"] == ray.__version__
