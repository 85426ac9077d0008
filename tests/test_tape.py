"""The tape against allocations worked out by hand, and the fast fake mode against torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from launcher.memory import Category, Phase, Region
from launcher.planner import worst_case
from launcher.planner.fast_fake import FastFakeTensorMode
from launcher.planner.polynomial import TracedShape
from launcher.planner.profile import build_profile
from launcher.planner.tape import Tape

BATCH, LENGTH = 13, 227
SHAPE = TracedShape(BATCH, LENGTH, batch_is_symbol=True, length_is_symbol=True)


@contextmanager
def recording(padded: bool = False) -> Iterator[Tape]:
    fake = FastFakeTensorMode()
    tape = Tape(SHAPE, twins=worst_case.twins(), padded=padded, fake=fake)
    with fake, tape:
        yield tape


def totals(tape: Tape) -> list[int]:
    """Live bytes after each event."""
    live, out = 0, []
    for event in tape.events:
        live += event.block.num_bytes if event.birth else -event.block.num_bytes
        out.append(live)
    return out


def test_births_and_releases_are_those_of_the_program() -> None:
    with recording() as tape:
        first = torch.empty(100, dtype=torch.float32)
        second = torch.empty(10, dtype=torch.bfloat16)
        del first
        third = torch.empty(1, dtype=torch.int64)
        del second, third
    assert totals(tape) == [400, 420, 20, 28, 8, 0] or totals(tape) == [400, 420, 20, 28, 20, 0]
    assert [event.birth for event in tape.events] == [True, True, False, True, False, False]


def test_views_and_in_place_operations_allocate_nothing() -> None:
    with recording() as tape:
        base = torch.empty(6, 4)
        kept = [base.view(24), base.t(), base[1:3], base.unsqueeze(0).expand(5, 6, 4), base.detach()]
        base.add_(1.0).mul_(2.0).zero_()
        torch.relu_(base)
    assert len(kept) == 5
    assert [event.block.num_bytes for event in tape.events if event.birth] == [96]


def test_a_view_keeps_its_storage_alive() -> None:
    with recording() as tape:
        base = torch.empty(6, 4)
        view = base[0]
        del base
        assert totals(tape)[-1] == 96
        del view
        assert totals(tape)[-1] == 0


def test_what_autograd_saves_lives_until_the_graph_is_gone() -> None:
    with recording() as tape:
        weight = torch.empty(8, 8, requires_grad=True)
        entry = torch.empty(4, 8)
        hidden = torch.nn.functional.linear(entry, weight)  # saves entry
        output = torch.sigmoid(hidden)  # saves its output
        del hidden
        loss = output.sum()
        del output, entry
        assert totals(tape)[-1] == 256 + 128 + 128 + 4
        loss.backward()
        del loss
        assert weight.grad is not None
        assert totals(tape)[-1] == 256 + 256


def test_sizes_are_written_in_batch_and_length() -> None:
    with recording() as tape:
        kept = [
            torch.empty(BATCH, LENGTH, 64, dtype=torch.bfloat16),
            torch.empty(BATCH * (LENGTH - 1), dtype=torch.int64),
            torch.empty(64, 32),
        ]
    assert len(kept) == 3
    births = [event.block.size for event in tape.events if event.birth]
    assert births == [{(1, 1, 0): 128}, {(1, 1, 0): 8, (1, 0, 0): -8}, {(0, 0, 0): 8192}]


def test_padded_rows_are_written_with_their_padding() -> None:
    with recording() as tape:
        kept = torch.empty_strided((BATCH * LENGTH, 20), (24, 1), dtype=torch.bfloat16)
    assert kept.shape == (BATCH * LENGTH, 20)
    (birth,) = (event.block for event in tape.events if event.birth)
    assert birth.size == {(1, 1, 0): 48}


def test_a_storage_that_cannot_be_factored_is_an_error_and_names_the_operation() -> None:
    with recording() as tape, pytest.raises(NotImplementedError, match=r"aten\.empty_strided"):
        torch.empty_strided((4, 4), (1, 100))
        raise AssertionError(tape.events)


def test_categories_sum_to_the_whole_at_every_instant() -> None:
    with recording() as tape:
        weight = torch.empty(8, 8, requires_grad=True)
        tape.mark([weight], Category.PARAMETERS)
        tape.phase = Phase.TRAIN_STEP
        tape.region = Region.BACKBONE
        hidden = torch.nn.functional.linear(torch.empty(BATCH, LENGTH, 8), weight)
        tape.enter_region(Region.HEAD)
        loss = hidden.square().mean()
        tape.region = Region.BACKWARD
        loss.backward()
    profile = build_profile(tape.events, {}, {})
    monomials = [BATCH**i * LENGTH**j for i, j, _ in profile.exponents]
    by_instant = (profile.live @ monomials).sum(axis=1)
    after_birth = [
        total
        for total, event, following in zip(totals(tape), tape.events, [*tape.events[1:], None], strict=True)
        if event.birth and (following is None or following.instant != event.instant or not following.birth)
    ]
    assert by_instant.tolist() == after_birth
    assert (profile.live @ monomials).min() >= 0


def test_what_has_no_data_is_answered_with_a_value_that_leads_on() -> None:
    with recording() as tape:
        assert torch.empty(1, dtype=torch.int64).item() == 1
        assert torch.empty(1).item() == 1.0
        assert bool(torch.empty(3, dtype=torch.bool).any())
        assert torch.empty(2, 3, dtype=torch.bool).all().item() is True
        tape.padded = True
        assert torch.empty(2, 3, dtype=torch.bool).all().item() is False
        assert torch.empty(3, dtype=torch.bool).all().item() is True  # a comparison of numbers, no mask


def test_data_dependent_shapes_take_the_worst_case() -> None:
    with recording():
        mask = torch.empty(6, 4, dtype=torch.bool)
        assert mask.nonzero().shape == (24, 2)
        assert torch.empty(6, 4)[mask].shape == (24,)
        assert torch.empty(6, 4).masked_select(mask).shape == (24,)


def test_an_operation_that_fails_is_named() -> None:
    with recording() as tape:
        with pytest.raises(RuntimeError):
            torch.unique(torch.empty(4))
        assert "unique" in tape.failed


GROUPED: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((12, 24), (3, 24, 20)), ((12, 24), (3, 24, 40))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("left", "right"), GROUPED)
def test_grouped_products_have_the_layout_of_the_real_kernel(
    dtype: torch.dtype, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    def product() -> torch.Tensor:
        offsets = torch.full((3,), 12, dtype=torch.int32)
        weight = torch.empty(right[0], right[2], right[1], dtype=dtype).transpose(1, 2)
        return torch._grouped_mm(torch.zeros(left, dtype=dtype), weight, offs=offsets)

    real = product()
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(1, 1, False, False), twins=worst_case.twins(), fake=fake)
    with fake, tape:
        traced = product()
        assert (traced.shape, traced.stride(), traced.dtype) == (real.shape, real.stride(), real.dtype)
        assert traced.untyped_storage().nbytes() == real.untyped_storage().nbytes()


Operation = Callable[[], Any]
OPERATIONS: dict[str, Operation] = {
    "add": lambda: torch.empty(3, 1) + torch.empty(4),
    "mixed_types": lambda: torch.empty(3, dtype=torch.bfloat16) * torch.empty(3),
    "matmul": lambda: torch.empty(2, 5, 8) @ torch.empty(8, 3),
    "linear": lambda: torch.nn.functional.linear(torch.empty(2, 5, 8), torch.empty(6, 8), torch.empty(6)),
    "transposed_sum": lambda: torch.empty(4, 6).t() + torch.empty(6, 4),
    "softmax": lambda: torch.softmax(torch.empty(2, 4, 6, dtype=torch.bfloat16), -1, dtype=torch.float32),
    "layer_norm": lambda: torch.native_layer_norm(torch.empty(2, 8), [8], None, None, 1e-5),
    "topk": lambda: torch.empty(5, 9).topk(3),
    "sort": lambda: torch.empty(9).sort(),
    "cat": lambda: torch.cat([torch.empty(2, 3), torch.empty(4, 3)]),
    "embedding": lambda: torch.nn.functional.embedding(
        torch.zeros(2, 3, dtype=torch.int64), torch.empty(7, 4)
    ),
    "conversion": lambda: torch.empty(3).to(torch.bfloat16),
    "no_conversion": lambda: torch.empty(3).to(torch.float32),
    "contiguous": lambda: torch.empty(3, 4).t().contiguous(),
    "no_contiguous": lambda: torch.empty(3, 4).contiguous(),
    "reshape_copies": lambda: torch.empty(3, 4).t().reshape(12),
    "view": lambda: torch.empty(3, 4).view(2, 6),
    "narrow": lambda: torch.empty(5, 4)[1:3, ::2],
    "expand": lambda: torch.empty(1, 4).expand(3, 4),
    "permute": lambda: torch.empty(2, 3, 4).permute(2, 0, 1),
    "split": lambda: torch.empty(6, 4).split(2),
    "chunk": lambda: torch.empty(2, 6).chunk(2, -1),
    "in_place": lambda: torch.empty(3, 4).add_(1.0),
    "out": lambda: torch.mm(torch.empty(3, 4), torch.empty(4, 5), out=torch.empty(3, 5)),
    "index": lambda: torch.empty(5, 4)[torch.zeros(3, dtype=torch.int64)],
    "repeat": lambda: torch.empty(3).repeat_interleave(2),
    "norms": lambda: torch._foreach_norm([torch.empty(3), torch.empty(4)]),
    "view_as_type": lambda: torch.empty(4).view(torch.int32),
}


def description(mode: FakeTensorMode, operation: Operation) -> list[Any]:
    """Shapes, strides, offsets, types, sizes of storages, and which tensors share one."""
    with mode:
        result = operation()
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        return [
            (
                t.shape,
                t.stride(),
                t.storage_offset(),
                t.dtype,
                t.untyped_storage().nbytes(),
                storages.index(own),
            )
            for t, own in zip(tensors, storages, strict=True)
        ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_fast_mode_answers_as_torchs_own(name: str) -> None:
    fast, expected = FastFakeTensorMode(), description(FakeTensorMode(), OPERATIONS[name])
    tape = Tape(TracedShape(1, 1, False, False), fake=fast)
    assert description(fast, OPERATIONS[name]) == expected
    with fast, tape:  # the second answer comes from the shortcut, where there is one
        assert description(fast, OPERATIONS[name]) == expected
        assert description(fast, OPERATIONS[name]) == expected


@pytest.mark.parametrize(
    ("name", "operation", "shares"),
    [
        ("view", lambda base: base.view(12), True),
        ("transpose", lambda base: base.t(), True),
        ("slice", lambda base: base[1:], True),
        ("detach", lambda base: base.detach(), True),
        ("in place", lambda base: base.mul_(2.0), True),
        ("same dtype", lambda base: base.to(torch.float32), True),
        ("contiguous already", lambda base: base.contiguous(), True),
        ("reshape of the transpose", lambda base: base.t().reshape(12), False),
        ("clone", lambda base: base.clone(), False),
        ("other dtype", lambda base: base.to(torch.float16), False),
        ("arithmetic", lambda base: base + 1.0, False),
    ],
)
def test_outputs_share_the_argument_where_torchs_do(
    name: str, operation: Callable[[torch.Tensor], torch.Tensor], shares: bool
) -> None:
    fast = FastFakeTensorMode()
    tape = Tape(TracedShape(1, 1, False, False), fake=fast)
    with fast, tape:
        for _ in range(3):
            base = torch.empty(3, 4)
            result = operation(base)
            assert (result.untyped_storage()._cdata == base.untyped_storage()._cdata) is shares, name


def test_each_thread_takes_the_matrix_librarys_workspaces_at_its_first_product() -> None:
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(1, 1, False, False), fake=fake, has_matrix_library=True)
    with fake, tape:
        tape.phase = Phase.TRAIN_STEP
        first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4)
        second(first(torch.empty(2, 4)).exp()).sum().backward()
    assert [birth.removeprefix("aten.").split(".")[0] for birth in library_births(tape)] == [
        "mm",  # forward: the first product, and what lies behind it
        "workspace",
        "addmm",  # a bias, so the other library too
        "workspace 1 MiB",
        "mm",  # backward: no product here adds a bias
        "workspace",
        "mm",
        "mm",
    ]


def library_births(tape: Tape) -> list[str]:
    """Products and workspaces in the order of their births."""
    names = [event.block for event in tape.events if event.birth]
    return [
        "workspace 1 MiB" if block.category is Category.WORKSPACES and block.num_bytes else block.operation
        for block in names
        if block.category is Category.WORKSPACES or "mm." in block.operation
    ]


def test_a_cpu_has_no_workspaces() -> None:
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(1, 1, False, False), fake=fake)
    with fake, tape:
        tape.phase = Phase.TRAIN_STEP
        torch.empty(2, 4) @ torch.empty(4, 4)
    assert all(event.block.category is None for event in tape.events)


def test_the_gradient_of_picked_rows_is_written_in_place() -> None:
    """As the real engine does: the zeros it starts from are the gradient."""
    rows, width = 1000, 512

    def run() -> None:
        picked = torch.ones(rows, width, requires_grad=True)
        picked[torch.ones(rows, dtype=torch.bool)].sum().backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    real = [event.nbytes() for event in events if event.name() == "[memory]"]
    fake = FastFakeTensorMode()
    tape = Tape(TracedShape(1, 1, False, False), twins=worst_case.twins(), fake=fake)
    with fake, tape:
        run()
    traced = [event.block.num_bytes for event in tape.events if event.birth]
    large = rows * width * 4
    assert sum(size == large for size in real) == sum(size == large for size in traced)
