"""The experts that one FFN actor holds, and their part of a mixture-of-experts layer.

A shard holds any subset of the experts of any layers, and what it holds may change while it
computes. It returns weighted partial sums; adding up the parts of several shards gives the layer's
routed output. It keeps no state between calls and knows nothing of frames, peers or requests.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from actors.checkpoint import Checkpoint
from actors.errors import FrameError, UnsupportedModel
from actors.expert_rows import NotByRow, chosen, forget, joined, rows_of, with_rows
from actors.local_experts import (
    LocalExperts,
    allocated_bytes,
    bare_kernel,
    build_experts,
    engine_config,
    kernel_lock,
)
from actors.weights import fingerprint

Experts = Mapping[int, Sequence[int]]

_PROBES = 4
_SWITCH_INTERVAL_S = 1e-4


class ExpertShard:
    """Loaded experts, ready to compute.

    Args:
        model: folder of the checkpoint.
        experts: layer -> global ids of the experts to hold; ids are kept in the given order.
        dtype: torch dtype name of the activations ("bfloat16"), or "auto" as vLLM takes it.
        engine_args: further engine arguments for vLLM, such as ``quantization``.
        threads: torch threads to compute with; None leaves the process as it is.
        device: "cpu" or a CUDA device.

    Raises:
        CheckpointError, UnsupportedModel: see ``Checkpoint.open`` and ``build_experts``.
        ValueError: a layer or expert that the model does not have, or one given twice.
    """

    def __init__(
        self,
        model: str,
        experts: Experts,
        *,
        dtype: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ):
        self.checkpoint = Checkpoint.open(model)
        experts = _checked(self.checkpoint, experts)
        self.device = torch.device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self._config = engine_config(self.checkpoint, dtype, engine_args or {}, self.device)
        self.dtype: torch.dtype = self._config.model_config.dtype  # pyright: ignore[reportAttributeAccessIssue]
        self._changing = threading.Lock()
        self._blank: dict[int, LocalExperts] = {}
        self._layers = {
            layer: self._layer(module) for layer, module in self._build(experts).items()
        }
        self.num_experts = self.checkpoint.num_experts
        """Experts of a layer of the model."""
        self.hidden, self.top_k = self._widths()
        """Width H of the hidden states, and experts per token."""

    def _widths(self) -> tuple[int, int]:
        module = next((layer.module for layer in self._layers.values()), None)
        if module is None:
            first = self.checkpoint.moe_layers[0]
            try:
                module = self._templates([first])[first]
            except Exception:  # vLLM can't pack this layer without its weights
                return self.checkpoint.hidden, self.checkpoint.top_k
        return module.moe_config.hidden_dim_unpadded or module.hidden_size, module.top_k

    @property
    def experts(self) -> dict[int, tuple[int, ...]]:
        """Global ids of the experts held now, for every layer of the model that has experts."""
        layers = self._layers.copy()
        return {
            layer: layers[layer].module.local_experts if layer in layers else ()
            for layer in self.checkpoint.moe_layers
        }

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the memory behind the experts held now."""
        return allocated_bytes(layer.module for layer in self._layers.copy().values())

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with at least one local expert."""
        return tuple(sorted(self._layers))

    def grow(self, experts: Experts, *, background: bool = True) -> int:
        """Hold these experts too; those held already stay as they are.

        May take long, on any thread, while another one computes: a layer is computed with its old
        experts until the new ones are ready. Needs the memory of the new experts and, for a
        moment, of one whole layer more.

        Args:
            experts: layer -> global ids.
            background: leave the processor to the thread that computes, if there is one.

        Returns:
            Bytes of memory that the new experts took; 0 when all were held.

        Raises:
            CheckpointError, UnsupportedModel, ValueError: as when the shard was made. The layers
                that were ready before the error stay grown.
        """
        with self._changing:
            new = self.missing(experts)
            before = self.allocated_bytes
            if new:
                with _in_background() if background else nullcontext():
                    for layer, module in self._build(new).items():
                        self._merge(layer, module)
            return self.allocated_bytes - before

    def keep(self, experts: Experts) -> int:
        """Drop every expert that is not named; what stays is computed as before.

        Args:
            experts: layer -> global ids, all held; a layer left out keeps none.

        Returns:
            Bytes of memory given back.

        Raises:
            ValueError: an expert that is not held; nothing has changed then.
        """
        with self._changing:
            self.check_held(experts)
            before = self.allocated_bytes
            with _in_background():
                for layer, old in list(self._layers.items()):
                    wanted = set(experts.get(layer, ()))
                    stay = tuple(e for e in old.module.local_experts if e in wanted)
                    if not stay:
                        self._swap(layer, None)
                    elif stay != old.module.local_experts:
                        self._narrow(layer, old.module, stay)
                _return_free_memory()
            return before - self.allocated_bytes

    def missing(self, experts: Experts) -> dict[int, tuple[int, ...]]:
        """Those of the experts that are not held, without layers that lack none."""
        held = self.experts
        return {
            layer: absent
            for layer, ids in _checked(self.checkpoint, experts).items()
            if (absent := tuple(e for e in ids if e not in held[layer]))
        }

    def packed(self, layer: int) -> tuple[tuple[int, ...], dict[str, torch.Tensor], str] | None:
        """A layer's experts, their packed rows by name, and the rows' fingerprint.

        The tensors are the ones that are computed with; they stay as they are when the shard
        changes. None when the layer is not held or is not made of contiguous rows.
        """
        with self._changing:
            held = self._layers.get(layer)
            if held is None:
                return None
            try:
                rows = rows_of(held.module)
            except NotByRow:
                return None
            if not all(tensor.is_contiguous() for tensor in rows.values()):
                return None
            print_ = fingerprint(self.checkpoint.digest, held.module, rows)
            return held.module.local_experts, rows, print_

    def fingerprints(self, layers: Iterable[int]) -> dict[int, str]:
        """Of these layers, held or not, as this process packs them; odd ones are left out."""
        found: dict[int, str] = {}
        with self._changing, _in_background():
            for layer, module in self._templates(layers).items():
                with suppress(NotByRow):
                    rows = rows_of(module)
                    found[layer] = fingerprint(self.checkpoint.digest, module, rows)
        return found

    def empty_rows(self, layer: int, count: int) -> dict[str, torch.Tensor]:
        """Tensors for ``count`` packed experts of a layer, by name, to be filled and adopted."""
        with self._changing, _in_background():
            rows = rows_of(self._templates([layer])[layer])
            return {
                name: torch.empty((count, *t.shape[1:]), dtype=t.dtype, device=t.device)
                for name, t in rows.items()
            }

    def adopt(self, layer: int, experts: Sequence[int], rows: Mapping[str, torch.Tensor]) -> None:
        """Hold experts whose packed rows came from elsewhere; see ``grow`` for the terms.

        Args:
            layer: layer number.
            experts: global ids of new experts, in the order of the rows.
            rows: filled ``empty_rows``; they may become the layer's own.

        Raises:
            NotByRow: the rows don't fit the layer as it is now.
        """
        with self._changing, _in_background():
            old = self._layers.get(layer)
            template = self._templates([layer])[layer]
            if old is None:
                self._swap(layer, self._layer(with_rows(template, experts, rows)))
                return
            everything = (*old.module.local_experts, *experts)
            made = self._layer(with_rows(template, everything, joined(rows_of(template), rows)))
            self._check_same(made, (old,))
            self._swap(layer, made)

    def _templates(self, layers: Iterable[int]) -> dict[int, LocalExperts]:
        """Packed layers, to make others like them: the ones held, else a blank one."""
        layers = list(layers)
        absent = {n: (0,) for n in layers if n not in self._layers and n not in self._blank}
        if absent:
            self._blank |= build_experts(
                self._config, self.checkpoint, absent, self.device, blank=True
            )
        return {n: self._layers[n].module if n in self._layers else self._blank[n] for n in layers}

    def check_held(self, experts: Experts) -> None:
        """Raise ValueError unless all these experts are held."""
        missing = {layer: list(ids) for layer, ids in self.missing(experts).items()}
        if missing:
            raise ValueError(
                f"experts {missing} (by layer) can't be kept: this shard does not hold them; "
                "grow it first"
            )

    def compute(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        rows: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the local experts' outputs, per token.

        Args:
            layer: layer number in the whole model.
            x: hidden states [T, H] in ``dtype``.
            ids: global expert ids, int32; [T, K] without ``rows``, [P] with them. All local.
            weights: float32 routing weights in the shape of ``ids``.
            rows: [P] int32, the token of each (token, expert) pair.
            out: where to write the result, [T, H]; allocated when None.

        Returns:
            [T, H]; zero for a token without a pair.

        Raises:
            FrameError: code ``unknown_layer``, ``unknown_expert`` or ``bad_shape``.
        """
        with kernel_lock:  # and with it what is held can't change underway
            held = self._layers.get(layer)
            if held is None:
                raise FrameError(
                    f"layer {layer} was asked for; this shard holds layers {list(self.layers)}",
                    code="unknown_layer",
                )
            if x.dtype != self.dtype or x.shape[1] != held.hidden:
                raise FrameError(
                    f"hidden states are {x.dtype} x {x.shape[1]}; "
                    f"layer {layer} takes {self.dtype} x {held.hidden}",
                    code="bad_shape",
                )
            if out is None:
                out = torch.empty_like(x)
            if not ids.numel():
                return out.zero_()
            local = held.local_ids(ids)
            if rows is None:
                held.run(x, local, weights, out)
                return out
            try:
                expanded = x.index_select(0, rows)
            except IndexError as error:
                raise FrameError(
                    f"rows reach from {int(rows.min())} to {int(rows.max())} in {len(x)} tokens",
                    code="bad_shape",
                ) from error
            pairs = held.run(expanded, local.unsqueeze(1), weights.unsqueeze(1))
            return _add_per_token(pairs, rows, out)

    def _build(self, experts: Experts) -> dict[int, LocalExperts]:
        """New layers with these experts, from the checkpoint."""
        if not any(experts.values()):
            return {}
        wanted = {layer: tuple(ids) for layer, ids in experts.items()}
        return build_experts(self._config, self.checkpoint, wanted, self.device)

    def _layer(self, module: LocalExperts) -> _Layer:
        return _Layer(module, self.checkpoint.num_experts, self.device)

    def _merge(self, layer: int, more: LocalExperts) -> None:
        """Add the experts of ``more`` to a layer; ``more`` is used up."""
        old = self._layers.get(layer)
        if old is None:
            self._swap(layer, self._layer(more))
            return
        experts = (*old.module.local_experts, *more.local_experts)
        try:
            made = self._layer(
                with_rows(old.module, experts, joined(rows_of(old.module), rows_of(more)))
            )
            self._check_same(made, (old, self._layer(more)))
        except NotByRow:
            made = self._layer(self._build({layer: experts})[layer])
        self._swap(layer, made)
        forget(more)

    def _narrow(self, layer: int, module: LocalExperts, stay: tuple[int, ...]) -> None:
        positions = [module.local_experts.index(expert) for expert in stay]
        try:
            made = self._layer(with_rows(module, stay, chosen(rows_of(module), positions)))
            self._check_same(made, (self._layers[layer],))
        except NotByRow:
            made = self._layer(self._build({layer: stay})[layer])
        self._swap(layer, made)

    def _swap(self, layer: int, made: _Layer | None) -> None:
        with kernel_lock:
            old = self._layers.pop(layer, None) if made is None else self._layers.get(layer)
            if made is not None:
                self._layers[layer] = made
        if old is not None:
            forget(old.module)

    def _check_same(self, made: _Layer, parts: Sequence[_Layer]) -> None:
        """Raise NotByRow unless some experts compute the same in a layer as in its parts.

        A kernel of a make not met before may keep something per expert where ``rows_of`` does not
        look; its layers are then built anew.
        """
        for part in parts:
            common = [e for e in part.module.local_experts if e in made.module.local_experts]
            for expert in {*common[: _PROBES // 2], *common[-_PROBES // 2 :]}:
                first, second = part.answer(expert, self.dtype), made.answer(expert, self.dtype)
                if not torch.allclose(first, second, rtol=1e-2, atol=1e-6, equal_nan=True):
                    raise NotByRow(f"expert {expert} computes something else in other rows")


@contextmanager
def _in_background() -> Iterator[None]:
    """Load without standing in the way of the thread that computes.

    One torch thread, and Python threads that take turns more often: at Python's 5 ms, each of the
    many small calls that serve a frame would wait that long to go on.
    """
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)


class _Layer:
    """One expert layer of vLLM with its map from global to local ids."""

    def __init__(self, module: LocalExperts, num_experts: int, device: torch.device):
        self.module = module
        self.hidden = module.moe_config.hidden_dim_unpadded or module.hidden_size
        self._pad = module.hidden_size - self.hidden
        self._bare = None if self._pad else bare_kernel(module)
        self._local_id = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        for local, expert in enumerate(module.local_experts):
            self._local_id[expert] = local

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Local ids in the shape of ``ids``. Raises FrameError for an expert not held here."""
        try:
            local = self._local_id.index_select(0, ids.reshape(-1)).view(ids.shape)
        except IndexError:
            local = None
        if local is None or int(local.min()) < 0:
            foreign = sorted(set(ids.reshape(-1).tolist()) - set(self.module.local_experts))
            raise FrameError(
                f"experts {foreign} of layer {self.module.layer} were asked for; this shard "
                f"holds {list(self.module.local_experts)}",
                code="unknown_expert",
            )
        return local

    def answer(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """What an expert makes of a fixed token, [1, H]."""
        device = self._local_id.device
        x = torch.linspace(-1.0, 1.0, self.hidden, dtype=torch.float32, device=device)
        ids = torch.tensor([[expert]], dtype=torch.int32, device=device)
        weights = torch.ones(1, 1, dtype=torch.float32, device=device)
        with torch.inference_mode(), kernel_lock:
            return self.run(x.to(dtype).unsqueeze(0), self.local_ids(ids), weights)

    def run(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's kernel: x [T, H], local ids and weights [T, K] -> [T, H]."""
        if self._bare is not None:
            if out is None:
                out = torch.empty_like(x)
            self._bare(x, ids, weights, out)
            return out
        if self._pad:
            x = torch.nn.functional.pad(x, (0, self._pad))
        if self.module.apply_router_weight_on_input:
            weights = weights.clone()  # the CPU kernel then overwrites them with ones
        result = self.module.forward_modular(x=x, topk_weights=weights, topk_ids=ids)
        if not isinstance(result, torch.Tensor):
            raise UnsupportedModel(
                f"the kernel of layer {self.module.layer} leaves its sum to the caller; "
                "set engine argument moe_backend to another"
            )
        result = result[:, : self.hidden]
        return result if out is None else out.copy_(result)


def _return_free_memory() -> None:
    """Ask the C library for it: what is freed stays with the process otherwise (2 ms measured)."""
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _add_per_token(pairs: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sum pair results [P, H] into their tokens' rows of out [T, H], rounding once."""
    total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    total.zero_().index_add_(0, rows, pairs.to(total.dtype))
    return out if total is out else out.copy_(total)


def _checked(checkpoint: Checkpoint, experts: Experts) -> dict[int, tuple[int, ...]]:
    for layer, ids in experts.items():
        if layer not in checkpoint.moe_layers:
            raise ValueError(
                f"layer {layer} of {checkpoint.path} has no routed experts; "
                f"layers {list(checkpoint.moe_layers)} have"
            )
        wrong = sorted({e for e in ids if not 0 <= e < checkpoint.num_experts})
        if wrong or len(set(ids)) < len(ids):
            raise ValueError(
                f"layer {layer}: experts {wrong or sorted(ids)} were given; expected distinct "
                f"ids from 0 to {checkpoint.num_experts - 1}"
            )
    return {layer: tuple(ids) for layer, ids in experts.items()}
