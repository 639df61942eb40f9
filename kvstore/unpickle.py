"""Pickles of "dict of arrays", decoded without running anything they name.

Understands what Python 3 with numpy 1 or 2 writes for a flat dict of arrays, protocols 0 to 5,
and nothing else. The rules:

- Nothing in the input is ever called or imported. A global is looked up in a fixed table of
  symbols, and a symbol only says which array, dtype or bytes are described.
- Arrays are read-only views of the frame, no copy. Only protocols 0 to 2, which spell bytes as
  text, need a decoded copy, no larger than the frame.
- Nothing is allocated on the word of the input: sizes and shapes are compared with the bytes
  that came.
- Numbers, booleans, datetimes and 'U' text only; no objects, structures or sub-arrays.

Why not ``pickle.Unpickler`` with a restricted ``find_class``? It still interprets every opcode:
one LONG_BINPUT with index 2**31 makes the C unpickler fill a memo of 32 GB, BINBYTES8 allocates
what the input claims before it looks, containers nest without end, and BUILD sets attributes on
whatever is on the stack.

**The template cache.** Streams repeat themselves: the pickles of two packets with as many rows
differ in the arrays' bytes only. After a parse the decoder remembers the skeleton, all bytes
outside the arrays' payloads; a later pickle of the same length with the same skeleton becomes
views at once. That is no guess. The parser decides on nothing but the length and the bytes that
it reads, and it never reads a payload (one that it did read, because the same bytes also served
as a datetime's unit, makes the pickle uncacheable). So the same skeleton is the same parse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvstore.pickle_machine import Machine

if TYPE_CHECKING:
    from kvstore.pickled import Bytes, Layout, Shape
    from kvstore.schema import Array

TEMPLATES_MAX = 2048  # the brief's packets have 1000 sizes
SKELETON_BYTES_MAX = 4 << 20  # of all templates together; three plain fields take 260 bytes


class _Template(NamedTuple):
    """How every pickle with these bytes (start, stop, expected) outside its payloads parses.

    The arrays are kept as numbers, not as layouts: those hold on to the frame's memory.
    """

    skeleton: list[tuple[int, int, bytes]]
    arrays: list[tuple[str, Shape, np.dtype[Any], int, Shape | None]]

    def skeleton_bytes(self) -> int:
        return sum(len(part) for _, _, part in self.skeleton)


class Unpickler:
    """Decodes the pickles of one stream, fast where they resemble each other."""

    def __init__(self) -> None:
        self._templates: dict[int, _Template] = {}  # by length of the pickle
        self._skeleton_bytes = 0

    def loads(self, frame: memoryview) -> dict[str, Array]:
        """The arrays of one pickle, as views that keep the frame's memory alive.

        frame: contiguous unsigned bytes, read-only unless the arrays may be written to; they
        must not change while the arrays are used. The arrays need not be aligned in memory.
        Raises PacketError, without the packet's number and offset, which only the caller knows.
        """
        template = self._templates.get(len(frame))
        if template is not None:
            for start, stop, expected in template.skeleton:
                if frame[start:stop].tobytes() != expected:
                    break
            else:
                # Spelt out, not Layout.view: this line is most of the cost of a small packet.
                ndarray = np.ndarray
                return {
                    name: ndarray(shape, dtype, frame, start, strides)
                    for name, shape, dtype, start, strides in template.arrays
                }
        layouts = Machine(frame).run()
        self._remember(frame, layouts)
        return {name: layout.view(frame) for name, layout in layouts.items()}

    def _remember(self, frame: memoryview, layouts: dict[str, Layout]) -> None:
        payloads = {layout.data.start: layout.data for layout in layouts.values()}
        if any(start < 0 or payload.was_read for start, payload in payloads.items()):
            return
        arrays = [(name, x.shape, x.dtype, x.data.start, x.strides) for name, x in layouts.items()]
        template = _Template(_skeleton(frame, payloads), arrays)
        replaced = self._templates.pop(len(frame), None)
        self._skeleton_bytes += template.skeleton_bytes()
        self._skeleton_bytes -= replaced.skeleton_bytes() if replaced else 0
        if len(self._templates) >= TEMPLATES_MAX or self._skeleton_bytes > SKELETON_BYTES_MAX:
            # Begin again rather than keep an order of use: such a stream hardly repeats itself.
            self._templates.clear()
            self._skeleton_bytes = template.skeleton_bytes()
        if self._skeleton_bytes <= SKELETON_BYTES_MAX:
            self._templates[len(frame)] = template


def _skeleton(frame: memoryview, payloads: dict[int, Bytes]) -> list[tuple[int, int, bytes]]:
    parts, position = [], 0
    for start in sorted(payloads):
        parts.append((position, start, frame[position:start].tobytes()))
        position = start + len(payloads[start].data)
    parts.append((position, len(frame), frame[position:].tobytes()))
    return parts
