"""What a stage shards falls as one over the number of ranks, and a later stage needs no more: laws, on real traces.

Static bytes are what outlives a step: weights, gradients and optimizer states of a rank, as an estimate states them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import pytest

from launcher.job import Checkpointing, Engine, Method
from launcher.memory import Category
from launcher.planner.tracer import Tracer
from launcher.planner.worlds import TRACED_RANKS
from scripts.accuracy_ranks import ARCHITECTURE, ARRANGEMENTS, plan_of
from tests.rank_plans import open_forecaster

Static = Mapping[Category, int]
WORLDS = (1, 2, 4, 8, 64, 1024)
SHARING = ("zero1", "zero2", "zero3", "fsdp2")
HIDDEN, INNER, WORDS, LAYERS = (
    int(ARCHITECTURE[name])
    for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
)
KEYS = HIDDEN // 2
"""Width of keys and of values: four heads of eight."""
FLOAT_BYTES = 4
LARGEST_BYTES = {Method.FULL: FLOAT_BYTES * WORDS * HIDDEN, Method.LORA: FLOAT_BYTES * 16 * INNER}
"""The largest tensor that is trained: the embedding, or an adapter of rank 16 on the widest matrix."""
NORMS_BYTES = FLOAT_BYTES * (2 * LAYERS + 1) * HIDDEN
GATHERED_BYTES = {
    Method.FULL: NORMS_BYTES,
    Method.LORA: NORMS_BYTES + 2 * LAYERS * FLOAT_BYTES * 16 * KEYS,
}
"""What ZeRO 3 leaves on each rank beside its part, being small: norms, and adapters on the smallest matrices."""
COUNTERS_BYTES = 1000
"""AdamW counts its steps beside each tensor of states."""
PADDED = 1e-3
"""Parts are rounded up to whole numbers of elements."""


@pytest.fixture(scope="module")
def static() -> Iterator[Callable[[Method, str, int], Static]]:
    """A rank's static bytes; of one rank without an engine. Each is traced once."""
    with Tracer(("deepspeed",)) as tracer:

        @cache
        def estimated(method: Method, arrangement: str, ranks: int) -> Static:
            engine, stage = ARRANGEMENTS[arrangement] if ranks > 1 else (Engine.NONE, 0)
            plan = plan_of(engine, stage, method, Checkpointing.NONE, 1, 192, 2, num_devices=ranks)
            sizes = open_forecaster(tracer).estimate(plan).resident_bytes
            return {
                name: sizes[name]
                for name in (Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
            }

        yield estimated


def worlds(*quick: tuple[object, ...]) -> list[object]:
    """Those that are quick, and all with both methods for the thorough."""
    every = [
        (method, arrangement, ranks)
        for method in (Method.FULL, Method.LORA)
        for arrangement in SHARING
        for ranks in WORLDS[1:]
    ]
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.thorough) for case in every]


@pytest.mark.parametrize(
    ("method", "arrangement", "ranks"),
    worlds(
        (Method.FULL, "zero1", 2),
        (Method.FULL, "zero1", 1024),
        (Method.FULL, "zero3", 2),
        (Method.FULL, "zero3", 1024),
        (Method.FULL, "fsdp2", 2),
    ),
)
def test_what_is_sharded_is_one_part_of_as_many_as_there_are_ranks(
    method: Method, arrangement: str, ranks: int, static: Callable[[Method, str, int], Static]
) -> None:
    """Gradients of stages 1 and 2 are reduced parameter by parameter: one of them is there beside a rank's part."""
    whole, part = static(method, arrangement, 1), static(method, arrangement, ranks)
    is_deepspeed, shards_all = arrangement != "fsdp2", arrangement in ("zero3", "fsdp2")
    trained = whole[Category.GRADIENTS]
    # in fp32 AdamW's two states are twice the weights; DeepSpeed has a copy of the weights beside them
    states = whole[Category.OPTIMIZER_STATE] + is_deepspeed * trained
    assert part[Category.OPTIMIZER_STATE] == pytest.approx(states / ranks, rel=PADDED, abs=COUNTERS_BYTES)
    gradients = part[Category.GRADIENTS]
    if shards_all:
        assert gradients == pytest.approx(trained / ranks, rel=PADDED)
    else:
        traced = min(ranks, TRACED_RANKS)
        most = (trained / traced + LARGEST_BYTES[method]) * traced / ranks
        assert trained / ranks * (1 - PADDED) <= gradients <= most * (1 + PADDED)
    parameters, all_parameters = part[Category.PARAMETERS], whole[Category.PARAMETERS]
    if arrangement == "zero3":
        # the estimate for more ranks than are traced takes small adapters for parts, if they are as large as one
        least = NORMS_BYTES if ranks > TRACED_RANKS else GATHERED_BYTES[method]
        assert (all_parameters / ranks + least) * (1 - PADDED) <= parameters
        assert parameters <= (all_parameters / ranks + GATHERED_BYTES[method]) * (1 + PADDED)
    elif shards_all:
        assert parameters == pytest.approx(all_parameters / ranks, rel=PADDED)
    else:
        assert parameters == all_parameters


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        case if case == (Method.FULL, 2) else pytest.param(*case, marks=pytest.mark.thorough)
        for case in ((method, ranks) for method in (Method.FULL, Method.LORA) for ranks in WORLDS)
    ],
)
def test_a_later_stage_needs_no_more(
    method: Method, ranks: int, static: Callable[[Method, str, int], Static]
) -> None:
    """And FSDP2, which has no copy of the weights, no more than ZeRO 3."""
    totals = [sum(static(method, name, ranks).values()) for name in ("ddp", *SHARING)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == sum(static(method, "ddp", 1).values()), "DDP shards nothing"
