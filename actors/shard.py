"""The experts that one FFN actor holds, and their part of a mixture-of-experts layer.

A shard holds any subset of the experts of any layers. It returns weighted partial sums; adding up
the parts of several shards gives the layer's routed output. It keeps no state between calls and
knows nothing of frames, peers or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actors.checkpoint import Checkpoint
from actors.errors import FrameError, UnsupportedModel
from actors.local_experts import (
    LocalExperts,
    allocated_bytes,
    bare_kernel,
    build_experts,
    engine_config,
)


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
        experts: Mapping[int, Sequence[int]],
        *,
        dtype: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ):
        self.checkpoint = Checkpoint.open(model)
        self.experts = _checked(self.checkpoint, experts)
        self.device = torch.device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        config = engine_config(self.checkpoint, dtype, engine_args or {}, self.device)
        self.dtype: torch.dtype = config.model_config.dtype  # pyright: ignore[reportAttributeAccessIssue]
        modules = build_experts(config, self.checkpoint, self.experts, self.device)
        self.allocated_bytes = allocated_bytes(iter(modules.values()))
        self._layers = {
            layer: _Layer(module, self.checkpoint.num_experts, self.device)
            for layer, module in modules.items()
        }

    @property
    def hidden(self) -> int:
        """Width H of the hidden states."""
        return next((held.hidden for held in self._layers.values()), self.checkpoint.hidden)

    @property
    def top_k(self) -> int:
        """Experts per token of the model."""
        return next((held.module.top_k for held in self._layers.values()), self.checkpoint.top_k)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with at least one local expert."""
        return tuple(sorted(self._layers))

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


def _add_per_token(pairs: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sum pair results [P, H] into their tokens' rows of out [T, H], rounding once."""
    total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    total.zero_().index_add_(0, rows, pairs.to(total.dtype))
    return out if total is out else out.copy_(total)


def _checked(
    checkpoint: Checkpoint, experts: Mapping[int, Sequence[int]]
) -> dict[int, tuple[int, ...]]:
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
