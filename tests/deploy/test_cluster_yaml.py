"""Ray accepts deploy/cluster*.yaml, and they offer what the specs ask for."""

import copy
import subprocess
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

from cluster.paths import project_root
from cluster.preflight import Node, lacking, needs
from cluster.spec import load_spec

DEPLOY = project_root() / "deploy"
CLOUDS = ["cluster-aws.yaml", "cluster-gcp.yaml"]
FILES = ["cluster.yaml", *CLOUDS]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str):
    config = prepare_config(read(name))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_accepts_a_cloud_file_with_its_defaults(name: str):
    validate_config(fillout_defaults(read(name)))


def test_ray_would_refuse_a_broken_one():
    broken = copy.deepcopy(read("cluster-aws.yaml"))
    broken["available_node_types"]["ffn"]["labels"] = {"afflux.io/role": 3}
    with pytest.raises(ValidationError):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", FILES)
def test_every_command_is_valid_shell_and_the_installer_exists(name: str):
    config = read(name)
    kinds = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    commands = [c for kind in kinds for c in config.get(f"{kind}_commands", [])]
    assert any("requirements/install.sh" in command for command in commands)
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert (project_root() / "requirements" / "install.sh").stat().st_mode & 0o111


@pytest.mark.parametrize("name", CLOUDS)
def test_the_smallest_cloud_cluster_holds_the_multi_node_spec(name: str):
    nodes = [
        Node(f"{kind}-{index}", {k: float(v) for k, v in made["resources"].items()}, made["labels"])
        for kind, made in read(name)["available_node_types"].items()
        for index in range(1 if kind == "head" else made["min_workers"])
    ]
    memory = 2048.0 * 2**30  # what a node of this size has; the YAML leaves it to Ray
    nodes = [Node(n.name, {**n.resources, "memory": memory}, n.labels) for n in nodes]
    assert lacking(needs(load_spec(DEPLOY / "specs" / "multi-node.yaml")), nodes) == []
