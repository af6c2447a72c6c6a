"""Checking that the arguments of public functions have the types that their hints declare."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from inspect import Parameter, formatannotation, signature, unwrap
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin

from tl_sparse.errors import ArgumentError

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Kind:
    """What an argument must be, for `Annotated[Any, Kind(…)]` where no class can express it.

    Attributes:
        expected: a description of the right values for error messages.
        fits: whether a value is one of them.
    """

    expected: str
    fits: Callable[[Any], bool]


def checked(*own: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: an argument that does not fit its type hint raises `ArgumentError`.

    Args:
        own: the names of arguments that the function checks itself, since it takes more than their
            hints say, or raises an error of another class.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        call = signature(function)

        @wraps(function)
        def checking(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = call.bind(*args, **kwargs).arguments
            for name, hint in _hints(function).items():
                if name in given and name not in own and not _fits(given[name], hint):
                    raise ArgumentError(
                        f"{_name(function)}: {name} must be {_expected(hint)}, not "
                        f"{described(given[name])}"
                    )
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


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        kind = get_args(hint)[1]
        if isinstance(kind, Kind):
            return kind.fits(value)
    return bool(_type_checker()(value, hint))


@cache
def _type_checker() -> Callable[[object, Any], bool]:
    # Imported when it is first needed, because this takes a moment.
    from beartype import BeartypeConf
    from beartype.door import is_bearable

    # With the "tower", an integer fits where a float is declared, as for type checkers.
    return partial(is_bearable, conf=BeartypeConf(is_pep484_tower=True))


def _expected(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        kind = get_args(hint)[1]
        if isinstance(kind, Kind):
            return kind.expected
    text = formatannotation(hint)
    for module in ("collections.abc.", "typing.", "pathlib.", "torch."):
        text = text.replace(module, "")
    return text.replace("tl_sparse.", "")


def described(value: object) -> str:
    """The value if it is short, with its type; the dtype and shape of a tensor."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} of {list(value.shape)}"
    text = repr(value)
    if len(text) > 60:
        return f"a {type(value).__name__}"
    return f"the {type(value).__name__} {text}"
