"""The cluster spec: what is accepted, what is refused, and how the refusal reads."""

import json
import pickle
import string
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.paths import default_spec, find_model, project_root
from cluster.spec import ClusterSpec, ResourceSpec, SpecError, load_spec, make_spec
from cluster.spec_text import parse_override, split_key, with_override

SMALLEST = {"model": {"path": "somewhere"}}


def refusal(data: Any, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        make_spec(data, overrides)
    return str(caught.value)


def test_only_the_model_is_required():
    spec = make_spec(SMALLEST)
    assert (spec.attention.count, spec.ffn.count, spec.lanes) == (1, 2, "auto")
    assert spec.served_name == "somewhere"
    assert "model" in refusal({})
    assert "is required and missing" in refusal(None)


@pytest.mark.parametrize("file", sorted((project_root() / "deploy" / "specs").glob("*.yaml")))
def test_the_specs_that_we_ship_are_valid(file: Path):
    spec = load_spec(file)
    assert make_spec(spec.model_dump()) == spec


def test_the_embedded_spec_fits_two_cores():
    spec = load_spec()
    pools = [spec.attention, spec.ffn]
    total = sum(pool.count * pool.resources.cpus for pool in pools)
    assert total + spec.frontend.replicas * spec.frontend.cpus <= 2.0
    assert default_spec().name == "embedded.yaml"


def test_a_spec_survives_pickle_json_and_yaml():
    spec = make_spec(SMALLEST, ["attention.engine.max_model_len=512", "lanes=3"])
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert ClusterSpec.model_validate_json(spec.model_dump_json()) == spec
    assert make_spec(yaml.safe_load(yaml.safe_dump(spec.model_dump()))) == spec


def test_a_spec_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make_spec(SMALLEST).ffn.count = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ffn.cuont=3", ["ffn.cuont = 3", "did you mean ffn.count?", "--set ffn.cuont=3"]),
        ("port=9000", ["port = 9000", "did you mean frontend.port"]),
        ("atention.count=1", ["atention", "did you mean attention?"]),
        ("ffn.count=0", ["ffn.count = 0", "1 or more"]),
        ("attention.count=0", ["attention.count = 0", "1 or more"]),
        ("ffn.count=-1", ["ffn.count = -1", "1 or more"]),
        ("ffn.count=2.5", ["ffn.count = 2.5", "whole number"]),
        ("ffn.count='2'", ["ffn.count = '2'", "whole number"]),
        ("ffn.count=true", ["ffn.count = true", "whole number"]),
        ("ffn.count=", ["ffn.count = null", "whole number"]),
        ("ffn.count=9", ["ffn", "count is 9", "1..8", "change count or max"]),
        ("ffn.min=3", ["count is 2", "3..8", "change count or min"]),
        ("ffn.max=0", ["ffn.max = 0", "1 or more"]),
        ("lanes=0", ["lanes = 0", "auto, or a whole number from 1 to 8"]),
        ("lanes=9", ["lanes = 9", "from 1 to 8"]),
        ("lanes=true", ["lanes = true", "from 1 to 8"]),
        ("lanes=many", ["lanes = 'many'", "from 1 to 8"]),
        ("frontend.port=0", ["frontend.port = 0", "1 or more"]),
        ("frontend.port=65536", ["frontend.port = 65536", "65535 or less"]),
        ("frontend.api_keys_env=not a name", ["api_keys_env", "not a name"]),
        ("model.dtype=int3", ["model.dtype = 'int3'", "'bfloat16'"]),
        ("model.path=''", ["model.path"]),
        ("name=Not Good", ["name = 'Not Good'"]),
        ("name=a:b", ["name = 'a:b'"]),
        ("transport.timeout_s=0", ["transport.timeout_s = 0", "more than 0"]),
        ("transport.timeout_s=.inf", ["transport.timeout_s = inf", "finite"]),
        ("slo.percentile=90", ["slo.percentile = 90", "less than 1"]),
        ("ffn.resources.gpus=1.5", ["gpus = 1.5", "whole number, or a fraction below 1"]),
        ("ffn.resources.cpus=0", ["ffn.resources", "needs some resource"]),
        ("ffn.resources.custom.GPU=1", ["GPU is Ray's own", "resources.gpus"]),
        ("ffn.resources.custom.x=0", ["custom.x = 0", "more than 0"]),
        ("ffn.labels.role=3", ["ffn.labels.role = 3", "expected text"]),
        ("ffn=2", ["ffn = 2", "mapping"]),
        ("attention.engine.model=x", ["model", "set model.path"]),
        ("attention.engine.dtype=float32", ["set model.dtype"]),
        ("attention.engine.tensor_parallel_size=2", ["change the pool's count"]),
        ("ffn.engine.worker_cls=x.Y", ["afflux brings its own worker"]),
        ("ffn.engine.load_format=dummy", ["which tensors are read"]),
        ("attention.engine.max-model-len=5", ["write max_model_len"]),
        ("frontend.engine.port=5", ["set frontend.port"]),
    ],
)
def test_a_bad_value_is_refused_with_its_path_its_value_and_the_remedy(
    override: str, words: list[str]
):
    text = refusal(SMALLEST, override)
    for word in words:
        assert word in text


def test_arguments_of_one_are_harmless():
    overrides = ["attention.engine.tensor_parallel_size=1", "ffn.engine.enable_eplb=false"]
    assert make_spec(SMALLEST, overrides).attention.engine == {"tensor_parallel_size": 1}


def test_all_problems_are_reported_at_once():
    text = refusal({"lanes": 99, "ffn": {"count": 0}, "modle": {}})
    assert all(key in text for key in ("lanes = 99", "ffn.count = 0", "modle", "model\n"))


@pytest.mark.parametrize(
    "override", ["", "=3", "ffn", "ffn..count=3", ".x=1", "ffn.count=[1", "name.x=3"]
)
def test_a_malformed_override_is_refused(override: str):
    assert f"cannot use --set {override}" in refusal({**SMALLEST, "name": "x"}, override)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "is not valid YAML"),
        ("model:\n  path: x\nmodel:\n  path: y\n", "given already in line 1"),
        ("- a\n- b\n", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("model: {path: x}\n---\nmore: 1\n", "is not valid YAML"),
        ("model: !!python/object:os.system {}\n", "is not valid YAML"),
        ("", "is required and missing"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=words) as caught:
        load_spec(file)
    assert str(file) in str(caught.value)


def test_an_unreadable_file_is_refused(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    for name, words in (("none.yaml", "No such file"), (".", "directory"), ("latin.yaml", "UTF-8")):
        with pytest.raises(SpecError, match=words):
            load_spec(tmp_path / name)


def test_a_model_is_looked_for_beside_the_spec_then_here_then_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    specs, here = tmp_path / "specs", tmp_path / "here"
    for base in (specs, here):
        (base / "m").mkdir(parents=True)
    file = specs / "s.yaml"
    file.write_text("model: {path: m}")
    monkeypatch.chdir(here)
    assert load_spec(file).model.path == str(specs / "m")
    (specs / "m").rmdir()
    assert load_spec(file).model.path == str(here / "m")
    assert find_model("deploy", file)[0] == project_root() / "deploy"
    (here / "m").rmdir()
    assert load_spec(file).model.path == "m"
    assert [place.parent for place in find_model("m", file)[1]] == [specs, here, project_root()]


def test_a_bundle_is_in_rays_words():
    made = ResourceSpec(cpus=0.5, gpus=1.0, memory_gib=2.0, custom={"afd_ffn": 1.0})
    assert made.bundle() == {"CPU": 0.5, "GPU": 1.0, "memory": 2 * 2**30, "afd_ffn": 1.0}
    assert ResourceSpec().bundle() == {"CPU": 1.0}


def test_the_schema_describes_every_key_and_accepts_our_specs():
    schema = ClusterSpec.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{name} has no description"
    for file in (project_root() / "deploy" / "specs").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    json.dumps(schema)


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += leaves(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def lookup(data: Any, dotted: str) -> Any:
    for part in split_key(dotted):
        data = data[part]
    return data


@given(st.sampled_from(leaves(ClusterSpec)))
def test_overriding_a_key_with_its_own_value_changes_nothing(key: str):
    data = make_spec(SMALLEST).model_dump()
    same = make_spec(data, [f"{key}={json.dumps(lookup(data, key))}"])
    assert same.model_dump() == data


words = st.text(string.ascii_lowercase, min_size=1, max_size=6)
values = st.one_of(
    st.integers(-(10**9), 10**9), st.booleans(), st.none(), words, st.lists(st.integers(0, 9))
)


@given(st.lists(words, min_size=1, max_size=4), values, st.dictionaries(words, values, max_size=3))
def test_an_override_sets_its_key_and_leaves_the_rest(
    key: list[str], value: Any, other: dict[str, Any]
):
    given_before = json.loads(json.dumps(other))
    path, parsed = parse_override(f"{'.'.join(key)}={json.dumps(value)}")
    assert parsed == value
    try:
        after = with_override(other, path, parsed)
    except ValueError:
        assert not isinstance(other[path[0]], dict)
        return
    assert lookup(after, ".".join(key)) == value
    assert {k: v for k, v in after.items() if k != path[0]} == {
        k: v for k, v in other.items() if k != path[0]
    }
    assert other == given_before


@given(st.recursive(values, lambda inner: st.dictionaries(words, inner, max_size=4), max_leaves=12))
def test_any_data_gives_a_spec_or_a_clear_error(data: Any):
    text = ""
    try:
        make_spec({**SMALLEST, **data} if isinstance(data, dict) else data)
    except SpecError as error:
        text = str(error)
    assert text == "" or text.startswith("the spec")


def test_label_keys_may_hold_dots():
    spec = make_spec(SMALLEST, ["ffn.labels.ray.io/market-type=spot"])
    assert spec.ffn.labels == {"ray.io/market-type": "spot"}
