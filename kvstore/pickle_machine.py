"""The pickle machine: opcodes in, descriptions of arrays out.

Owns the opcodes that Python 3 needs for a flat dict of arrays, protocols 0 to 5, and the limits
on them. Symbols, dtypes and arrays mean what ``pickled`` says. The rules:

- An unknown opcode ends the parse; nothing is skipped over.
- One bound on the number of opcodes bounds the time, the stack, the memo and the nesting at
  once, because no opcode adds more than one entry to any of them.
- A size is compared with the bytes that are there before it is used.
- It reads a payload only through ``Bytes.read``, which says so: the template cache depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kvstore.errors import PacketError, SchemaError
from kvstore.pickled import (
    MEANINGS,
    SYMBOLS,
    Bytes,
    Dtype,
    Layout,
    PickledArray,
    Symbol,
    dtype_of_state,
    excerpt,
    expect,
    layout_of_state,
)
from kvstore.schema import FIELDS_MAX, NAME_BYTES_MAX, check_name

OPCODES_MAX = 128 * FIELDS_MAX  # protocol 0 takes about 70 for an array of datetimes
PROTOCOL_MAX = 5
INTEGER_BYTES_MAX = 8  # a dimension fits
LINE_BYTES_MAX = 64  # numbers and globals as protocols 0 to 3 write them

_NUMBER = re.compile(rb"-?[0-9]{1,20}L?")

# What people send by mistake, and what attacks try; any other opcode is named by its byte.
_REFUSED: dict[bytes, str] = {
    b"l": "a list",
    b"]": "a list",
    b"F": "a float",
    b"G": "a float",
    b"\x8f": "a set",
    b"\x91": "a frozenset",
    b"\x97": "an out-of-band buffer",
    b"P": "a persistent id",
    b"Q": "a persistent id",
    b"i": "an object",
    b"o": "an object",
    b"\x81": "an object",
    b"\x92": "an object",
    b"\x82": "an extension object",
    b"\x83": "an extension object",
    b"\x84": "an extension object",
}


class Machine:
    """One run over one pickle: a stack, marks and a memo of descriptions.

    Tuples may share their parts, so a thousand opcodes can describe one of 2**1000 leaves:
    never compare, hash or print a value whose exact type was not checked first.
    """

    def __init__(self, frame: memoryview) -> None:
        self.frame = frame
        self.position = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.decoded_bytes_left = len(frame)

    def run(self) -> dict[str, Layout]:
        """The arrays by name, in the pickle's order."""
        for _ in range(OPCODES_MAX):
            opcode = self.take(1).tobytes()
            if opcode == b".":
                return self.result()
            action = _ACTIONS.get(opcode)
            if action is None:
                found = _REFUSED.get(opcode, f"opcode {opcode!r}")
                raise self.error(f"holds {found}; only a dict of numpy arrays is accepted")
            action(self)
        raise PacketError(f"the pickle takes more than {OPCODES_MAX} steps")

    def result(self) -> dict[str, Layout]:
        """What STOP returns: one dict, nothing behind it, arrays only."""
        if self.position != len(self.frame):
            raise self.error(f"has {len(self.frame) - self.position} more bytes behind its end")
        found: dict[str, object] = expect(self.pop(), dict, "a packet")
        if self.stack or self.marks:
            raise self.error("has values left over at its end")
        layouts = {}
        for name, value in found.items():
            layout = value.layout if type(value) is PickledArray else None
            if layout is None:
                raise PacketError(f"field {name!r} is not a numpy array")
            layouts[name] = layout
        return layouts

    def error(self, reason: str) -> PacketError:
        """An error that says where in the pickle it was met."""
        return PacketError(f"the pickle {reason} (byte {self.position} of {len(self.frame)})")

    # -- bytes in --------------------------------------------------------------------------

    def take(self, size: int) -> memoryview:
        """The next bytes, as a view."""
        stop = self.position + size
        if stop > len(self.frame):
            raise self.error(f"ends where {size} more bytes belong")
        taken = self.frame[self.position : stop]
        self.position = stop
        return taken

    def unsigned(self, size: int) -> int:
        """The next bytes as a number."""
        return int.from_bytes(self.take(size), "little")

    def line(self, bytes_max: int) -> bytes:
        """Up to the next newline, found in windows that grow: most lines are a few bytes."""
        window = LINE_BYTES_MAX
        while True:
            seen = self.frame[self.position : self.position + min(window, bytes_max)].tobytes()
            length = seen.find(b"\n")
            if length >= 0:
                self.position += length + 1
                return seen[:length]
            if len(seen) < window:
                raise self.error("holds a line without an end")
            window *= 4

    def number_line(self) -> int:
        """A number as protocol 0 writes it."""
        text = self.line(LINE_BYTES_MAX)
        if not _NUMBER.fullmatch(text):
            raise self.error(f"holds {text[:32]!r} where a number belongs")
        return int(text.removesuffix(b"L"))

    # -- the stack and the memo ------------------------------------------------------------

    def push(self, value: object) -> None:
        """Push."""
        self.stack.append(value)

    def pop(self) -> object:
        """The last value, which must not lie below a mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.error("takes a value that is not there")
        return self.stack.pop()

    def pop_marked(self) -> list[object]:
        """All values above the last mark."""
        if not self.marks:
            raise self.error("takes a mark that is not there")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def pop_tuple(self, size: int) -> None:
        """The last values become one tuple."""
        values = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(values)))

    def put(self, key: int) -> None:
        """Remember the last value. Keys are any numbers: the memo is a dict, not an array."""
        value = self.pop()
        self.push(value)
        self.memo[key] = value

    def get(self, key: int) -> None:
        """Push a remembered value."""
        if key not in self.memo:
            raise self.error(f"refers to memo {key}, which is not there")
        self.push(self.memo[key])

    # -- values ----------------------------------------------------------------------------

    def protocol(self) -> None:
        """The version; it changes nothing, opcodes mean the same in all."""
        version = self.unsigned(1)
        if version > PROTOCOL_MAX:
            raise self.error(f"is of protocol {version}; 0 to {PROTOCOL_MAX} are understood")

    def frame_start(self) -> None:
        """A hint for readers of files; its claim must still hold."""
        announced = self.unsigned(8)
        if announced > len(self.frame) - self.position:
            raise self.error(f"announces a frame of {announced} bytes and has fewer")

    def number_or_flag(self) -> None:
        """INT: a number, or ``00`` and ``01``, as protocols 0 and 1 write a bool."""
        flag = self.frame[self.position : self.position + 3].tobytes()
        if flag in (b"00\n", b"01\n"):
            self.position += 3
            self.push(flag == b"01\n")
        else:
            self.push(self.number_line())

    def long(self) -> None:
        """An integer beyond 32 bits, such as a large dimension."""
        size = self.unsigned(1)
        if size > INTEGER_BYTES_MAX:
            raise self.error(f"holds an integer of {size} bytes; {INTEGER_BYTES_MAX} are enough")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, data: bytes | memoryview, encoding: str) -> None:
        """Text; at most four times the bytes it is read from."""
        try:
            self.push(str(data, encoding))
        except UnicodeDecodeError as error:
            raise self.error(f"holds text that is not {encoding}") from error

    def payload(self, size: int) -> None:
        """Bytes, left where they are."""
        start = self.position
        self.push(Bytes(self.take(size), start))

    # -- dicts -----------------------------------------------------------------------------

    def set_items(self, pairs: list[object]) -> None:
        """Names and values into the dict below them."""
        target: dict[str, object] = expect(self.pop(), dict, "a packet")
        if len(pairs) % 2:
            raise self.error("sets a field without a value")
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            key = _field_name(name)
            if key in target:
                raise PacketError(f"field {key!r} comes twice")
            target[key] = value
        if len(target) > FIELDS_MAX:
            raise PacketError(f"more than {FIELDS_MAX} fields")
        self.push(target)

    def set_item(self) -> None:
        """One name and value into the dict below them."""
        value, name = self.pop(), self.pop()
        self.set_items([name, value])

    def new_dict(self) -> None:
        """The marked names and values as a dict."""
        pairs = self.pop_marked()
        self.push({})
        self.set_items(pairs)

    # -- symbols ---------------------------------------------------------------------------

    def symbol(self, module: object, name: object) -> None:
        """Look a global up in the table. Nothing is imported."""
        names = (expect(module, str, "a module's name"), expect(name, str, "a global's name"))
        found = SYMBOLS.get(names)
        if found is None:
            raise self.error(
                f"refers to {excerpt('.'.join(names))}, which is no part of an array;"
                " only a dict of numpy arrays is accepted"
            )
        self.push(found)

    def symbol_lines(self) -> None:
        """GLOBAL: module and name on a line each."""
        module = self.line(LINE_BYTES_MAX).decode("latin-1")
        self.symbol(module, self.line(LINE_BYTES_MAX).decode("latin-1"))

    def symbol_above(self) -> None:
        """STACK_GLOBAL: module and name from the stack."""
        name, module = self.pop(), self.pop()
        self.symbol(module, name)

    def reduce(self) -> None:
        """What calling the symbol with these arguments would describe. Nothing is called."""
        arguments = expect(self.pop(), tuple, "arguments")
        symbol = expect(self.pop(), Symbol, "what is called")
        if symbol is Symbol.ENCODE and arguments and type(arguments[0]) is str:
            # One text encoded many times over would take many times the frame.
            self.decoded_bytes_left -= len(arguments[0])
            if self.decoded_bytes_left < 0:
                raise self.error("decodes more bytes than it has")
        self.push(MEANINGS[symbol](arguments))

    def build(self) -> None:
        """A state for the dtype or array below it, once."""
        state, target = expect(self.pop(), tuple, "a state"), self.pop()
        if type(target) is Dtype and target.dtype is None:
            target.dtype = dtype_of_state(target.code, state)
        elif type(target) is PickledArray and target.layout is None:
            target.layout = layout_of_state(state)
        else:
            raise self.error("sets the state of something that has one, or takes none")
        self.push(target)


def _field_name(value: object) -> str:
    name = expect(value, str, "a field's name")
    if len(name) > NAME_BYTES_MAX:
        raise PacketError(f"a field's name of {len(name)} characters; {NAME_BYTES_MAX} at most")
    try:
        check_name(name, "field")
    except SchemaError as error:
        raise PacketError(str(error)) from error
    return name


_ACTIONS: dict[bytes, Callable[[Machine], None]] = {
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"t": lambda m: m.push(tuple(m.pop_marked())),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.pop_tuple(1),
    b"\x86": lambda m: m.pop_tuple(2),
    b"\x87": lambda m: m.pop_tuple(3),
    b"}": lambda m: m.push({}),
    b"d": Machine.new_dict,
    b"s": Machine.set_item,
    b"u": lambda m: m.set_items(m.pop_marked()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": Machine.number_or_flag,
    b"L": lambda m: m.push(m.number_line()),
    b"K": lambda m: m.push(m.unsigned(1)),
    b"M": lambda m: m.push(m.unsigned(2)),
    b"J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    b"\x8a": Machine.long,
    b"V": lambda m: m.text(m.line(len(m.frame)), "raw-unicode-escape"),
    b"X": lambda m: m.text(m.take(m.unsigned(4)), "utf-8"),
    b"\x8c": lambda m: m.text(m.take(m.unsigned(1)), "utf-8"),
    b"C": lambda m: m.payload(m.unsigned(1)),
    b"B": lambda m: m.payload(m.unsigned(4)),
    b"\x8e": lambda m: m.payload(m.unsigned(8)),
    b"\x96": lambda m: m.payload(m.unsigned(8)),
    b"p": lambda m: m.put(m.number_line()),
    b"q": lambda m: m.put(m.unsigned(1)),
    b"r": lambda m: m.put(m.unsigned(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: m.get(m.number_line()),
    b"h": lambda m: m.get(m.unsigned(1)),
    b"j": lambda m: m.get(m.unsigned(4)),
    b"c": Machine.symbol_lines,
    b"\x93": Machine.symbol_above,
    b"R": Machine.reduce,
    b"b": Machine.build,
    b"\x80": Machine.protocol,
    b"\x95": Machine.frame_start,
}
