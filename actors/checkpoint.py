"""What a checkpoint on disk holds: its tensors, and which of them are routed experts.

Reads ``config.json`` and the headers of the safetensors files, never the weights, and imports
neither torch nor vLLM: opening a checkpoint of a terabyte costs milliseconds. It refuses whatever
can't be served with attention and experts apart, with a text that says what to do. Loading the
weights is the job of ``shard.py``; their meaning is known to vLLM alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import CheckpointError

NUM_EXPERTS_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "moe_num_routed_experts",
)
TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "num_activated_experts",
)
LAYER_COUNT_FIELDS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
HIDDEN_FIELDS = ("hidden_size", "d_model", "n_embd")

_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors format itself
_SAMPLE_BYTES = 4096


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: its file's name, safetensors dtype ("BF16"), shape and size."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class ExpertTensor(NamedTuple):
    """Where a routed tensor belongs. ``expert`` is None for a tensor with all experts stacked."""

    layer: int
    expert: int | None


@dataclass(frozen=True)
class Checkpoint:
    """A readable mixture-of-experts checkpoint in the Hugging Face layout.

    Args:
        path: the folder.
        config: ``config.json``, parsed.
        tensors: every tensor by name.
        experts: the routed tensors by name, of the main decoder only: layers for speculative
            decoding that the serving model does not build are left out.
        num_experts: experts of a layer; the largest number where layers differ.
        digest: hex sha256 of the configuration, the names, shapes and dtypes of all tensors, the
            sizes of the files and samples of their content. Equal digests mean the same model
            for all practical purposes: a retrained copy of equal shapes differs.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    experts: Mapping[str, ExpertTensor]
    num_experts: int
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read a checkpoint's headers and check that nothing is missing.

        Raises:
            CheckpointError: code ``missing_checkpoint`` (folder, configuration or a file),
                ``truncated_checkpoint`` (a file shorter than its header says, or an unreadable
                header), ``missing_tensors`` (an expert without tensors) or ``dense_model``.
        """
        folder = Path(path).expanduser()
        config, config_bytes = _read_config(folder)
        tensors: dict[str, TensorInfo] = {}
        digest = hashlib.sha256(config_bytes)
        for file, wanted in _weight_files(folder).items():
            found = _read_header(folder / file, digest)
            missing = sorted(wanted - found.keys())
            if missing:
                raise CheckpointError(
                    f"{folder / file}: the index expects {len(missing)} tensors that the file "
                    f"lacks, first {missing[0]!r}: download the checkpoint again",
                    code="truncated_checkpoint",
                )
            tensors.update(found)
        for name in sorted(tensors):
            info = tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())

        stated = _integer(config, NUM_EXPERTS_FIELDS)
        experts = _routed_tensors(tensors, stated, _integer(config, LAYER_COUNT_FIELDS))
        if not experts:
            raise CheckpointError(
                f"{folder} is a dense model: none of its {len(tensors)} tensors belongs to a "
                "routed expert. afflux serves mixture-of-experts models; serve this one with "
                "vLLM itself",
                code="dense_model",
            )
        held = _experts_per_layer(experts, tensors, stated)
        _check_complete(folder, held, _integer(config, NUM_EXPERTS_FIELDS, lists=False))
        return cls(
            folder, config, tensors, experts, max(map(len, held.values())), digest.hexdigest()
        )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts, sorted, by their number in the whole model."""
        return tuple(sorted({place.layer for place in self.experts.values()}))

    @property
    def top_k(self) -> int:
        """Experts per token. Raises CheckpointError (``unknown_top_k``) if nothing says so."""
        return self._need(TOP_K_FIELDS, "unknown_top_k")

    @property
    def hidden(self) -> int:
        """Width of the hidden states. Raises CheckpointError (``unknown_hidden``)."""
        return self._need(HIDDEN_FIELDS, "unknown_hidden")

    def routed(self, name: str) -> ExpertTensor | None:
        """The layer and expert of a tensor, or None when it is not a routed expert's."""
        return self.experts.get(name)

    def expert_bytes(self, layer: int, expert: int) -> int:
        """Bytes on disk of one expert of one layer."""
        return self._bytes_by_expert.get((layer, expert), 0) + self._stacked_bytes.get(layer, 0)

    @cached_property
    def _bytes_by_expert(self) -> Counter[tuple[int, int]]:
        total: Counter[tuple[int, int]] = Counter()
        for name, (layer, expert) in self.experts.items():
            if expert is not None:
                total[layer, expert] += self.tensors[name].nbytes
        return total

    @cached_property
    def _stacked_bytes(self) -> Counter[int]:
        """Bytes of one expert in each layer's stacked tensors."""
        total: Counter[int] = Counter()
        for name, (layer, expert) in self.experts.items():
            if expert is None:
                total[layer] += self.tensors[name].nbytes // self.num_experts
        return total

    def _need(self, fields: tuple[str, ...], code: str) -> int:
        value = _integer(self.config, fields)
        if value is None:
            raise CheckpointError(
                f"{self.path / 'config.json'} has none of the fields {', '.join(fields)}", code
            )
        return value


def _read_config(folder: Path) -> tuple[dict[str, Any], bytes]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: give the folder of a Hugging Face checkpoint "
            "(config.json and *.safetensors)",
            code="missing_checkpoint",
        )
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is no Hugging Face checkpoint, or its download "
            "did not finish",
            code="missing_checkpoint",
        )
    raw = file.read_bytes()
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", "truncated_checkpoint") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds {type(config).__name__}, not an object")
    return config, raw


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """File name -> tensors that the index expects in it (empty set: there is no index)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{index} is not an index of safetensors files: {error!r}", "truncated_checkpoint"
            ) from error
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, set()).add(name)
    elif (folder / "model.safetensors").is_file():
        files = {"model.safetensors": set()}
    else:
        files = {file.name: set() for file in sorted(folder.glob("*.safetensors"))}
    missing = [file for file in sorted(files) if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that its index "
            f"names, first {missing[0]!r}: download the checkpoint again",
            code="missing_checkpoint",
        )
    if not files:
        others = sorted(file.name for file in folder.glob("*.bin"))
        hint = f" (found {others[0]}: convert it to safetensors)" if others else ""
        raise CheckpointError(
            f"{folder} has no *.safetensors file{hint}", code="missing_checkpoint"
        )
    return dict(sorted(files.items()))


def _read_header(file: Path, digest: Any) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; adds its size and samples of it to the digest."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(size - 8, _MAX_HEADER_BYTES):
            why = "a git-lfs pointer, not the file itself" if start == b"version " else "truncated"
            raise CheckpointError(
                f"{file} is {why} ({size} bytes): download the checkpoint again",
                code="truncated_checkpoint",
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(file.name, entry["dtype"], tuple(entry["shape"]), end - begin)
                for name, entry in header.items()
                for begin, end in [entry["data_offsets"]]
            }
            ends = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} has an unreadable header ({error!r}): download the checkpoint again",
                code="truncated_checkpoint",
            ) from error
        expected = 8 + length + ends
        if size != expected:
            raise CheckpointError(
                f"{file} is {size} bytes long, its header says {expected}: "
                "download the checkpoint again",
                code="truncated_checkpoint",
            )
        digest.update(f"{file.name} {size}\n".encode())
        for position in (8 + length, (8 + length + size) // 2, size - _SAMPLE_BYTES):
            stream.seek(max(position, 0))
            digest.update(stream.read(_SAMPLE_BYTES))
    return tensors


def _integer(config: Mapping[str, Any], fields: tuple[str, ...], lists: bool = True) -> int | None:
    """The first of the fields that holds a positive integer, nested configurations included.

    A list with one number per layer counts as its largest, unless ``lists`` is False.
    """
    for part in _nested(config):
        for field in fields:
            value = part.get(field)
            if lists and isinstance(value, list):
                value = max((v for v in value if isinstance(v, int)), default=None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    # The text model's part first: a vision tower may have layers and experts of its own.
    for key in sorted(config, key=lambda key: "text" not in key):
        if isinstance(config[key], dict):
            yield from _nested(config[key])


def _routed_tensors(
    tensors: Mapping[str, TensorInfo], num_experts: int | None, layers: int | None
) -> dict[str, ExpertTensor]:
    by_stack: dict[str, dict[str, ExpertTensor]] = {}
    for name, info in tensors.items():
        placed = _place(name, info, num_experts)
        if placed is not None and (layers is None or placed[1].layer < layers):
            by_stack.setdefault(placed[0], {})[name] = placed[1]
    # Several stacks of layers (a draft model beside the main one): the deepest is the decoder.
    return max(
        by_stack.values(), key=lambda stack: len({p.layer for p in stack.values()}), default={}
    )


def _place(name: str, info: TensorInfo, num_experts: int | None) -> tuple[str, ExpertTensor] | None:
    """(path of the stack of layers, layer and expert) of a routed tensor, else None."""
    parts = name.split(".")
    if "experts" in parts:
        at = parts.index("experts")
        follows = parts[at + 1] if at + 1 < len(parts) else ""
        expert = int(follows) if follows.isdecimal() else None
        # A vector of all experts is a routing bias, which belongs to the router, unless a scale.
        if expert is None and len(info.shape) < 2 and not re.search("scale", follows):
            return None
    elif len(info.shape) == 3 and info.shape[0] == num_experts and min(info.shape[1:]) > 1:
        at, expert = len(parts), None  # stacked experts under a name of the family's own
    else:
        return None
    layer_at = next((i for i in range(at) if parts[i].isdecimal()), None)
    if layer_at is None:
        return None
    return ".".join(parts[:layer_at]), ExpertTensor(int(parts[layer_at]), expert)


def _experts_per_layer(
    experts: Mapping[str, ExpertTensor], tensors: Mapping[str, TensorInfo], stated: int | None
) -> dict[int, set[int]]:
    held: dict[int, set[int]] = {}
    for name, (layer, expert) in experts.items():
        if expert is not None:
            held.setdefault(layer, set()).add(expert)
        else:
            shape = tensors[name].shape
            held.setdefault(layer, set()).update(range(stated or shape[0]))
    return held


def _check_complete(folder: Path, held: Mapping[int, set[int]], stated: int | None) -> None:
    for layer, found in sorted(held.items()):
        missing = sorted(set(range(stated or max(found) + 1)) - found)
        if missing:
            raise CheckpointError(
                f"{folder}: layer {layer} has no tensors for experts {missing}: "
                "download the checkpoint again",
                code="missing_tensors",
            )
