"""Checking that the arguments of public functions have the types that their hints declare."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from inspect import Parameter, formatannotation, isclass, signature, unwrap
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin

from tl_sparse.errors import ArgumentError

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Type hints of collections of texts. A single text would fit them too, letter by letter.
_NAMES = (list[str], Sequence[str], Iterable[str], Collection[str])
#: The name of a class → how to get one of its objects, for error messages.
_ORIGINS = {"Circuit": "Circuit.load(…) reads one"}
#: A hint of a tensor as Python writes it.
_TENSOR = re.compile(r"jax(\w+)\[Tensor, '(.*?)'\]")
#: jaxtyping's name of a kind of dtype → how messages describe a tensor of it.
_TENSOR_KINDS = {"Bool": "a boolean", "Int": "an integer", "Float": "a float"}


@dataclass(frozen=True)
class Kind:
    """What an argument must be, for `Annotated[Any, Kind(…)]` where no class can express it.

    Attributes:
        expected: a description of the right values for error messages.
        fits: whether a value is one of them.
        origin: how to get one of them, for error messages.
    """

    expected: str
    fits: Callable[[Any], bool]
    origin: str = ""


def checked(*own: str, called: str = "") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: an argument that does not fit its type hint raises `ArgumentError`.

    Args:
        own: the names of arguments that the function checks itself, since it takes more than their
            hints say, or raises an error of another class.
        called: the name by which users call the function, if it differs from its own.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        call = signature(function)

        @wraps(function)
        def checking(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = call.bind(*args, **kwargs).arguments
            for name, hint in _hints(function).items():
                if name not in given or name in own:
                    continue
                fault = _fault(name, given[name], hint)
                if fault is not None:
                    raise ArgumentError(f"{called or _name(function)}: {fault}")
            return function(*args, **kwargs)

        return checking

    return decorate


def _name(function: Callable[..., Any]) -> str:
    """The name by which users call the function; that of the class for `__init__`."""
    return function.__qualname__.removesuffix(".__init__")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The type hints of the parameters, without those that are only imported for type checkers."""
    hints = {}
    for name, parameter in signature(function).parameters.items():
        hint = parameter.annotation
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            continue
        if isinstance(hint, str):
            try:
                hint = eval(hint, getattr(unwrap(function), "__globals__", {}))
            except NameError:
                continue
        if hint not in (Any, Parameter.empty):
            hints[name] = hint
    return hints


def _fault(name: str, value: object, hint: Any) -> str | None:
    """What is wrong with the value of an argument; None if it fits its hint."""
    if isinstance(value, str) and hint in _NAMES:
        return f"{name} must be a list of names, not the text {value!r}"
    item_hint = _item_hint(hint)
    if isinstance(value, Mapping) and item_hint is not None:
        # The type checker looks at one item only, and does not say what is wrong with it.
        for key, item in value.items():
            if not _fits(item, item_hint):
                return _unlike(f"{name}[{key!r}]", item, item_hint)
    return None if _fits(value, hint) else _unlike(name, value, hint)


def _unlike(name: str, value: object, hint: Any) -> str:
    message = f"{name} must be {_expected(hint)}, not {described(value)}"
    kind = _kind(hint)
    origin = _ORIGINS.get(getattr(hint, "__name__", ""), "") if kind is None else kind.origin
    return f"{message}; {origin}" if origin else message


@cache
def _item_hint(hint: Any) -> Any:
    """The type hint of the values of a mapping; None if the hint allows no mapping."""
    for possible in (hint, *get_args(hint)):
        if get_origin(possible) is Mapping:
            return get_args(possible)[1]
    return None


def _kind(hint: Any) -> Kind | None:
    if get_origin(hint) is Annotated:
        kind = get_args(hint)[1]
        if isinstance(kind, Kind):
            return kind
    return None


def _fits(value: object, hint: Any) -> bool:
    kind = _kind(hint)
    if kind is not None:
        return kind.fits(value)
    return bool(_type_checker()(value, hint))


@cache
def _type_checker() -> Callable[[object, Any], bool]:
    # Imported when it is first needed, because this takes a moment.
    try:
        from beartype import BeartypeConf
        from beartype.door import is_bearable
    except TypeError:
        # nnsight has given every object a method that beartype cannot hash.
        return _fits_anything

    # With the "tower", an integer fits where a float is declared, as for type checkers.
    return partial(is_bearable, conf=BeartypeConf(is_pep484_tower=True))


def _fits_anything(value: object, hint: Any) -> bool:
    return True


def _expected(hint: Any) -> str:
    kind = _kind(hint)
    if kind is not None:
        return kind.expected
    if isclass(hint) and hint.__module__.startswith("tl_sparse."):
        article = "an" if hint.__name__[0] in "AEIOU" else "a"
        return f"{article} {hint.__name__}"
    text = formatannotation(hint)
    for module in ("collections.abc.", "typing.", "pathlib.", "torch.", "tl_sparse."):
        text = text.replace(module, "")
    return _TENSOR.sub(_expected_tensor, text)


def _expected_tensor(match: re.Match[str]) -> str:
    """A tensor in words, such as "a boolean tensor [*node]"."""
    kind, shape = match.groups()
    return f"{_TENSOR_KINDS.get(kind, 'a')} tensor [{', '.join(shape.split())}]"


def described(value: object) -> str:
    """The value if it is short, with its type; the dtype and shape of a tensor or an array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        contents = f"{value.dtype} of {list(value.shape)}"
        is_numpy = type(value).__module__ == "numpy"
        return f"a numpy.{type(value).__name__}, {contents}" if is_numpy else contents
    text = repr(value)
    if len(text) > 60:
        return f"a {type(value).__name__}"
    return f"the {type(value).__name__} {text}"
