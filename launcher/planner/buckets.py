"""Sizes of an engine's buckets: what waits there to be sent or used is memory, so they are part of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import UnsupportedByPlanner
from launcher.plan import Buckets, Plan

FUSED_ELEMENTS = 50_000_000
"""Trained elements up to which one bucket holds all gradients: 100 MB of bf16."""
PERSISTENT_ROWS = 10
"""Parameters up to so many rows of the hidden size (norms, biases) are held whole under ZeRO 3: gathering them costs
more time than they take room (DeepSpeed's default is 1e5 elements, about 24 rows of 4,096)."""
ONE_GROUP_ELEMENTS = 1_000_000_000
"""DeepSpeed's `sub_group_size`."""
BELOW_A_LAYER = 0.95
"""A group closes with the parameter that fills it: one a little smaller than a layer closes with each layer's last large
one, whatever small ones the config does not tell of."""
WIDTH, DEPTH = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer")
"""How configs spell width and depth."""


def default_buckets(
    architecture: Mapping[str, Any], plan: Plan, targets: str | Sequence[str] = "all-linear"
) -> Buckets:
    """Bucket sizes of a plan: all that is trained, where that is little; else a layer's worth of it.

    DeepSpeed's default of 5e8 elements is 1 GB that is there whatever the model's size. Gradients come parameter by
    parameter, so a bucket as large as the largest one is sent as soon as that one is there, layer after layer alike;
    one that holds a layer's adapters, to the element, is sent with the first of the next layer.
    ZeRO 3 updates a layer at a time: with DeepSpeed's 1e9 elements a rank would hold 4 GB of gradients in fp32 in its
    optimizer's step.

    Args:
        architecture: The model's config.
        plan: The plan; its method and rank count.
        targets: Which layers have adapters, as PEFT takes it.

    Raises:
        UnsupportedByPlanner: When the config tells neither width nor depth under a known name.
    """
    layer = _layer_of(architecture)
    if plan.rank:
        trained = group = layer.adapted_elements(plan.rank, targets)
        reduced = FUSED_ELEMENTS if trained * layer.count <= FUSED_ELEMENTS else trained
    else:
        trained, group = layer.elements, int(BELOW_A_LAYER * layer.elements)
        reduced = layer.largest_elements
    reduced += reduced % 2  # DeepSpeed wants an even number
    one_group = trained * layer.count <= FUSED_ELEMENTS * plan.world_size
    return Buckets(
        reduce_bucket_elements=reduced,
        allgather_bucket_elements=reduced,
        prefetch_bucket_elements=layer.largest_elements,
        persistence_threshold_elements=PERSISTENT_ROWS * layer.hidden,
        max_live_elements=layer.elements,  # more would keep layers gathered that the next ones don't use
        # of a block of experts DeepSpeed counts none (a leaf; 0.19.8, partitioned_param_coordinator.py,
        # `__params_to_release`), and with a layer's elements would hold the attention of many layers
        max_reuse_distance_elements=layer.attention_elements if layer.num_experts > 1 else layer.elements,
        sub_group_elements=ONE_GROUP_ELEMENTS if one_group else group // plan.world_size,
    )


def small_buckets(
    architecture: Mapping[str, Any], plan: Plan, targets: str | Sequence[str] = "all-linear"
) -> Buckets:
    """Bucket sizes of a plan for which ordinary ones leave no room: nothing waits in them, neither to be sent nor used.

    With all weights trained a bucket holds norms and biases; each matrix is larger, and sent by itself as soon as its
    gradient is there, without a copy in a bucket (deepspeed 0.19.8: `extra_large_param_to_reduce` of stage_1_and_2.py,
    `__add_grad_to_ipg_bucket` of stage3.py). With adapters it holds those of a layer. Either way a layer is sent like
    the one before it, so that few layers tell of all. ZeRO 3 gathers a module's weights when it comes to them, and lets
    go of them when it is done: no prefetch, and no wait for the next use (partitioned_param_coordinator.py).

    Nothing is exchanged while a rank computes. A gradient that is sent from its own memory by a second stream would go
    back to torch's allocator only when that stream is done with it (`record_stream` in stage_1_and_2.py,
    `allreduce_and_copy_with_multiple_ranks`), and no trace tells when that is. Groups of ZeRO 3's update stay what they
    are: its checkpoints are saved by them.

    Args:
        architecture: The model's config.
        plan: The plan; its method and rank count.
        targets: Which layers have adapters, as PEFT takes it.

    Raises:
        UnsupportedByPlanner: When the config tells neither width nor depth under a known name.
    """
    ordinary, layer = default_buckets(architecture, plan, targets), _layer_of(architecture)
    small = PERSISTENT_ROWS * layer.hidden
    reduced = layer.adapted_elements(plan.rank, targets) if plan.rank else small
    reduced = min(ordinary.reduce_bucket_elements, reduced + reduced % 2)
    return replace(
        ordinary,
        reduce_bucket_elements=reduced,
        prefetch_bucket_elements=0,
        max_reuse_distance_elements=0,
        overlap_exchange=False,
    )


@dataclass(frozen=True)
class _Layer:
    """A decoder layer by the config, with a gated feed-forward part; of other layers a rough figure."""

    text: Mapping[str, Any]
    """The config of the language model."""

    @property
    def hidden(self) -> int:
        """The width.

        Raises:
            UnsupportedByPlanner: When the config has it under no known name.
        """
        return _fact(self.text, *WIDTH)

    @property
    def count(self) -> int:
        """How many there are.

        Raises:
            UnsupportedByPlanner: When the config has it under no known name.
        """
        return _fact(self.text, *DEPTH)

    @property
    def inner(self) -> int:
        """The width inside the feed-forward part."""
        return int(self.text.get("intermediate_size") or self.text.get("n_inner") or 4 * self.hidden)

    @property
    def num_experts(self) -> int:
        """1 where there are none."""
        return int(self.text.get("num_local_experts") or self.text.get("num_experts") or 1)

    @property
    def expert_inner(self) -> int:
        """The width inside an expert, or inside the only feed-forward part."""
        wanted = self.text.get("moe_intermediate_size") if self.num_experts > 1 else None
        return int(wanted or self.inner)

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the projections of attention."""
        heads = int(self.text.get("num_attention_heads") or self.text.get("n_head") or 1)
        head_size = int(self.text.get("head_dim") or self.hidden // heads)
        own = heads * head_size
        shared = int(self.text.get("num_key_value_heads") or heads) * head_size
        return {
            "q_proj": (self.hidden, own),
            "k_proj": (self.hidden, shared),
            "v_proj": (self.hidden, shared),
            "o_proj": (own, self.hidden),
        }

    @property
    def attention_elements(self) -> int:
        """Elements of attention."""
        return sum(map(math.prod, self.attention.values()))

    @property
    def elements(self) -> int:
        """Elements of the matrices."""
        return self.attention_elements + 3 * self.hidden * self.expert_inner * self.num_experts

    @property
    def largest_elements(self) -> int:
        """Elements of the largest parameter; of experts two matrices are one."""
        fused = 2 * self.hidden * self.expert_inner * self.num_experts if self.num_experts > 1 else 0
        return max(self.hidden * self.inner, fused)

    def adapted_elements(self, rank: int, targets: str | Sequence[str]) -> int:
        """Elements of the adapters; those of all linear layers if no name is known.

        Experts are left out: they are stacks of matrices, and PEFT gives those of some architectures adapters of its own
        making (twice the rank for two fused matrices). A bucket is then less than a layer's worth, and every layer is
        traced.
        """
        sides = self.attention
        if self.num_experts == 1:
            sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (self.hidden, self.inner))
        named = [] if isinstance(targets, str) else [side for name, side in sides.items() if name in targets]
        return rank * sum(map(sum, named or sides.values()))


def _layer_of(architecture: Mapping[str, Any]) -> _Layer:
    return _Layer(architecture.get("text_config") or architecture)


def _fact(text: Mapping[str, Any], *names: str) -> int:
    found = next((text[name] for name in names if isinstance(text.get(name), int)), None)
    if found is None:
        raise UnsupportedByPlanner(
            f"the config of {text.get('model_type')} has none of {', '.join(names)}, which the buckets' sizes come from",
            "one device, where there are no buckets",
        )
    return int(found)
