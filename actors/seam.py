"""The seam: where vLLM's routed experts are replaced by a remote call.

vLLM builds every MoE layer of every model family through ``RoutedExperts``, a pluggable layer.
While the attention side's model is built (``loader``) ours takes its place, which owns no weights:
gate, top-k, shared experts and dense layers stay in vLLM, and the weighted sum over the routed
experts is asked of the ``ExpertsClient`` that is bound. The remote call is made of opaque custom
ops, so torch.compile traces around it.

Not here: what travels on the wire (``experts_client``) and when lanes switch (``lanes``).
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from actors.errors import UnsupportedModel

if TYPE_CHECKING:
    from actors.experts_client import ExpertsClient


class Seam:
    """What the layers of this process share: the client they call and the layers that exist.

    vLLM constructs the layers itself, so they can't be handed a client; there is one engine per
    process, hence one seam. Until ``bind`` the experts answer zeros, which is what the engine's own
    warm-up and memory profiling need; afterwards a call without an expert table is an error.
    """

    client: "ExpertsClient | None" = None
    # layer index -> the layer that vLLM built for it
    layers: "weakref.WeakValueDictionary[int, RemoteExperts]" = weakref.WeakValueDictionary()

    @classmethod
    def bind(cls, client: "ExpertsClient") -> None:
        cls.client = client

    @classmethod
    def unbind(cls) -> None:
        cls.client = None


def _experts(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int) -> torch.Tensor:
    client = Seam.client
    if client is None:
        return torch.zeros_like(x)
    return client.combine(client.dispatch(layer, x, weights, ids))


def _experts_fake(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int
) -> torch.Tensor:
    return torch.empty_like(x)


def _dispatch(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int
) -> torch.Tensor:
    client = Seam.client
    ticket = -1 if client is None else client.park(client.dispatch(layer, x, weights, ids))
    return torch.tensor([ticket], dtype=torch.int64)


def _dispatch_fake(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int
) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64)


def _combine(ticket: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    client = Seam.client
    number = int(ticket[0])
    if client is None or number < 0:
        return torch.zeros_like(x)
    return client.combine(client.unpark(number))


def _combine_fake(ticket: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _opaque_op(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register ``torch.ops.afflux.<name>``: opaque to torch.compile, a plain Python call when run.

    A lane switches greenlets inside ``combine``. torch's way into a Python operator leads through
    pybind11, whose per-thread record of open calls does not survive a switch ("loader_life_support:
    internal error"). So the operator calls its function itself, unless something traces.
    """
    direct_register_custom_op(
        op_name=name,
        op_func=function,
        mutates_args=[],
        fake_impl=fake,
        target_lib=_library,
        # the ticket lives on the CPU whatever the device of x: no one kernel for one device
        dispatch_key="CompositeExplicitAutograd",
    )

    class DirectOp(torch._ops.OpOverload):
        def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
            # `x` in all operators, and fake or functional while a compiler traces
            if type(args[0]) is torch.Tensor and not _len_torch_dispatch_stack():
                return function(*args, **kwargs)
            return super().__call__(*args, **kwargs)

    getattr(torch.ops.afflux, name).default.__class__ = DirectOp


_library = torch.library.Library("afflux", "DEF")
_opaque_op("experts", _experts, _experts_fake)
# the same in two halves, for what can be computed while the answer is on its way
_opaque_op("dispatch", _dispatch, _dispatch_fake)
_opaque_op("combine", _combine, _combine_fake)


class RemoteMethod(FusedMoEMethodBase):
    """The "quantisation method" of experts that live elsewhere: no weights, one remote call."""

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int32

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        return True

    @property
    def is_monolithic(self) -> bool:
        return False

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to hold: the weights are on the FFN actors."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing was loaded."""

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weighted sum over the routed experts, computed by FFN actors.

        Args:
            layer: the ``RemoteExperts`` that is called.
            x: hidden states [T, H].
            topk_weights: routing weights [T, K].
            topk_ids: global expert ids [T, K].
            shared_experts: run while the answer is on its way, or None.
            shared_experts_input: their input [T, H].

        Returns:
            [T, H] in the dtype of ``x``.
        """
        # .default: the overload itself; the packet around it would go through pybind11 (_opaque_op)
        if shared_experts is None:
            return torch.ops.afflux.experts.default(x, topk_weights, topk_ids, layer.layer)
        ticket = torch.ops.afflux.dispatch.default(x, topk_weights, topk_ids, layer.layer)
        shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        # Another lane may enter this layer before the answer is here, and vLLM keeps one output per
        # layer: take ours out for the time of the wait.
        index = shared_experts._output_idx
        mine, shared_experts._output[index] = shared_experts._output[index], None
        out = torch.ops.afflux.combine.default(ticket, x)
        shared_experts._output[index] = mine
        return out


class RemoteExperts(RoutedExperts):
    """``RoutedExperts`` without weights; what vLLM builds instead (see ``vllm_models``)."""

    _of_afflux = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer = extract_layer_index(self.layer_name)
        Seam.layers[self.layer] = self

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> RemoteMethod:
        return RemoteMethod(moe_config)

    def _ensure_moe_quant_config_init(self) -> None:
        """There is no kernel here to configure."""


def check_layers(model: str) -> None:
    """Raise ``UnsupportedModel`` when vLLM built no routed experts through the seam."""
    if not Seam.layers:
        raise UnsupportedModel(
            f"{model} has no routed experts that vLLM builds through RoutedExperts: afflux serves "
            "mixture-of-experts models. Serve a dense model with plain vLLM.",
        )
