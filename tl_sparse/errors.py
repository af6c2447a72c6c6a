"""The errors that this package raises on bad input, all derived from `TLSparseError`.

Each message names the file or field, and says what is wrong and what would be right.
"""

import sys
import warnings

#: The names of this package's modules begin with this.
_PACKAGE = __name__.split(".")[0] + "."


class TLSparseError(Exception):
    """Base class of the errors of this package."""


class ArgumentError(TLSparseError, TypeError):
    """An argument of a function has the wrong type; the message names it and the right type."""


class ConfigError(TLSparseError, ValueError):
    """A configuration value is impossible; the message names the field, value and valid range."""


class CheckpointError(TLSparseError, ValueError):
    """A model or circuit file is missing, damaged, or does not fit its configuration."""


class DataError(TLSparseError, ValueError):
    """Text or tokens are missing, empty, malformed, or longer than the context."""


class TokenizerError(TLSparseError, ValueError):
    """A tokenizer is missing or does not fit.

    For example, a candidate answer is not a single token, or the vocabulary is larger than d_vocab.
    """


class TaskError(TLSparseError, ValueError):
    """A task is unknown, or its prompt pairs break the rules for tasks."""


class HookNameError(TLSparseError, KeyError):
    """A hook name or node location does not exist on the model."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class CircuitError(TLSparseError, ValueError):
    """A circuit does not fit: it is from another model, or its shapes or nodes are wrong."""


class BridgeError(TLSparseError, ValueError):
    """A dense and a sparse model, or the bridges between them, do not fit each other."""


class PruneError(TLSparseError, RuntimeError):
    """No circuit is found: the full model, or every set of nodes that was tried, fails."""


class UnsupportedError(TLSparseError, NotImplementedError):
    """A request cannot give a correct result on this kind of model.

    The message says why, and what to do instead.
    """


class TrainError(TLSparseError, RuntimeError):
    """Training cannot start or continue."""


class DeviceMemoryError(TLSparseError, RuntimeError):
    """A GPU has less free memory than is needed; the message says how much, and for what."""


class SuiteError(TLSparseError, RuntimeError):
    """A suite or a search cannot start or continue.

    Its folder or storage belongs to another one, or it was interrupted.
    """


class CertificateError(TLSparseError, RuntimeError):
    """A certificate cannot be started or continued.

    Its folder holds the certificate of something else, or it was interrupted.
    """


def counted(number: int, noun: str) -> str:
    """A number of things in words for messages: "1 pair", "2 pairs"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def warn_user(message: str) -> None:
    """Warn, and name the line outside this package that led here as the place of the warning."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
