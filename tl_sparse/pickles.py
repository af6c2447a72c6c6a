"""Checks of the pickle in a file of `torch.save`, before torch reads it.

`torch.load(weights_only=True)` runs no code of the file. But a pickle of a kilobyte can still make
it take any amount of memory or time: by calling a class with a huge size, or by naming the same
tuple twice in a tuple, and that one twice in the next. Here the instructions of a pickle are read
without carrying them out: only those of tensors and plain values are accepted.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import IO, Any

import torch

#: The largest pickle that is read: that of a state dict has about 300 bytes for each tensor.
MAX_BYTES = 16 * 2**20
_MAX_INSTRUCTIONS = 2_000_000
#: How deep the values may be nested.
_MAX_DEPTH = 100
#: The size of all values, where each counts as often as it is used: at most this, and at most this
#: many times the size of the pickle, where that is more.
_MAX_SIZE = 1_000_000
_MAX_TIMES = 4

#: Instructions that push a plain value.
_PLAIN = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET",
}  # fmt: skip
#: Instruction → the number of values that it takes from the stack to make a tuple.
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
#: Instruction → the number of values that it adds to the container below them.
_ADDITIONS = {"APPEND": 1, "SETITEM": 2}
_TO_MARK = {"TUPLE", "APPENDS", "SETITEMS"}
_PUTS = {"BINPUT", "LONG_BINPUT"}
_GETS = {"BINGET", "LONG_BINGET"}

#: What a pickle may call. None of these takes more memory than its arguments do.
_CALLABLE = {
    "__builtin__ set",
    "builtins set",
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.serialization _get_layout",
}


@dataclass(eq=False)
class _Value:
    """A value that the pickle would make.

    Attributes:
        size: the size of the value itself.
        parts: the values in it.
        name: the module and name of a global, or of the function that returned the value.
    """

    size: int = 1
    parts: list["_Value"] = field(default_factory=list)
    name: str = ""


_MARK = _Value()
_ONE = _Value()


def check_pickle(file: IO[bytes], n_bytes: int) -> None:
    """Raise `UnpicklingError` unless the next pickle in `file` is one that a model has.

    Args:
        file: the file, which is read up to the end of the pickle.
        n_bytes: the number of bytes of the pickle, or of the file.
    """
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if number > _MAX_INSTRUCTIONS:
                raise UnpicklingError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
            _follow(opcode.name, argument, stack, memo)
        (result,) = stack
    except (IndexError, KeyError) as error:
        raise UnpicklingError("its instructions do not fit each other") from error
    _check_size(result, max(_MAX_SIZE, _MAX_TIMES * n_bytes))


def _follow(name: str, argument: Any, stack: list[_Value], memo: dict[int, _Value]) -> None:
    """Follow one instruction with the values on `stack` and in `memo`."""
    if name in _PLAIN:
        stack.append(_plain(name, argument))
    elif name in _GETS:
        stack.append(memo[argument])
    elif name in _PUTS:
        memo[argument] = stack[-1]
    elif name in _TUPLES:
        stack.append(_Value(parts=_popped(stack, _TUPLES[name])))
    elif name in _ADDITIONS:
        parts = _popped(stack, _ADDITIONS[name])
        _add(parts, stack)
    elif name in _TO_MARK:
        _take_to_mark(name, stack)
    elif name in _OTHERS:
        _OTHERS[name](argument, stack)
    elif name not in ("PROTO", "STOP"):
        raise UnpicklingError(f"no file of tensors needs the instruction {name}")


def _plain(name: str, argument: Any) -> _Value:
    if name.startswith("EMPTY"):
        return _Value()
    if isinstance(argument, str | bytes):
        return _Value(1 + len(argument))
    return _ONE


def _popped(stack: list[_Value], n_values: int) -> list[_Value]:
    """The last `n_values` values, which are removed from `stack`."""
    return [stack.pop() for _ in range(n_values)]


def _take_to_mark(name: str, stack: list[_Value]) -> None:
    parts = []
    while (value := stack.pop()) is not _MARK:
        parts.append(value)
    if name == "TUPLE":
        stack.append(_Value(parts=parts))
    else:
        _add(parts, stack)


def _add(parts: list[_Value], stack: list[_Value]) -> None:
    """Put `parts` into the container on top of the stack."""
    if stack[-1] in (_ONE, _MARK):  # they stand for such values in every pickle
        raise UnpicklingError("it puts values into one that is no container")
    stack[-1].parts.extend(parts)


def _push_mark(argument: Any, stack: list[_Value]) -> None:
    stack.append(_MARK)


def _push_global(name: str, stack: list[_Value]) -> None:
    if name not in _CALLABLE and not _is_type(name):
        raise UnpicklingError(f"it names {name.replace(' ', '.')}, which could run code")
    stack.append(_Value(name=name))


def _is_type(name: str) -> bool:
    """Whether this is the name of a dtype or of the storage of a tensor, which are never called."""
    module, _, attribute = name.partition(" ")
    if module in ("torch", "torch.storage") and attribute.endswith("Storage"):
        return True
    return module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)


def _call(argument: Any, stack: list[_Value]) -> None:
    arguments = stack.pop()
    function = stack.pop()
    if function.name not in _CALLABLE or function.parts:
        raise UnpicklingError("it calls what is not a function for tensors")
    result = _Value(parts=[_Value(name=function.name), arguments])
    if function.name == "collections OrderedDict":
        result.name = "an OrderedDict"
    stack.append(result)


def _set_attributes(argument: Any, stack: list[_Value]) -> None:
    state = stack.pop()
    if stack[-1].name != "an OrderedDict":  # a state dict, which has its `_metadata`
        raise UnpicklingError("it sets attributes of what is not a state dict")
    stack[-1].parts.append(state)


def _push_storage(argument: Any, stack: list[_Value]) -> None:
    stack.append(_Value(parts=[stack.pop()]))


_OTHERS: dict[str, Callable[[Any, list[_Value]], None]] = {
    "MARK": _push_mark,
    "GLOBAL": _push_global,
    "REDUCE": _call,
    "BUILD": _set_attributes,
    "BINPERSID": _push_storage,
}


def _check_size(value: _Value, most: int) -> None:
    """Raise `UnpicklingError` if `value` is too large or too deep, or is a part of itself."""
    level = {value: 1}  # value → how often it is used at this depth
    size = 0
    for _ in range(_MAX_DEPTH):
        inner: dict[_Value, int] = {}
        for item, times in level.items():
            size += times * item.size
            for part in item.parts:
                inner[part] = inner.get(part, 0) + times
        if size > most:
            raise UnpicklingError("it uses the same values so often that they are huge together")
        level = inner
        if not level:
            return
    raise UnpicklingError(f"its values have more than {_MAX_DEPTH} levels")
