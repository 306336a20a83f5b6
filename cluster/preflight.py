"""Door checks: everything that can be refused in a second, before any process is started.

Imports neither vLLM nor Ray: vLLM's argument names are read from its source, and Ray's nodes come
in as plain data. What only a running engine can know (does the model fit) is found out later by
the actors themselves.
"""

import ast
import difflib
import importlib.util
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from actors.checkpoint import Checkpoint
from cluster.paths import find_model
from cluster.spec import ROLES, ClusterSpec, SpecError

# Where vLLM declares its arguments: file below the package, classes whose fields are the names.
ENGINE_ARGS = ("engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
SERVER_ARGS = ("entrypoints/launchers/cli_args.py", ("BaseFrontendArgs", "FrontendArgs"))


class LackingResources(SpecError):
    """The Ray cluster can't hold the deployment; the text says what is lacking and how much."""

    code = "lacking_resources"


class PortInUse(SpecError):
    """Something else listens on the frontend's port."""

    code = "port_in_use"


@dataclass(frozen=True)
class Need:
    """What one actor or replica reserves on one node.

    Args:
        what: who needs it, such as ``ffn-0``.
        resources: Ray resource names and amounts (memory in bytes).
        labels: the node's label selector.
    """

    what: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster with what it has left to give, names as in ``Need``."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def check_model(spec: ClusterSpec, spec_file: Path | None = None) -> Checkpoint:
    """The checkpoint is there, complete, a mixture of experts, and has an expert per FFN actor.

    Raises:
        SpecError: no such folder (lists the places tried), or more FFN actors than experts.
        CheckpointError: see ``Checkpoint.open``.
    """
    found, tried = find_model(spec.model.path, spec_file)
    if found is None:
        places = "".join(f"\n  tried {place}" for place in tried)
        raise SpecError(
            f"there is no model folder {spec.model.path}{places}\nset model.path to a folder with "
            "config.json, *.safetensors and a tokenizer",
            code="missing_checkpoint",
        )
    checkpoint = Checkpoint.open(found)
    if spec.ffn.count > checkpoint.num_experts:
        raise SpecError(
            f"ffn.count is {spec.ffn.count}, but {found} has {checkpoint.num_experts} experts per "
            f"layer, and an FFN actor needs one at least: set ffn.count to "
            f"{checkpoint.num_experts} or less",
            code="too_many_ffn_actors",
        )
    return checkpoint


def check_port(host: str, port: int) -> None:
    """Nothing listens on ``host:port`` yet and the address is one of this machine's.

    Raises:
        PortInUse: another program has it.
        SpecError: the address can't be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise SpecError(
                f"frontend.host is {host!r}, which is no address ({error.strerror}); "
                "expected 127.0.0.1, 0.0.0.0 or an address of this machine"
            ) from None
        if isinstance(error, PermissionError):
            raise SpecError(
                f"not allowed to listen on {host}:{port}; use a port from 1024 up "
                "(--set frontend.port=8001)"
            ) from None
        raise PortInUse(
            f"cannot listen on {host}:{port}: {error.strerror}. Another program has the port, or "
            "the address is not this machine's; try --set frontend.port=8001"
        ) from None


def check_engine_args(spec: ClusterSpec) -> None:
    """The names under ``engine`` are arguments of the vLLM that is installed.

    Values are checked by vLLM itself when it builds its configuration. Without vLLM nothing is
    checked.

    Raises:
        SpecError: names the argument and the nearest that exists.
    """
    sections = [
        ("attention.engine", spec.attention.engine, ENGINE_ARGS),
        ("ffn.engine", spec.ffn.engine, ENGINE_ARGS),
        ("frontend.engine", spec.frontend.engine, SERVER_ARGS),
    ]
    for section, given, (file, classes) in sections:
        known = _declared_fields(file, classes) if given else frozenset()
        for name in given:
            if known and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SpecError(f"{section}.{name}: vLLM has no such argument{hint}")


def needs(spec: ClusterSpec) -> list[Need]:
    """What the deployment reserves at start: one entry per actor and per frontend replica."""
    wanted = [
        Need(f"{role}-{index}", spec.pool(role).resources.bundle(), spec.pool(role).labels)
        for role in ROLES
        for index in range(spec.pool(role).count)
    ]
    if spec.frontend.cpus:
        replicas = range(spec.frontend.replicas)
        cpus = {"CPU": spec.frontend.cpus}
        wanted += [Need(f"frontend-{index}", cpus, spec.frontend.labels) for index in replicas]
    return wanted


def lacking(wanted: Sequence[Need], nodes: Sequence[Node]) -> list[str]:
    """What the nodes lack to hold ``wanted``; empty when all of it fits.

    First the totals are compared, since "2 more GPUs" is the more useful answer; then every need
    is given a node, largest first: exact for equal needs, greedy (as Ray is) for a mixture.

    Returns:
        one line per resource or actor, such as ``GPU: 8 needed, 6 free, 2 lacking``.
    """
    totals: dict[str, tuple[float, float]] = {}
    for name in sorted({name for need in wanted for name in need.resources}):
        needed = sum(need.resources.get(name, 0.0) for need in wanted)
        totals[name] = (needed, sum(node.resources.get(name, 0.0) for node in nodes))
    lines = [
        f"{name}: {_amount(name, needed)} needed, {_amount(name, free)} free, "
        f"{_amount(name, needed - free)} lacking"
        for name, (needed, free) in totals.items()
        if needed > free + 1e-6
    ]
    if lines:
        return lines
    left = [dict(node.resources) for node in nodes]
    for need in sorted(wanted, key=lambda n: (bool(n.labels), *_size(n, totals)), reverse=True):
        place = next(
            (
                free
                for node, free in zip(nodes, left, strict=True)
                if labels_match(need.labels, node.labels)
                and all(free.get(k, 0.0) + 1e-6 >= v for k, v in need.resources.items())
            ),
            None,
        )
        if place is None:
            lines.append(_homeless(need, nodes))
            continue
        for name, amount in need.resources.items():
            place[name] = place.get(name, 0.0) - amount
    return lines


def _homeless(need: Need, nodes: Sequence[Node]) -> str:
    asked = ", ".join(f"{_amount(k, v)} {k}" for k, v in need.resources.items())
    if need.labels and not any(labels_match(need.labels, node.labels) for node in nodes):
        wanted = ", ".join(f"{k}={v}" for k, v in need.labels.items())
        return f"{need.what}: no node has the labels {wanted}"
    return f"{need.what}: no single node has {asked} left, though together they have"


def _size(need: Need, totals: Mapping[str, tuple[float, float]]) -> tuple[float, ...]:
    """Sort key: the scarcest resource first, as a share of what there is."""
    return tuple(
        sorted((v / max(totals[k][1], 1e-9) for k, v in need.resources.items()), reverse=True)
    )


def labels_match(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Ray's label selectors: ``value``, ``!value``, ``in(a, b)``, ``!in(a, b)``."""
    for key, rule in selector.items():
        positive = not rule.startswith("!")
        rule = rule.removeprefix("!")
        if rule.startswith("in(") and rule.endswith(")"):
            allowed = {value.strip() for value in rule[3:-1].split(",")}
        else:
            allowed = {rule}
        if (labels.get(key) in allowed) != positive:
            return False
    return True


def _amount(name: str, value: float) -> str:
    if name == "memory":
        return f"{value / 2**30:.1f} GiB"
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"


@cache
def _declared_fields(file: str, classes: tuple[str, ...]) -> frozenset[str]:
    """Field names of vLLM's dataclasses, read from its source: importing vLLM takes 6 seconds."""
    package = importlib.util.find_spec("vllm")
    folders = list(package.submodule_search_locations or []) if package else []
    source = next((path for f in folders if (path := Path(f) / file).is_file()), None)
    if source is None:
        return frozenset()
    return frozenset(
        statement.target.id
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
