"""Pickles as data: the few opcodes that torch's files are made of, run without calling or importing anything.

``pickle`` is a machine that calls what it is told to; an ``Unpickler`` that forbids most names still calls the rest. So
this is a machine of our own. A name in a pickle becomes a ``Global``, which is text, and can do nothing. What would be
a call becomes a ``Record`` of the name and the arguments. A name that the reader does not list is refused.

Work and memory are bounded by the number of opcodes, each of which makes one object at most, and by the bytes of the
file. No value is ever copied, compared or printed here, so that neither depth nor sharing costs anything.
"""

import struct
from collections.abc import Callable, Collection
from typing import Any

from relexio.errors import CheckpointError

#: Bytes of the largest pickle, and opcodes in one: a DTensor takes about 150, and models have some 40,000.
MAX_PICKLE, _MAX_STEPS = 64 << 20, 6_000_000
_MAX_NAME, _MAX_MARKS = 200, 200
_CUT = "its pickle is damaged; copy the file again"


class Global:
    """A name that a pickle mentions, of a class or function: as text."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Record:
    """What a pickle would have called, and on what: the name, the arguments, and the state that was set afterwards."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None


def loads(data: bytes, known: Collection[str]) -> Any:
    """The value of a pickle in which the names ``known`` may occur. Raises CheckpointError (which names no file).

    Values are None, bool, int, float, str, tuple, list, dict (an OrderedDict, too), ``Global`` and ``Record``. What is
    persistent, as torch's storages are, is a ``Record`` of kind "persistent".
    """
    if len(data) > MAX_PICKLE:
        raise CheckpointError(f"its pickle has {len(data):,} bytes, more than that of any model")
    try:
        return _Machine(data, known).run()
    except CheckpointError:
        raise
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(_CUT) from error


class _Machine:
    def __init__(self, data: bytes, known: Collection[str]) -> None:
        self.data, self.at, self.known = data, 0, known
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: list[Any] = []

    def run(self) -> Any:
        for _ in range(_MAX_STEPS):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.below:
                    raise IndexError
                return self.stack[0]
            deed = _DEEDS.get(code)
            if deed is None:
                raise CheckpointError(f"its pickle has opcode {code:#04x}, which no file of tensors needs")
            deed(self)
        raise CheckpointError("its pickle has more entries than that of any model")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise IndexError
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def line(self) -> str:
        end = self.data.index(b"\n", self.at, self.at + _MAX_NAME)
        return self.take(end + 1 - self.at)[:-1].decode()

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def name(self, module: Any, attribute: Any) -> None:
        if type(module) is not str or type(attribute) is not str:
            raise TypeError
        name = f"{module[:_MAX_NAME]}.{attribute[:_MAX_NAME]}"
        if name not in self.known:
            raise CheckpointError(
                f"its pickle asks for {name}, which holds no tensor that can be read here; nothing of it was run"
            )
        self.stack.append(Global(name))


def _protocol(machine: _Machine) -> None:
    if not 2 <= machine.number(1) <= 5:
        raise ValueError


def _frame(machine: _Machine) -> None:
    machine.take(8)


def _mark(machine: _Machine) -> None:
    if len(machine.below) >= _MAX_MARKS:
        raise CheckpointError("its pickle is nested too deeply")
    machine.below.append(machine.stack)
    machine.stack = []


def _get(size: int) -> Callable[[_Machine], None]:
    def get(machine: _Machine) -> None:
        machine.stack.append(machine.memo[machine.number(size)])

    return get


def _put(size: int) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        if machine.number(size) != len(machine.memo):  # writers count; another number would be a way to fill the memory
            raise IndexError
        machine.memo.append(machine.stack[-1])

    return put


def _text(size: int) -> Callable[[_Machine], None]:
    def text(machine: _Machine) -> None:
        machine.stack.append(machine.take(machine.number(size)).decode())

    return text


def _integer(size: int, signed: bool = False) -> Callable[[_Machine], None]:
    def integer(machine: _Machine) -> None:
        machine.stack.append(machine.number(size, signed))

    return integer


def _long(machine: _Machine) -> None:
    machine.stack.append(machine.number(machine.number(1), signed=True))


def _float(machine: _Machine) -> None:
    machine.stack.append(struct.unpack(">d", machine.take(8))[0])


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def tuple_(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return tuple_


def _tuple_since_mark(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.stack.append(tuple(items))


def _extend(machine: _Machine, items: list[Any]) -> None:
    if type(machine.stack[-1]) is not list:
        raise TypeError
    machine.stack[-1].extend(items)


def _set(machine: _Machine, items: list[Any]) -> None:
    table = machine.stack[-1]
    if type(table) is not dict or len(items) % 2:
        raise TypeError
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int, Record):  # others would be hashed to their ends
            raise TypeError
        if key in table:
            raise CheckpointError(f"its pickle has {key if isinstance(key, str) else 'a key'} twice")
        table[key] = value


def _set_one(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine, [key, value])


def _stack_global(machine: _Machine) -> None:
    attribute, module = machine.stack.pop(), machine.stack.pop()
    machine.name(module, attribute)


def _call(machine: _Machine) -> None:
    args, what = machine.stack.pop(), machine.stack.pop()
    if type(what) is not Global or type(args) is not tuple:
        raise TypeError
    if what.name == "collections.OrderedDict" and not args:
        machine.stack.append({})
    else:
        machine.stack.append(Record(what.name, args))


def _persistent(machine: _Machine) -> None:
    machine.stack.append(Record("persistent", (machine.stack.pop(),)))


def _build(machine: _Machine) -> None:
    state, what = machine.stack.pop(), machine.stack[-1]
    if type(what) is Record and what.state is None:
        what.state = state
    elif type(what) is not dict:  # attributes of an OrderedDict, such as _metadata, say nothing of the tensors
        raise TypeError


_DEEDS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol, 0x95: _frame,
    ord("("): _mark, ord("h"): _get(1), ord("j"): _get(4), ord("q"): _put(1), ord("r"): _put(4),
    0x94: lambda m: m.memo.append(m.stack[-1]),  # MEMOIZE
    ord("X"): _text(4), 0x8C: _text(1), 0x8D: _text(8),
    ord("J"): _integer(4, True), ord("K"): _integer(1), ord("M"): _integer(2), 0x8A: _long, ord("G"): _float,
    ord("N"): _constant(None), 0x88: _constant(True), 0x89: _constant(False), ord(")"): _constant(()),
    ord("}"): lambda m: m.stack.append({}), ord("]"): lambda m: m.stack.append([]),
    0x85: _tuple(1), 0x86: _tuple(2), 0x87: _tuple(3), ord("t"): _tuple_since_mark,
    ord("a"): lambda m: _extend(m, [m.stack.pop()]), ord("e"): lambda m: _extend(m, m.since_mark()),
    ord("s"): _set_one, ord("u"): lambda m: _set(m, m.since_mark()),
    ord("c"): lambda m: m.name(m.line(), m.line()), 0x93: _stack_global,
    ord("R"): _call, 0x81: _call, ord("b"): _build, ord("Q"): _persistent,
}  # fmt: skip
