"""Pickles: what numpy writes is understood, all else is refused, and nothing in it runs."""

from __future__ import annotations

import importlib.util
import os
import pickle
import time
import tracemalloc
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kvstore import pickle_machine, unpickle
from kvstore.errors import PacketError
from kvstore.unpickle import Unpickler

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted((GOLDEN / "packets").glob("*.packets"))


def golden_module():
    spec = importlib.util.spec_from_file_location("make_packets", GOLDEN / "make_packets.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXPECTED = golden_module().expected()


def pickles_of(stream):
    found, at = [], 0
    while at < len(stream):
        stop = at + 4 + int.from_bytes(stream[at : at + 4], "big")
        found.append(stream[at + 4 : stop])
        at = stop
    return found


def loads(data, unpickler=None):
    return (unpickler or Unpickler()).loads(memoryview(data))


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


# ---- what numpy writes ----


def test_there_are_golden_packets_of_both_numpys_and_all_protocols():
    assert len(FILES) == 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_pickles_give_what_was_pickled_parsed_and_from_the_cache(path):
    unpickler = Unpickler()
    for data, wanted in zip(pickles_of(path.read_bytes()), EXPECTED, strict=True):
        assert_same(loads(data, unpickler), wanted)
        assert_same(loads(data, unpickler), wanted)


DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    npst.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    npst.datetime64_dtypes(endianness="?"),
    npst.timedelta64_dtypes(endianness="?"),
    npst.unicode_string_dtypes(endianness="?", min_len=1, max_len=9),
)


@st.composite
def arrays(draw):
    # Bytes, not elements: every bit pattern counts, and drawing is fast.
    dtype = draw(DTYPES)
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = dtype.itemsize * int(np.prod(shape))
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)
    if draw(st.booleans()):
        array = array.copy()
    return array.transpose(draw(st.permutations(range(len(shape)))))


@given(
    st.dictionaries(st.sampled_from("abcdé"), arrays(), max_size=4),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
)
def test_any_dict_of_arrays_comes_back(batch, protocol):
    data = pickle.dumps(batch, protocol)
    unpickler = Unpickler()
    assert_same(loads(data, unpickler), batch)
    assert_same(loads(data, unpickler), batch)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_are_read_only_views_of_the_frame(protocol):
    frame = np.frombuffer(pickle.dumps({"a": np.arange(9.0)}, protocol), np.uint8)
    unpickler = Unpickler()
    for _ in range(2):
        array = unpickler.loads(frame.data)["a"]
        assert np.shares_memory(array, frame)
        assert not array.flags.writeable


def test_a_zero_dimensional_array_is_an_array_here():
    assert loads(pickle.dumps({"a": np.array(3.0)}))["a"].shape == ()


# ---- the cache ----


def outcome(unpickler, data):
    """Everything that can be told about a parse."""
    try:
        found = loads(data, unpickler)
    except PacketError as error:
        return error.reason
    return [(name, x.dtype, x.shape, x.strides, x.tobytes()) for name, x in found.items()]


CACHED = [data for path in FILES for data in pickles_of(path.read_bytes())]
SMALL = pickle.dumps({"t": np.arange(3.0), "d": np.zeros((2, 2), "M8[us]")}, 5)

CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3)


def changed(data, changes):
    mutable = bytearray(data)
    for position, value in changes:
        mutable[position % len(data)] = value
    return bytes(mutable)


@given(st.sampled_from([SMALL, *CACHED]), CHANGES)
def test_the_cache_and_a_full_parse_agree_on_any_bytes(data, changes):
    warm = Unpickler()
    assert outcome(warm, data) == outcome(Unpickler(), data)
    other = changed(data, changes)
    assert outcome(warm, other) == outcome(Unpickler(), other)
    assert outcome(warm, data) == outcome(Unpickler(), data)


def test_the_cache_and_a_full_parse_agree_on_every_flipped_bit():
    warm = Unpickler()
    loads(SMALL, warm)
    accepted = 0
    for position in range(len(SMALL)):
        for bit in range(8):
            other = changed(SMALL, [(position, SMALL[position] ^ 1 << bit)])
            cold = outcome(Unpickler(), other)
            assert outcome(warm, other) == cold
            accepted += isinstance(cold, list)
            loads(SMALL, warm)
    assert accepted >= 8 * (3 + 4) * 8  # at least the payloads


@given(st.sampled_from([SMALL, *CACHED]), CHANGES)
def test_what_is_accepted_is_what_pickle_itself_would_give(data, changes):
    other = changed(data, changes)
    found = outcome(Unpickler(), other)
    if isinstance(found, list):  # so it names nothing but arrays, and pickle may load it
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            wanted = pickle.loads(other)  # numpy 2 warns of the modules that numpy 1 names
        assert_same(native(loads(other)), native(wanted))


def native(batch):
    """numpy itself turns big-endian arrays of protocols 0 to 4 around; the values are the same."""
    return {name: array.astype(array.dtype.newbyteorder("=")) for name, array in batch.items()}


def test_bytes_that_the_parse_depends_on_are_never_taken_for_payload():
    """One bytes object is the data of an array and the unit of another's datetimes."""

    def pickled(unit):
        codes = array(dtype("u1", -1, order="|"), tuple_of(i(2)), b"C\x02" + unit + b"q\x00")
        metadata = tuple_of(none(), tuple_of(b"h\x00", i(1), i(1), i(1)))
        times = array(dtype("M8", -1, metadata), tuple_of(i(1)), blob(bytes(8)))
        return b"}" + pair("codes", codes) + pair("times", times) + b"."

    warm = Unpickler()
    assert loads(pickled(b"us"), warm)["times"].dtype == "M8[us]"
    assert loads(pickled(b"ms"), warm)["times"].dtype == "M8[ms]"


def test_the_cache_keeps_no_frame_alive():
    unpickler = Unpickler()
    frame = np.frombuffer(SMALL, np.uint8).copy()
    gone = weakref.ref(frame)
    unpickler.loads(frame.data)
    assert unpickler._templates
    del frame
    assert gone() is None


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(unpickle, "TEMPLATES_MAX", 10)
    unpickler = Unpickler()
    for rows in range(50):
        loads(pickle.dumps({"t": np.zeros(rows)}), unpickler)
        assert len(unpickler._templates) <= 10
    monkeypatch.setattr(unpickle, "SKELETON_BYTES_MAX", 1000)
    for rows in range(50):
        loads(pickle.dumps({"t": np.zeros(rows)}), unpickler)
        held = sum(template.skeleton_bytes() for template in unpickler._templates.values())
        assert held == unpickler._skeleton_bytes <= 1000
    big = pickle.dumps({f"f{n}": np.zeros(1) for n in range(100)})
    assert len(loads(big, unpickler)) == 100


# ---- pickles by hand ----


def s(text):
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data


def i(number):
    return b"J" + number.to_bytes(4, "little", signed=True)


def none():
    return b"N"


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def name(module, what):
    return b"c" + f"{module}\n{what}\n".encode()


def pair(key, value):
    return s(key) + value + b"s"


def dtype(code, size, *more, order="<"):
    state = tuple_of(
        i(4 if more else 3), s(order), none(), none(), none(), i(size), i(-1), i(0), *more
    )
    return name("numpy", "dtype") + tuple_of(s(code), b"\x89", b"\x88") + b"R" + state + b"b"


def array(of, shape, data, order=None):
    call = name("numpy._core.numeric", "_frombuffer")
    return call + tuple_of(data, of, shape, order or s("C")) + b"R"


def blob(data):
    return b"B" + len(data).to_bytes(4, "little") + data


def field(value, key="x"):
    return b"}" + pair(key, value) + b"."


F8 = dtype("f8", -1)
FINE = field(array(F8, tuple_of(i(2)), blob(bytes(16))))


def test_pickles_by_hand_are_understood():
    assert_same(loads(FINE), {"x": np.zeros(2)})
    assert_same(pickle.loads(FINE), {"x": np.zeros(2)})


# ---- hostile pickles ----


class Calls:
    """Pickles as a call of anything with anything."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CANARY = "kvstore-canary"


def call(module, function, *arguments):
    return name(module, function) + tuple_of(*arguments) + b"R"


def objects(dtype):
    return pickle.dumps({"x": np.array([{"a": 1}, None], dtype)})


SYSTEM = call("os", "system", s(f"touch {CANARY}"))
STRUCTURED = np.zeros(2, [("a", "i4"), ("b", "f8")])
DEEP = b"N" + b"\x85" * 200_000
DOUBLED = b"N" + b"\x94\x86".replace(b"\x94", b"q\x00h\x00") * 5_000

HOSTILE = {
    "os.system": field(SYSTEM),
    "os.system by a class": pickle.dumps({"x": Calls(os.system, f"touch {CANARY}")}),
    "os.system in protocol 0": pickle.dumps({"x": Calls(os.system, f"touch {CANARY}")}, 0),
    "os.system as a key": b"}" + SYSTEM + none() + b"s.",
    "os.system instead of the dict": SYSTEM + b".",
    "os.system by its real name": field(call("posix", "system", s(f"touch {CANARY}"))),
    "os.system in a shape": field(array(F8, tuple_of(SYSTEM), blob(bytes(16)))),
    "os.system in a dtype's state": field(
        array(dtype("f8", -1, SYSTEM), tuple_of(i(2)), blob(bytes(16)))
    ),
    "builtins.eval": field(call("builtins", "eval", s(f"open('{CANARY}', 'w')"))),
    "builtins.exec": field(call("builtins", "exec", s(f"open('{CANARY}', 'w')"))),
    "builtins.getattr": field(call("builtins", "getattr", s("a"), s("b"))),
    "builtins.bytes of a size": field(call("builtins", "bytes", i(2**31 - 1))),
    "builtins.bytearray of a size": field(call("builtins", "bytearray", i(2**31 - 1))),
    "a nested global": field(s("numpy") + s("_core.multiarray.os.system") + b"\x93"),
    "a dotted module": field(name("numpy.os", "system")),
    "a global with a newline in it": field(s("numpy\nos") + s("dtype") + b"\x93"),
    "a global by its number": field(b"\x82\x01"),
    "STACK_GLOBAL of numbers": field(i(1) + i(2) + b"\x93"),
    "INST": b"(S'touch " + CANARY.encode() + b"'\nios\nsystem\n.",
    "INST at once": b"(ios\nsystem\n.",
    "OBJ": b"(" + name("os", "system") + s(CANARY) + b"o.",
    "NEWOBJ": name("numpy", "ndarray") + tuple_of(tuple_of(i(2**30))) + b"\x81.",
    "NEWOBJ_EX": name("numpy", "ndarray") + tuple_of() + b"}\x92.",
    "EXT2": b"\x83\x01\x00.",
    "EXT4": b"\x84\x01\x00\x00\x00.",
    "a persistent id": b"Pos.system\n.",
    "a persistent id from the stack": s("x") + b"Q.",
    "an out-of-band buffer": field(array(F8, tuple_of(i(2)), b"\x97")),
    "calling numpy.ndarray": field(call("numpy", "ndarray", tuple_of(i(2**30)))),
    "calling a dtype": field(F8 + tuple_of() + b"R"),
    "calling an array": field(array(F8, tuple_of(i(0)), blob(b"")) + tuple_of() + b"R"),
    "calling None": field(b"N)R"),
    "encoding with another codec": field(call("_codecs", "encode", s("a"), s("rot13"))),
    "_codecs.lookup": field(call("_codecs", "lookup", s("rot13"))),
    "BUILD on a dict": b"}" + tuple_of(s("a"), i(1)) + b"b.",
    "BUILD on a global": name("numpy", "dtype") + tuple_of(none(), b"}") + b"b.",
    "BUILD with a dict": field(array(F8, tuple_of(i(0)), blob(b"")) + b"}b"),
    "BUILD of an array twice": field(array(F8, tuple_of(i(0)), blob(b"")) + tuple_of() + b"b"),
    "BUILD of a used dtype": field(F8 + tuple_of() + b"b"),
    "an array never built": field(
        call("numpy._core.multiarray", "_reconstruct", name("numpy", "ndarray"), b")", blob(b"b"))
    ),
    "another class of array": field(
        call("numpy._core.multiarray", "_reconstruct", name("numpy", "dtype"), b")", blob(b"b"))
    ),
    "objects": objects(object),
    "objects in protocol 0": pickle.dumps({"x": np.array([None], object)}, 0),
    "a dtype of objects": field(array(dtype("O8", -1), tuple_of(i(2)), blob(bytes(16)))),
    "a dtype of objects by its letter": field(
        array(dtype("O", -1), tuple_of(i(2)), blob(b"a" * 16))
    ),
    "a dtype by a list of fields": field(call("numpy", "dtype", s("i4,O"), b"\x89", b"\x88")),
    "structures": pickle.dumps({"x": STRUCTURED}),
    "void": pickle.dumps({"x": np.zeros(2, "V8")}),
    "byte strings": pickle.dumps({"x": np.array([b"a"])}),
    "long doubles": pickle.dumps({"x": np.zeros(2, "g")}),
    "datetimes without a unit": pickle.dumps({"x": np.zeros(2, "M8")}),
    "text of no length": field(array(dtype("U0", 0), tuple_of(i(2)), blob(b""))),
    "text of a lying item size": field(array(dtype("U1", 4000), tuple_of(i(1)), blob(bytes(4)))),
    "a dtype of a lying item size": field(array(dtype("f8", 800), tuple_of(i(1)), blob(bytes(8)))),
    "a dtype of a strange byte order": field(
        array(dtype("f8", -1, order="x"), b")", blob(bytes(8)))
    ),
    "a list": pickle.dumps({"x": [1, 2]}),
    "a float": pickle.dumps({"x": 1.0}),
    "a number": pickle.dumps({"x": 1}),
    "a numpy scalar": pickle.dumps({"x": np.float64(1)}),
    "a set": pickle.dumps({"x": {1}}),
    "a masked array": pickle.dumps({"x": np.ma.zeros(2)}),
    "a dict in the dict": pickle.dumps({"x": {"y": np.zeros(2)}}),
    "a dict that holds itself": b"}\x94" + s("x") + b"h\x00s.",
    "an array alone": pickle.dumps(np.zeros(2)),
    "None": pickle.dumps(None),
    "names that are numbers": pickle.dumps({1: np.zeros(2)}),
    "an empty name": pickle.dumps({"": np.zeros(2)}),
    "a name with a line end": pickle.dumps({"a\nb": np.zeros(2)}),
    "a name with a lone surrogate": b"}V\\ud800\n" + array(F8, tuple_of(i(0)), blob(b"")) + b"s.",
    "a very long name": pickle.dumps({"a" * 100_000: np.zeros(2)}),
    "the same name twice": b"}" + pair("x", none()) + pair("x", none()) + b".",
    "too many fields": pickle.dumps(dict.fromkeys(map(str, range(1001)), np.zeros(1))),
    "a protocol to come": b"\x80\x06" + FINE,
    "bytes behind the end": FINE + b".",
    "two values": b"N" + FINE,
    "a mark left over": b"(" + FINE,
    "no end": FINE[:-1],
    "nothing": b"",
    "a shape too large": field(array(F8, tuple_of(i(3)), blob(bytes(16)))),
    "a shape too small": field(array(F8, tuple_of(i(1)), blob(bytes(16)))),
    "a shape whose product overflows to fit": field(
        array(F8, tuple_of(*[i(2**31 - 1)] * 4), blob(bytes(16)))
    ),
    "a huge shape of nothing": field(array(F8, tuple_of(i(0), *[i(2**31 - 1)] * 4), blob(b""))),
    "negative dimensions": field(array(F8, tuple_of(i(-1), i(-2)), blob(bytes(16)))),
    "bool dimensions": field(array(F8, tuple_of(b"\x88"), blob(bytes(8)))),
    "33 dimensions": field(array(F8, tuple_of(*[i(1)] * 33), blob(bytes(8)))),
    "a shape of text": field(array(F8, s("ab"), blob(bytes(16)))),
    "an axis order that is none": field(
        name("numpy._core.numeric", "_frombuffer")
        + tuple_of(blob(bytes(8)), F8, tuple_of(i(1), i(1)), s("K"), tuple_of(i(0), i(0)))
        + b"R"
    ),
    "a strange memory order": field(array(F8, tuple_of(i(2)), blob(bytes(16)), order=s("A"))),
    "data that is text": field(array(F8, tuple_of(i(2)), s("a" * 16))),
    "BINBYTES of a lying length": field(b"B\xff\xff\xff\xff"),
    "BINBYTES8 of a lying length": field(b"\x8e" + b"\xff" * 8),
    "BYTEARRAY8 of a lying length": field(b"\x96" + (2**40).to_bytes(8, "little")),
    "BINUNICODE of a lying length": field(b"X\xff\xff\xff\xff"),
    "FRAME of a lying length": b"\x95" + (2**62).to_bytes(8, "little") + FINE,
    "LONG1 of 255 bytes": field(b"\x8a\xff" + b"\x7f" * 255),
    "LONG4 of a lying length": field(b"\x8b\xff\xff\xff\x7f"),
    "a number of a million digits": field(b"I" + b"1" * 1_000_000 + b"\n"),
    "a line without an end": b"V" + b"a" * 1_000_000,
    "a global without an end": b"c" + b"a" * 1_000_000,
    "text that is no text": field(b"\x8c\x02\xff\xff"),
    "a memo bomb": b"Nr\xff\xff\xff\x7f" + b"0" + b".",
    "memo that is not there": b"h\x07.",
    "a memo of a negative number": b"g-1\n.",
    "a pop from nothing": b"s.",
    "a mark from nothing": b"t.",
    "a pop below a mark": b"N(\x85.",
    "an odd number of items": b"}(Nu.",
    "items for a tuple": b"N\x85(NNu.",
    "deep tuples": DEEP + b".",
    "tuples that double": DOUBLED + b".",
    "tuples that double, as a name": b"}" + DOUBLED + b"Ns.",
    "tuples that double, as a shape": field(array(F8, DOUBLED, blob(bytes(8)))),
    "tuples that double, as arguments": field(name("numpy", "dtype") + DOUBLED + b"R"),
    "tuples that double, as a field": field(DOUBLED),
    "one text decoded over and over": b"X"
    + (10**6).to_bytes(4, "little")
    + b"a" * 10**6
    + b"q\x00"
    + call("_codecs", "encode", b"h\x00", s("latin1")) * 300
    + b".",
    "bytes spelt in Japanese": field(call("_codecs", "encode", s("あ"), s("latin1"))),
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / CANARY


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_foreign_pickles_are_refused_before_they_cost_anything(case, canary):
    data = memoryview(HOSTILE[case])
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(PacketError) as caught:
        Unpickler().loads(data)
    spent = time.process_time() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not canary.exists()
    assert peak < (8 << 20) + 4 * len(data)
    assert spent < 20  # a doubled tuple that is compared takes 2**5000 steps
    assert len(str(caught.value)) < 500


def test_the_canary_would_be_seen(canary):
    pickle.loads(HOSTILE["os.system"])
    assert canary.exists()


def test_a_refusal_says_what_came_and_what_to_send():
    with pytest.raises(PacketError, match=r"'os.system'.*only a dict of numpy arrays"):
        loads(HOSTILE["os.system"])
    with pytest.raises(PacketError, match=r"object dtype.*numbers, booleans, datetimes, or text"):
        loads(HOSTILE["objects"])
    with pytest.raises(PacketError, match=r"takes more than \d+ steps"):
        loads(HOSTILE["deep tuples"])
    with pytest.raises(PacketError, match=r"takes 24 bytes, and 16 came"):
        loads(HOSTILE["a shape too large"])


OPCODES = st.sampled_from(sorted(pickle_machine._ACTIONS))
SNIPPETS = st.one_of(
    OPCODES,
    st.binary(max_size=3),
    st.sampled_from([s("x"), s("f8"), s("<"), i(1), i(-1), F8, blob(bytes(8)), tuple_of(i(1))]),
    st.sampled_from([name("numpy", "dtype"), name("_codecs", "encode"), s("latin1"), FINE[:-1]]),
    st.sampled_from([SYSTEM, b".", b"0\n", b"os\nsystem\n", b"\x00\x00\x00"]),
)


@given(st.lists(SNIPPETS, max_size=40).map(b"".join))
@example(b"(" * 3 + b"t" * 4)
def test_any_opcodes_give_arrays_or_our_error(data):
    assert isinstance(outcome(Unpickler(), data), list | str)


@given(st.binary(max_size=200))
def test_any_bytes_give_arrays_or_our_error(data):
    assert isinstance(outcome(Unpickler(), data), list | str)


@pytest.mark.parametrize("protocol", range(6))
def test_every_prefix_of_a_pickle_is_refused(protocol):
    data = pickle.dumps({"t": np.arange(3.0), "d": np.zeros((2, 2), "M8[us]")}, protocol)
    for length in range(len(data)):
        with pytest.raises(PacketError):
            loads(data[:length])
