"""What goes over a link: a header of fixed size and the bytes of tensors, and nothing that runs.

A message is ``HEADER`` bytes (:data:`LAYOUT`, little-endian) and behind them its tensors one after
the other, each at a multiple of ``ALIGNMENT``. Nothing is unpickled: a header that does not hold
what it may is an error.
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

PROTOCOL = 1
MAGIC = b"fDNI"
TENSORS, DIMS = 4, 8
# magic, protocol, kind, flags, step, tensors; then by tensor: there, dtype, dims, shape.
_FRONT = struct.Struct("<4sIIIqI")
_TENSOR = struct.Struct(f"<III{DIMS}q")
LAYOUT = f"{_FRONT.format} + {TENSORS} * {_TENSOR.format}"
ALIGNMENT = 64
HEADER = -(-(_FRONT.size + TENSORS * _TENSOR.size) // ALIGNMENT) * ALIGNMENT

# By their code on the wire: the position.
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class PipelineError(RuntimeError):
    """A pipeline that cannot go on: a stage that failed, vanished or stays silent, or a message
    that is not what it must be. Every stage raises it; nothing of the message was applied."""


class Kind(IntEnum):
    """What a message is."""

    OPEN = 1  # int64 [2]: the size of the messages that follow, and the window
    FORWARD = 2  # h, target, context
    GRADIENT = 3  # the gradient at the receiver's output in that step
    END = 4  # nothing follows
    ERROR = 5  # a text: this end has failed


class Flag(IntEnum):
    """What the sender of a forward message wants."""

    TARGET = 1  # the gradient of this step
    WAITS = 2  # and it does not go on for ever without: it must not be dropped
    CONTEXT = 4  # the context is the target


class Message(NamedTuple):
    """A message: what it is, the step that it belongs to, what goes with it."""

    kind: Kind
    step: int = 0
    flags: int = 0
    tensors: tuple[Tensor | None, ...] = ()


def text_of(message: Message) -> str:
    """Return the text of an error message; where it has none, that."""
    text = message.tensors[0] if message.tensors else None
    if text is None or text.dtype != torch.uint8:
        return "for a reason that did not arrive"
    return bytes(text.flatten().tolist()).decode("utf-8", "replace")


def error(text: str) -> Message:
    """Make an error message, of at most 1,000 bytes of text."""
    raw = text.encode("utf-8")[:1000] or b"?"
    return Message(Kind.ERROR, tensors=(torch.tensor(list(raw), dtype=torch.uint8),))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def size_of(message: Message) -> int:
    """Return the bytes that a message takes on the wire."""
    return HEADER + sum(_aligned(t.nbytes) for t in message.tensors if t is not None)


def encode(message: Message, buffer: Tensor) -> int:
    """Write a message into ``buffer`` (uint8 [capacity], mutated); the bytes that it takes.

    Raises:
        PipelineError: it does not fit, or holds what has no place on the wire; nothing is written.
    """
    for t in message.tensors:
        if t is not None and (
            t.dtype not in DTYPES or t.dim() > DIMS or t.layout != torch.strided or t.is_meta
        ):
            raise PipelineError(
                f"a tensor between stages must be dense, of one of {[str(d) for d in DTYPES]} and "
                f"have at most {DIMS} dimensions, got {t.dtype} {list(t.shape)}, {t.layout} on "
                f"{t.device}"
            )
    size = size_of(message)
    if size > buffer.numel():
        raise PipelineError(
            f"a message of {size:,} bytes does not fit into the link's {buffer.numel():,}, the "
            "size of its first one: make the first batch the largest, or give capacity="
        )
    if len(message.tensors) > TENSORS:
        raise PipelineError(f"a message has at most {TENSORS} tensors, got {len(message.tensors)}")
    fields = bytearray(HEADER)
    _FRONT.pack_into(
        fields, 0, MAGIC, PROTOCOL, message.kind, message.flags, message.step, len(message.tensors)
    )
    for i, t in enumerate(message.tensors):
        if t is None:
            continue
        shape = (*t.shape, *(0,) * (DIMS - t.dim()))
        place = _FRONT.size + i * _TENSOR.size
        _TENSOR.pack_into(fields, place, 1, DTYPES.index(t.dtype), t.dim(), *shape)
    buffer[:HEADER].copy_(torch.frombuffer(fields, dtype=torch.uint8))
    at = HEADER
    for t in message.tensors:
        if t is not None and t.numel():
            buffer[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t.detach())
        at += 0 if t is None else _aligned(t.nbytes)
    return size


def decode(buffer: Tensor) -> Message:
    """Read a message out of ``buffer`` (uint8, at least ``HEADER``); its tensors are copies.

    Raises:
        PipelineError: what is there is no message of this protocol, or does not fit the buffer.
    """
    raw = bytes(buffer[:HEADER].numpy())
    magic, protocol, kind, flags, step, count = _FRONT.unpack_from(raw)
    if magic != MAGIC or protocol != PROTOCOL:
        raise PipelineError(
            f"a message does not begin as one of protocol {PROTOCOL} does: the other end is "
            "another program or another version"
        )
    if kind not in list(Kind) or count > TENSORS or step < 0 or flags >= 8:
        raise PipelineError(
            f"a message's header holds kind {kind}, step {step}, flags {flags} and {count} tensors"
        )
    tensors: list[Tensor | None] = []
    at = HEADER
    for i in range(count):
        there, code, dims, *shape = _TENSOR.unpack_from(raw, _FRONT.size + i * _TENSOR.size)
        if not there:
            tensors.append(None)
            continue
        if there != 1 or code >= len(DTYPES) or dims > DIMS or min(shape) < 0:
            raise PipelineError(f"a message's tensor {i} has dtype code {code}, shape {shape}")
        sizes, dtype = shape[:dims], DTYPES[code]
        length = math.prod(sizes) * dtype.itemsize
        if at + length > buffer.numel():
            raise PipelineError(
                f"a message's tensor {i}, {dtype} {sizes}, is longer than its link's buffer"
            )
        found = buffer[at : at + length]
        # A bool that is neither 0 nor 1 is undefined.
        found = found != 0 if dtype is torch.bool else found.clone().view(dtype)
        tensors.append(found.view(sizes))
        at += _aligned(length)
    return Message(Kind(kind), step, flags, tuple(tensors))
