"""Door checks: what is refused before anything starts, and how quickly."""

import dataclasses
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import CheckpointError
from cluster import preflight
from cluster.preflight import Need, Node, PortInUse, lacking
from cluster.spec import ClusterSpec, SpecError, make_spec


def spec_for(path: Path | str, *overrides: str) -> ClusterSpec:
    return make_spec({"model": {"path": str(path)}}, overrides)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_good_spec_passes(moe_checkpoint: Callable[..., Path]):
    spec = spec_for(moe_checkpoint("qwen3_moe"))
    assert preflight.check_model(spec).num_experts >= spec.ffn.count


def test_a_missing_model_names_the_places_tried(tmp_path: Path):
    with pytest.raises(SpecError) as caught:
        preflight.check_model(spec_for("nowhere/at-all"), tmp_path / "s.yaml")
    assert str(tmp_path / "nowhere/at-all") in str(caught.value)
    assert caught.value.code == "missing_checkpoint"


def test_an_empty_folder_and_a_dense_model_are_refused(tmp_path: Path, dense_checkpoint: Path):
    with pytest.raises(CheckpointError):
        preflight.check_model(spec_for(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        preflight.check_model(spec_for(dense_checkpoint))
    assert caught.value.code == "dense_model"


def test_more_ffn_actors_than_experts_names_both(moe_checkpoint: Callable[..., Path]):
    folder = moe_checkpoint("qwen3_moe")
    experts = preflight.check_model(spec_for(folder)).num_experts
    limits = [f"ffn.max={experts + 1}", f"ffn.count={experts + 1}"]
    with pytest.raises(SpecError) as caught:
        preflight.check_model(spec_for(folder, *limits))
    assert f"ffn.count is {experts + 1}" in str(caught.value)
    assert f"{experts} experts" in str(caught.value)
    limits[1] = f"ffn.count={experts}"
    preflight.check_model(spec_for(folder, *limits))


def test_a_taken_port_is_refused(taken_port: int, free_port: int):
    preflight.check_port("127.0.0.1", free_port)
    with pytest.raises(PortInUse, match=f"127.0.0.1:{taken_port}"):
        preflight.check_port("127.0.0.1", taken_port)
    with pytest.raises(PortInUse):
        preflight.check_port("0.0.0.0", taken_port)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(SpecError, match="no address"):
        preflight.check_port("no such host", 8000)
    with pytest.raises(SpecError, match=r"192\.0\.2\.1:8000"):
        preflight.check_port("192.0.2.1", 8000)


def test_engine_arguments_must_be_known_to_vllm():
    pytest.importorskip("vllm.version")
    good = ["attention.engine.max_model_len=64", "frontend.engine.enable_auto_tool_choice=true"]
    preflight.check_engine_args(spec_for("x", *good))
    with pytest.raises(SpecError, match="did you mean max_model_len"):
        preflight.check_engine_args(spec_for("x", "attention.engine.max_modl_len=64"))
    with pytest.raises(SpecError, match=r"ffn\.engine\.nonsense_xyz: vLLM has no such argument"):
        preflight.check_engine_args(spec_for("x", "ffn.engine.nonsense_xyz=1"))


def test_arguments_read_from_source_are_those_that_vllm_declares():
    arguments = pytest.importorskip("vllm.engine.arg_utils")
    declared = {field.name for field in dataclasses.fields(arguments.AsyncEngineArgs)}
    assert preflight._declared_fields(*preflight.ENGINE_ARGS) == declared


def test_door_checks_import_neither_vllm_nor_ray(moe_checkpoint: Callable[..., Path]):
    code = (
        "import sys; from cluster import preflight; from cluster.spec import make_spec;"
        f"spec = make_spec({{'model': {{'path': {str(moe_checkpoint('qwen3_moe'))!r}}}}},"
        "['attention.engine.max_model_len=64']);"
        "preflight.check_engine_args(spec); preflight.check_model(spec);"
        "print([m for m in ('vllm', 'ray', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_needs_count_every_actor_and_replica():
    spec = spec_for(
        "x", "attention.count=2", "frontend.replicas=2", "ffn.labels.a=b", "frontend.labels.a=c"
    )
    wanted = preflight.needs(spec)
    names = [need.what for need in wanted]
    assert names == ["attention-0", "attention-1", "ffn-0", "ffn-1", "frontend-0", "frontend-1"]
    assert wanted[2] == Need("ffn-0", {"CPU": 1.0}, {"a": "b"})
    assert wanted[4] == Need("frontend-0", {"CPU": 0.25}, {"a": "c"})


def test_lacking_resources_say_which_and_how_many():
    spec = spec_for("x", "ffn.resources.gpus=1", "ffn.count=4", "ffn.resources.memory_gib=8")
    nodes = [Node("a", {"CPU": 16.0, "GPU": 1.0, "memory": 20.0 * 2**30})]
    assert lacking(preflight.needs(spec), nodes) == [
        "GPU: 4 needed, 1 free, 3 lacking",
        "memory: 32.0 GiB needed, 20.0 GiB free, 12.0 GiB lacking",
    ]
    none = lacking(preflight.needs(spec_for("x")), [])
    assert none == ["CPU: 3.25 needed, 0 free, 3.25 lacking"]


def test_enough_in_all_but_on_no_single_node():
    nodes = [Node(str(index), {"CPU": 1.0}) for index in range(4)]
    assert lacking([Need("attention-0", {"CPU": 2.0})], nodes) == [
        "attention-0: no single node has 2 CPU left, though together they have"
    ]


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ("ffn", True),
        ("attention", False),
        ("!attention", True),
        ("!ffn", False),
        ("in(ffn, x)", True),
        ("in(x)", False),
        ("!in(x)", True),
        ("!in(x,ffn)", False),
    ],
)
def test_label_selectors(rule: str, fits: bool):
    nodes = [Node("a", {"CPU": 1.0}, {"role": "ffn"})]
    lines = lacking([Need("ffn-0", {"CPU": 1.0}, {"role": rule})], nodes)
    assert lines == ([] if fits else [f"ffn-0: no node has the labels role={rule}"])


amounts = st.integers(0, 8).map(lambda quarters: quarters / 4)
resources = st.dictionaries(st.sampled_from(["CPU", "GPU", "x"]), amounts, max_size=3)


@given(st.lists(resources, max_size=5), st.lists(resources, max_size=4))
def test_what_is_reported_is_really_lacking(wanted: list[dict], given_nodes: list[dict]):
    needs = [Need(f"ffn-{index}", each) for index, each in enumerate(wanted)]
    nodes = [Node(str(index), each) for index, each in enumerate(given_nodes)]
    lines = lacking(needs, nodes)
    over = {
        name
        for name in ("CPU", "GPU", "x")
        if sum(n.get(name, 0) for n in wanted) > sum(n.get(name, 0) for n in given_nodes)
    }
    assert {line.split(":")[0] for line in lines if "lacking" in line} == over
    if not wanted:
        assert lines == []


@given(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_equal_needs_are_packed_exactly(count: int, nodes: list[int]):
    room = sum(cpus // 2 for cpus in nodes)
    needs = [Need(f"ffn-{index}", {"CPU": 2.0}) for index in range(count)]
    lines = lacking(needs, [Node(str(i), {"CPU": float(cpus)}) for i, cpus in enumerate(nodes)])
    if 2 * count > sum(nodes):
        assert len(lines) == 1
    else:
        assert len(lines) == max(0, count - room)
