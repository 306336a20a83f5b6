"""vLLM's model runner and worker, taught to run one step in several lanes.

Only method overrides: vLLM prepares the step as always; here the batch is cut by request, attention
metadata and slot mappings are made per lane by vLLM's own micro-batch slicing, and the forward pass
runs once per lane on greenlets. How many lanes is ``LaneChooser``'s decision. A forward pass that
lost its experts runs again from its first layer under a newer expert table, so that one step has
one epoch; it writes the same KV entries again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm import forward_context
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.platforms import current_platform
from vllm.v1.worker.ubatch_utils import UBatchSlice

from actors import lanes
from actors.errors import StepInterrupted
from actors.experts_client import ExpertsClient
from actors.replay import ReplayRunner
from actors.seam import Seam

_WORKER_MODULE = {
    "cpu": ("vllm.v1.worker.cpu_worker", "CPUWorker"),
    "cuda": ("vllm.v1.worker.gpu_worker", "Worker"),
}


class LaneRunner(ReplayRunner):
    """Mixed into vLLM's runner class of the platform (see ``AttentionWorker.init_device``)."""

    chooser: lanes.LaneChooser
    lane_slices: list[UBatchSlice] | None = None
    context_tokens: np.ndarray | None = None  # per request of the step, while emulating

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if current_platform.is_cpu():
            return
        # Off the CPU vLLM hides the whole MoE layer in an operator, and lanes can't switch
        # inside of that (see ``seam._opaque_op``): call the layer as vLLM does on the CPU. Written,
        # not validated on a GPU.
        for layer in self.compilation_config.static_forward_context.values():  # type: ignore[attr-defined]
            if isinstance(layer, MoERunner):
                shared = layer.shared_experts is not None
                layer._forward_entry = (
                    moe_runner._moe_forward_shared if shared else moe_runner._moe_forward
                )

    def initialize_metadata_builders(self, *args: Any, **kwargs: Any) -> None:
        # One metadata builder per possible lane. The size is set on the finished config: vLLM's own
        # check would ask for an all-to-all backend that the seam does not use.
        self.parallel_config.ubatch_size = self.chooser.limit  # type: ignore[attr-defined]
        super().initialize_metadata_builders(*args, **kwargs)  # type: ignore[misc]

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        plan = super()._determine_batch_execution_and_padding(*args, **kwargs)  # type: ignore[misc]
        self.lane_slices = None
        # A dummy run (warm-up, profiling) has no requests and no experts to wait for.
        if Seam.client is not None and "num_encoder_reqs" in kwargs:
            tokens = kwargs["num_scheduled_tokens_np"]
            computed = self.input_batch.num_computed_tokens_cpu[: len(tokens)]  # type: ignore[attr-defined]
            context = computed + tokens
            if Seam.client.emulate is not None:
                self.context_tokens = context
            total = Seam.client.step_tokens = int(tokens.sum())
            ones = int(np.count_nonzero(tokens == 1))
            Seam.client.step_load = (len(tokens), ones, int(context.sum()))
            padded = plan[1].num_tokens != total
            if kwargs.get("allow_microbatching", True) and not padded:
                self.lane_slices = self._cut(tokens)
        return plan

    def _cut(self, tokens: np.ndarray) -> list[UBatchSlice] | None:
        count = self.chooser.choose(len(tokens), int(tokens.sum()))
        if count < 2:
            return None
        ends = np.concatenate(([0], np.cumsum(tokens)))
        return [
            UBatchSlice(run, slice(int(ends[run.start]), int(ends[run.stop])))
            for run in lanes.split(tokens.tolist(), count)
        ]

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_slot_mappings(*args, **self._with_lanes(kwargs))  # type: ignore[misc]

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return super()._build_attention_metadata(*args, **self._with_lanes(kwargs))  # type: ignore[misc]

    def _with_lanes(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.lane_slices is None else {**kwargs, "ubatch_slices": self.lane_slices}

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        forward = super()._model_forward  # type: ignore[misc]
        slices, self.lane_slices = self.lane_slices, None
        client = Seam.client

        def run() -> Any:
            # Layers add to these embeddings in place, and a repetition needs them as they were.
            embeds = None if inputs_embeds is None else inputs_embeds.clone()
            if slices is None:
                if client is not None:
                    client.begin_lane(self._context(slice(None)))
                return forward(
                    input_ids=input_ids,
                    positions=positions,
                    intermediate_tensors=intermediate_tensors,
                    inputs_embeds=embeds,
                    **kwargs,
                )
            return self._run_lanes(forward, slices, input_ids, positions, embeds, kwargs)

        return run() if client is None else self._until_finished(client, slices, run)

    def _until_finished(
        self, client: ExpertsClient, slices: list[UBatchSlice] | None, run: Callable[[], Any]
    ) -> Any:
        """Run a step's forward pass, again after a newer table was adopted if it lost experts.

        Raises:
            AffluxError: no newer table came in time; or the model keeps state between tokens that
                a second pass would advance twice.
        """
        while True:
            client.begin_step(len(slices) if slices else 1)
            forward_context.get_forward_context().moe_layer_index = 0
            try:
                return run()
            except StepInterrupted as error:
                model = self.model_config  # type: ignore[attr-defined]
                if model.is_hybrid or model.has_inner_state:
                    raise
                # without the frames of the failed pass, which hold its activations
                interrupted = error.with_traceback(None)
            client.await_change(interrupted)

    def _context(self, requests: slice) -> int:
        """Context tokens of some requests of the step; 0 when nothing is emulated."""
        tokens = self.context_tokens
        return 0 if tokens is None else int(tokens[requests].sum())

    def _run_lanes(
        self,
        forward: Callable[..., Any],
        slices: list[UBatchSlice],
        input_ids: torch.Tensor | None,
        positions: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        whole = forward_context.get_forward_context()
        contexts = [
            forward_context.create_forward_context(
                whole.attn_metadata[lane],
                self.vllm_config,  # type: ignore[attr-defined]
                slot_mapping=whole.slot_mapping[lane],
                skip_compiled=whole.skip_compiled,
                additional_kwargs=whole.additional_kwargs,
            )
            for lane in range(len(slices))
        ]

        def lane_forward(lane: int) -> Any:
            tokens = slices[lane].token_slice
            if Seam.client is not None:
                Seam.client.begin_lane(self._context(slices[lane].request_slice))
            # a lane is a fresh stack: vLLM's inference mode has to be entered on it again
            with torch.inference_mode():
                return forward(
                    input_ids=None if input_ids is None else input_ids[tokens],
                    positions=None if positions is None else positions[..., tokens],
                    intermediate_tensors=None,
                    inputs_embeds=None if inputs_embeds is None else inputs_embeds[tokens],
                    **kwargs,
                )

        def enter(lane: int) -> None:
            forward_context._forward_context = contexts[lane]

        try:
            results = lanes.run([partial(lane_forward, lane) for lane in range(len(slices))], enter)
        finally:
            forward_context._forward_context = whole
        return torch.cat(results)


def _base_worker() -> type:
    import importlib

    platform = "cpu" if current_platform.is_cpu() else "cuda"
    module, name = _WORKER_MODULE[platform]
    return getattr(importlib.import_module(module), name)


class AttentionWorker(_base_worker()):  # type: ignore[misc]
    """vLLM's worker of this platform whose runner has lanes. Given to vLLM as ``worker_cls``."""

    chooser = lanes.LaneChooser(1)  # replaced by the engine before vLLM builds the worker

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        # vLLM names its runner class inside init_device; swapping the class of the fresh instance
        # spares a second construction of its buffers.
        runner.__class__ = type("LaneModelRunner", (LaneRunner, type(runner)), {})
        runner.chooser = self.chooser
