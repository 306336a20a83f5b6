"""Slots never overlap, frames never leave their slot, and sizes round up by little."""

import itertools
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.transport.geometry import DEPTH, DTYPE_CODES, Geometry, class_bytes, size_class
from actors.transport.slots import SlotBuffer

geometries = st.builds(
    Geometry,
    hidden=st.integers(1, 300),
    top_k=st.integers(1, 9),
    dtype=st.sampled_from(list(DTYPE_CODES)),
    max_tokens=st.integers(1, 70),
    lanes=st.integers(1, 8),
)


@given(st.integers(1, 1 << 28))
def test_size_class_holds_and_is_the_smallest(nbytes):
    index = size_class(nbytes)
    size = class_bytes(index)
    assert nbytes <= size <= max(256, nbytes * 33 / 32 + 256)
    assert index == 0 or class_bytes(index - 1) < nbytes


@given(geometries, st.data())
def test_parts_of_a_frame_do_not_overlap(geometry, data):
    tokens = data.draw(st.integers(1, geometry.max_tokens))
    dense = data.draw(st.booleans())
    most = tokens * geometry.top_k
    pairs = most if dense else data.draw(st.integers(1, most))
    layout = geometry.layout(tokens, pairs, dense)
    parts = [
        (0, geometry.answer_bytes(tokens)),
        (layout.ids, 4 * pairs),
        (layout.weights, 4 * pairs),
    ]
    if not dense:
        parts.append((layout.rows, 4 * pairs))
    for (start, size), (after, _) in itertools.pairwise(parts):
        assert start + size <= after
    assert parts[-1][0] + parts[-1][1] == layout.nbytes
    assert class_bytes(size_class(layout.nbytes)) <= geometry.slot_bytes


@settings(max_examples=25, deadline=None)
@given(geometries, st.data())
def test_slots_do_not_overlap_in_memory(geometry, data):
    slots = SlotBuffer(geometry)
    tokens = data.draw(st.integers(1, geometry.max_tokens))
    every = [
        slots.views(slot, tokens, tokens * geometry.top_k, dense=False)
        for slot in range(geometry.slots)
    ]
    for slot, views in enumerate(every):
        for number, part in enumerate(views[:4]):
            part.fill_(slot * 4 + number + 1)
    for slot, views in enumerate(every):
        for number, part in enumerate(views[:4]):
            assert bool((part == slot * 4 + number + 1).all())
    last = every[-1]
    end = last.rows.data_ptr() + last.rows.nbytes
    assert end <= slots.address + geometry.slots * geometry.slot_bytes


@given(geometries)
def test_a_lane_has_slots_of_its_own_in_turn(geometry):
    taken = [
        [geometry.slot(lane, chunk) for chunk in range(DEPTH)] for lane in range(geometry.lanes)
    ]
    assert sorted(slot for lane in taken for slot in lane) == list(range(geometry.slots))
    for lane, slots in enumerate(taken):
        assert [geometry.slot(lane, chunk + DEPTH) for chunk in range(DEPTH)] == slots


def test_views_have_the_shapes_of_their_frames():
    slots = SlotBuffer(Geometry(16, 3, torch.float16, 8, 2))
    dense = slots.views(1, 5, 15, dense=True)
    assert [tuple(t.shape) for t in dense[:3]] == [(5, 16), (5, 3), (5, 3)]
    assert dense.rows is None
    pairs = slots.views(1, 5, 7, dense=False)
    assert [tuple(t.shape) for t in pairs[:4]] == [(5, 16), (7,), (7,), (7,)]


@pytest.mark.parametrize(
    ("tokens", "pairs", "dense", "says"),
    [
        (9, 9, False, "holds 1 to 8"),
        (0, 1, False, "holds 1 to 8"),
        (2, 7, False, "expected 1 to 6"),
        (2, 0, False, "expected 1 to 6"),
        (2, 5, True, "expected 6"),
    ],
)
def test_frames_that_do_not_fit(tokens, pairs, dense, says):
    with pytest.raises(ValueError, match=says):
        Geometry(16, 3, torch.float16, 8).layout(tokens, pairs, dense)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", 0), ("top_k", 0), ("max_tokens", 0), ("lanes", 0), ("lanes", 9)],
)
def test_bad_geometry(field, value):
    good = {"hidden": 16, "top_k": 2, "dtype": "bfloat16", "max_tokens": 8, "lanes": 1}
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        Geometry(**{**good, field: value})


def test_dtype_by_name_and_refusal():
    assert Geometry(16, 2, "float32", 8).dtype is torch.float32  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"int8 can't be sent; use one of torch\.bfloat16"):
        Geometry(16, 2, torch.int8, 8)


def test_touched_slots_are_in_memory():
    geometry = Geometry(256, 2, torch.float32, 512, 3)
    fresh, touched = SlotBuffer(geometry), SlotBuffer(geometry)
    touched.touch()
    assert _faults(lambda: _write_first_parts(fresh)) > 0
    assert _faults(lambda: _write_first_parts(touched)) == 0


def _write_first_parts(slots):
    size = slots.geometry.slot_bytes
    for lane in range(slots.geometry.lanes):
        slots.bytes[lane * size : lane * size + 4096 : 512] = 1


def _faults(work):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
