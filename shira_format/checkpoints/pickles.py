"""Reading strangers' pickles: plain values and the names of an allow-list; no code of the pickle's choice ever runs.

Like ``torch.load(weights_only=True)``, for any allow-list and without torch. ``pickle.Unpickler`` with its own
``find_class`` is not enough: its memo grows to any index in the pickle, it hashes tuples of any depth, and it sets
attributes on any object.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

MAX_PICKLE = 2**28  # bytes: millions of chunks of a sharded checkpoint

# (module, name) to the value that replaces it, or to a function that is called in its place.
Names = Mapping[tuple[str, str], Any]


class PickleError(ValueError):
    """A pickle is damaged, or needs a name that is not in the allow-list."""


class Record:
    """A pickled object: the name of its class and its state.

    Attributes:
        kind: the name of its class.
        state: the pickled state, usually a dict of attributes, or None.
    """

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


def record(kind: str) -> Callable[..., Record]:
    """For an allow-list: a class whose objects become a :class:`Record`, whatever the arguments."""
    return lambda *_: Record(kind)


def ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """For an allow-list: ``collections.OrderedDict``, as a dict."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        _put(found, key, value)
    return found


def load(file: IO[bytes], names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from ``file`` and stop after it.

    Args:
        file: at the start of the pickle; must not allocate more than there is when asked for too many bytes.
        names: the allow-list. Values are used unchanged; functions are called with arguments from the pickle.
        persistent: makes an object from a persistent id.

    Raises:
        PickleError: it is damaged, too long, or needs another name.
    """
    import pickletools

    machine = _Machine(names, persistent)
    start = file.tell()
    try:
        for opcode, argument, at in pickletools.genops(file):
            if at is None or at - start > MAX_PICKLE:
                raise PickleError(f"the pickle has more than {MAX_PICKLE} bytes")
            if (step := machine.steps.get(opcode.name)) is None:
                raise PickleError(f"the pickle has the opcode {opcode.name}, which is not supported")
            step(argument)
        (result,) = machine.stack
    except PickleError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error) as error:
        raise PickleError(f"a damaged pickle: {error}") from None
    return result


class _Machine:
    """The stack machine that runs a pickle."""

    def __init__(self, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        self._names = names
        self._persistent = persistent
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        constants: dict[str, Callable[[], Any]] = {
            "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
            "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
        }  # fmt: skip
        literals = (
            "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
            "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
        )  # fmt: skip
        self.steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), self._ignored),
            **{name: self._made(make) for name, make in constants.items()},
            **dict.fromkeys(literals, self._literal),
            "MARK": self._mark,
            "TUPLE": lambda _: self._literal(tuple(self._to_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "MEMOIZE": lambda _: self._memoize(len(self._memo)),
            "BINPUT": self._memoize,
            "LONG_BINPUT": self._memoize,
            "BINGET": self._recall,
            "LONG_BINGET": self._recall,
            "APPEND": lambda _: self._append([self.stack.pop()]),
            "APPENDS": lambda _: self._append(self._to_mark()),
            "SETITEM": lambda _: self._set([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._set(self._to_mark()),
            "GLOBAL": lambda name: self._global(*name.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._global(self.stack.pop(-2), self.stack.pop()),
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "BUILD": self._build,
            "BINPERSID": self._persist,
        }

    def _ignored(self, _: Any) -> None:
        pass

    def _literal(self, value: Any) -> None:
        self.stack.append(value)

    def _made(self, make: Callable[[], Any]) -> Callable[[Any], None]:
        return lambda _: self.stack.append(make())

    def _mark(self, _: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise PickleError("a damaged pickle: too few values for a tuple")
        self.stack[-count:] = [items]

    def _memoize(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def _recall(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise PickleError("a damaged pickle: it appends to something other than a list")
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise PickleError("a damaged pickle: it sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise PickleError("a damaged pickle: it imports something without a name")
        if (module, name) not in self._names:
            raise PickleError(f"the pickle needs {module:.200}.{name:.200}, which is not allowed")
        self.stack.append(self._names[module, name])

    def _call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        # Only values of the allow-list are callable: a pickle makes no other functions.
        if type(arguments) is not tuple or not callable(function):
            raise PickleError("a damaged pickle: it calls something that is not a function")
        self.stack.append(function(*arguments))

    def _build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) is not dict:  # the attributes of an OrderedDict are not needed
            raise PickleError("a damaged pickle: it sets the state of a plain value")

    def _persist(self, _: Any) -> None:
        if self._persistent is None:
            raise PickleError("the pickle has persistent ids, which are not expected here")
        self.stack.append(self._persistent(self.stack.pop()))


def _put(target: dict[Any, Any], key: Any, value: Any) -> None:
    # Hashing a deeply nested tuple would exhaust the stack and end the process.
    if not (key is None or isinstance(key, (str, bytes, int, float, Record))):
        raise PickleError(f"a key of a dict is a {type(key).__name__}")
    target[key] = value
