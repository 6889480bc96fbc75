"""What goes over a link comes out the same; what is no message is a PipelineError."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_dni.distributed import wire
from fused_dni.distributed.wire import HEADER, Kind, Message, PipelineError, decode, encode, size_of


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor | None:
    if draw(st.integers(0, 4)) == 0:
        return None
    dtype = draw(st.sampled_from(wire.DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    raw = torch.randint(0, 2 if dtype is torch.bool else 100, shape)
    t = raw.to(dtype)
    how = draw(st.sampled_from(["as it is", "transposed", "strided", "expanded"]))
    if how == "transposed":
        t = t.permute(*reversed(range(t.dim())))
    elif how == "strided" and t.dim():
        t = torch.stack([t, t], -1)[..., 0]
    elif how == "expanded":
        t = t.expand(3, *t.shape)
    return t


@given(
    st.lists(tensors(), max_size=wire.TENSORS),
    st.sampled_from(list(Kind)),
    st.integers(0, 2**62),
    st.integers(0, 7),
    st.integers(0, 100),
)
def test_round_trip(given, kind, step, flags, spare):
    message = Message(kind, step, flags, tuple(given))
    buffer = torch.full((size_of(message) + spare,), 255, dtype=torch.uint8)
    assert encode(message, buffer) == size_of(message)
    found = decode(buffer)
    assert found[:3] == message[:3]
    assert len(found.tensors) == len(given)
    before = [None if t is None else t.clone() for t in found.tensors]
    buffer.fill_(7)  # the next message: what was read is a copy
    for a, b, c in zip(found.tensors, given, before, strict=True):
        if b is None:
            assert a is None
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b) and torch.equal(a, c)


def written() -> torch.Tensor:
    message = Message(Kind.FORWARD, 3, 1, (torch.ones(3, 4), None, torch.tensor([1, 2])))
    buffer = torch.zeros(size_of(message), dtype=torch.uint8)
    encode(message, buffer)
    return buffer


@given(st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_corrupted_bytes_are_a_message_or_an_error(changes):
    buffer = written()
    for at, value in changes:
        buffer[at] = value
    try:
        found = decode(buffer)
    except PipelineError:
        return
    assert isinstance(found.kind, Kind) and len(found.tensors) <= wire.TENSORS
    wire.text_of(found)  # of whatever arrived under the kind of an error


@given(st.binary(min_size=HEADER, max_size=HEADER + 64))
def test_other_bytes_are_an_error(raw):
    with pytest.raises(PipelineError, match="another program or another version"):
        decode(torch.frombuffer(bytearray(raw), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 0, "protocol 1"),
        (4, 2, "protocol 1"),
        (8, 0, "holds kind 0"),
        (8, 6, "holds kind 6"),
        (12, 8, "flags 8"),
        (23, 255, "step -"),
        (24, 5, "and 5 tensors"),
        (28, 2, "tensor 0 has dtype code"),
        (32, 10, "dtype code 10"),
        (36, 9, "tensor 0 has"),
        (47, 255, "tensor 0 has"),
        (44, 1, "longer than its link's buffer"),
    ],
)
def test_each_field_is_looked_at(at, value, text):
    buffer = written()
    buffer[at] = value
    with pytest.raises(PipelineError, match=text):
        decode(buffer)


@pytest.mark.parametrize(
    "t",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros([1] * 9),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_mkldnn(),
    ],
    ids=["complex", "nine dimensions", "meta", "layout"],
)
def test_what_has_no_place_on_the_wire(t):
    buffer = torch.full((2048,), 9, dtype=torch.uint8)
    with pytest.raises(PipelineError, match="a tensor between stages must be dense"):
        encode(Message(Kind.FORWARD, tensors=(t,)), buffer)
    assert bool((buffer == 9).all())


def test_too_long_is_refused_before_anything_is_written():
    message = Message(Kind.FORWARD, tensors=(torch.zeros(100),))
    buffer = torch.full((size_of(message) - 1,), 9, dtype=torch.uint8)
    with pytest.raises(PipelineError, match="does not fit"):
        encode(message, buffer)
    assert bool((buffer == 9).all())


def test_bools_are_bools_whatever_arrives():
    message = Message(Kind.FORWARD, tensors=(torch.tensor([True, False]),))
    buffer = torch.zeros(size_of(message), dtype=torch.uint8)
    encode(message, buffer)
    buffer[HEADER] = 5
    (t,) = decode(buffer).tensors
    assert t.view(torch.uint8).tolist() == [1, 0]
