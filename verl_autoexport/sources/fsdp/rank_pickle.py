"""The pickle in a rank file, read as data: nothing is imported, constructed or called.

An interpreter of only the opcodes that `torch.save` writes (pickle protocols 2 to 5). Each call in
the pickle becomes an inert record. Time and memory grow with the pickle's bytes alone; `pickle` and
`torch.load` guarantee no such bound. Standard library only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MAX_NESTING = 128  # marks open at once; a mesh inside a mesh inside a spec has a dozen
_MAX_STACK = 1 << 20  # values that wait for their container; torch writes batches of a thousand pairs
_MAX_LONG = 16  # bytes; hashes have nine
_MAX_NAME = 200  # characters of a global's module and name
_BYTES_PER_RECORD = 4  # at least; torch writes more than ten for each container
_MAX_KEY = 1 << 31  # hashes of larger integers can be made to collide

_KNOWN = re.compile(
    r"collections OrderedDict"
    r"|torch (Size|device|Tensor|\w+Storage|bool|\w*(int|float|complex|bits)\d\w*)"
    r"|torch\.storage \w*Storage"
    r"|torch\.serialization _get_layout"
    r"|torch\._utils (_rebuild_tensor(_v2|_v3)?|_rebuild_parameter(_with_state)?|_rebuild_wrapper_subclass)"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.nn\.(parameter|modules\.module|modules) (Parameter|Buffer)"
    r"|torch\.distributed\.(_?tensor|device_mesh|_mesh_layout|_pycute)(\.\w+)* \w+"
)
"""Module and name of every global in shards; they are only compared, so a wide pattern does no harm."""
_FUNCTIONS = {
    "OrderedDict", "Size", "device", "_get_layout", "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3",
    "_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_wrapper_subclass", "_rebuild_from_type_v2",
}  # fmt: skip
_OLD = re.compile(r"torch\.distributed\._shard\w*(\.\w+)* ")


class Refused(ValueError):
    """The pickle contains something that FSDP's shards do not. `key`: the tensor where this was found."""

    def __init__(self, text: str, key: str | None = None) -> None:
        super().__init__(text)
        self.key = key


@dataclass(slots=True, eq=False)
class Name:
    """A global; `module` and `leaf` as written."""

    module: str
    leaf: str

    def __str__(self) -> str:
        return f"{self.module}.{self.leaf}"


@dataclass(slots=True, eq=False)
class Call:
    """The record of a call `name(*args)`, and the `state` for its result."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None


@dataclass(slots=True, eq=False)
class Stored:
    """A storage by its name in the archive; `kind` is its class's name, e.g. `FloatStorage`."""

    kind: str
    key: str
    numel: int


def unpickle(data: bytes) -> Any:
    """The data in the pickle: dict, list, tuple, str, int, bool, None, float, Name, Call and Stored.

    Tuples may be nested to any depth and shared any number of times, so no caller may walk
    through the whole value, compare or print it. Raises Refused.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except Refused as e:
        raise Refused(str(e), machine.key()) from None
    except (IndexError, struct.error, UnicodeDecodeError):
        raise Refused("it is cut short or damaged", machine.key()) from None


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self.names: dict[str, Name] = {}
        self.room = len(data) // _BYTES_PER_RECORD + 64

    def run(self) -> Any:
        """Runs the opcodes. The most frequent ones are here, which doubles the speed; the others are in `_STEPS`."""
        data, steps, memo, stack, at = self.data, _STEPS, self.memo, self.stack, 0
        number = struct.Struct("<I").unpack_from
        while True:
            op = data[at]
            at += 1
            if op == 0x71 or op == 0x72:  # BINPUT, LONG_BINPUT
                index, at = (data[at], at + 1) if op == 0x71 else (number(data, at)[0], at + 4)
                if index != len(memo):
                    raise Refused(f"it puts value {len(memo)} under number {index}")
                memo.append(stack[-1])
            elif op == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif op == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[number(data, at)[0]])
                at += 4
            elif op == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif op == 0x28:  # MARK
                self.marks.append(stack)
                stack = self.stack = []
                if len(self.marks) > _MAX_NESTING:
                    raise Refused("it is nested too deeply")
            elif op == 0x2E:  # STOP
                return self.result()
            else:
                self.at = at
                steps[op](self)
                at, stack = self.at, self.stack

    def result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise Refused("it ends in the middle")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise IndexError
        return self.data[begin : self.at]

    def push(self, value: Any) -> None:
        self.stack.append(value)
        if len(self.stack) > _MAX_STACK:
            raise Refused("it has too many values at once")

    def build(self, value: Any) -> None:
        """Pushes a new container or record; the number of bytes limits how many there can be."""
        self.room -= 1
        if self.room < 0:
            raise Refused("it has more containers than shards need")
        self.push(value)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def key(self) -> str | None:
        """The key of the outermost dictionary whose value is being read."""
        outer = [items for items in (*self.marks, self.stack)[:2] if items]
        return next((v for items in reversed(outer) for v in reversed(items) if type(v) is str), None)


def _name(machine: _Machine, module: str, leaf: str) -> Name:
    text = f"{module} {leaf}"
    if (known := machine.names.get(text)) is None:
        if _OLD.match(text):
            raise Refused(
                f"it holds a {module}.{leaf}: FSDP1 wrote its shards so without a device mesh. Resume that "
                "run and save it with a device mesh or with FSDP2 (`strategy: fsdp2`), as verl does"
            )
        if not _KNOWN.fullmatch(text):
            raise Refused(f"it names {module}.{leaf}, which is no part of FSDP's shards")
        known = machine.names[text] = Name(module, leaf)
    return known


def _global(machine: _Machine) -> None:
    """GLOBAL: two lines."""
    data, parts = machine.data, []
    for _ in range(2):
        end = data.find(b"\n", machine.at, machine.at + _MAX_NAME)
        if end < 0:
            raise Refused("it names a global without an end")
        parts.append(machine.take(end - machine.at).decode())
        machine.at = end + 1
    machine.push(_name(machine, *parts))


def _stack_global(machine: _Machine) -> None:
    leaf, module = machine.stack.pop(), machine.stack.pop()
    if type(leaf) is not str or type(module) is not str or len(leaf) + len(module) > _MAX_NAME:
        raise Refused("it names a global that has no name")
    machine.push(_name(machine, module, leaf))


def _call(functions: bool) -> Callable[[_Machine], None]:
    """REDUCE, which torch writes only for functions, or NEWOBJ, which it writes only for classes."""

    def step(machine: _Machine) -> None:
        args, name = machine.stack.pop(), machine.stack.pop()
        if type(args) is not tuple or type(name) is not Name:
            raise Refused("it calls something that is no global")
        if (name.leaf in _FUNCTIONS) != functions or (name.leaf == "OrderedDict" and args):
            raise Refused(f"it calls {name} in a way that torch does not write")
        machine.build({} if name.leaf == "OrderedDict" else Call(name, args))

    return step


def _build(machine: _Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if type(target) is Call:
        target.state = state
    elif type(target) is not dict:  # a dict's state is an OrderedDict's `_metadata`
        raise Refused(f"it gives a {type(target).__name__} a state")


def _persistent(machine: _Machine) -> None:
    pid = machine.stack.pop()
    kinds = (str, Name, str, str, int)
    if type(pid) is not tuple or tuple(map(type, pid)) != kinds or pid[0] != "storage" or pid[4] < 0:
        raise Refused("it refers to something other than a storage")
    machine.build(Stored(pid[1].leaf, pid[2], pid[4]))


def _set(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict or len(items) % 2:
        raise Refused("it sets items of something that is no dictionary")
    keys = items[::2]
    for key in keys:
        if type(key) is not str and (type(key) is not int or abs(key) > _MAX_KEY):
            raise Refused(f"a key is a {type(key).__name__}, expected a string")
    expected = len(target) + len(keys)
    target.update(zip(keys, items[1::2], strict=True))
    if len(target) != expected:
        raise Refused("a dictionary has a key twice")


def _setitem(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine, [key, value])


def _extend(machine: _Machine, items: list[Any]) -> None:
    if type(machine.stack[-1]) is not list:
        raise Refused("it appends to something that is no list")
    machine.stack[-1].extend(items)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError
        values = tuple(stack[-count:])
        del stack[-count:]
        machine.build(values)

    return step


def _long(machine: _Machine) -> None:
    count = machine.take(1)[0]
    if count > _MAX_LONG:
        raise Refused(f"an integer of {count} bytes")
    machine.push(int.from_bytes(machine.take(count), "little", signed=True))


def _protocol(machine: _Machine) -> None:
    if (version := machine.take(1)[0]) not in range(2, 6):
        raise Refused(f"its protocol is {version}, expected 2 to 5")


def _number(form: str) -> Callable[[_Machine], None]:
    packed = struct.Struct(form)
    return lambda m: m.push(packed.unpack(m.take(packed.size))[0])


def _text(form: str) -> Callable[[_Machine], None]:
    packed = struct.Struct(form)
    return lambda m: m.push(m.take(packed.unpack(m.take(packed.size))[0]).decode())


def _unknown(machine: _Machine) -> None:
    op = machine.data[machine.at - 1]
    raise Refused(f"opcode {bytes([op])!r} at byte {machine.at - 1} is not one that torch writes")


_STEPS: list[Callable[[_Machine], None]] = [_unknown] * 256
for _op, _step in {
    b"\x80": _protocol, b"\x95": lambda m: m.take(8) and None,  # PROTO, FRAME
    b"N": lambda m: m.push(None), b"\x88": lambda m: m.push(True), b"\x89": lambda m: m.push(False),
    b"J": _number("<i"), b"M": _number("<H"), b"G": _number(">d"), b"\x8a": _long,
    b"X": _text("<I"), b"\x8c": _text("<B"),  # BINUNICODE, SHORT_BINUNICODE
    b")": lambda m: m.push(()), b"\x85": _tuple(1), b"\x86": _tuple(2), b"\x87": _tuple(3),
    b"t": lambda m: m.build(tuple(m.since_mark())),
    b"]": lambda m: m.build([]), b"a": lambda m: _extend(m, [m.stack.pop()]),
    b"e": lambda m: _extend(m, m.since_mark()),
    b"}": lambda m: m.build({}), b"s": _setitem, b"u": lambda m: _set(m, m.since_mark()),
    b"c": _global, b"\x93": _stack_global, b"R": _call(True), b"\x81": _call(False), b"b": _build, b"Q": _persistent,
}.items():  # fmt: skip
    _STEPS[_op[0]] = _step
