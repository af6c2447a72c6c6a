"""Every error this package raises on bad input derives from `TLSparseError`.

A message names the file or field, says what is wrong, and what would be right.
"""


class TLSparseError(Exception):
    """Base class of the errors of this package."""


class ConfigError(TLSparseError, ValueError):
    """A configuration value is impossible; the message has the field, the value and the valid
    range.
    """


class CheckpointError(TLSparseError, ValueError):
    """A model or circuit file is missing, damaged, or does not fit its configuration."""


class DataError(TLSparseError, ValueError):
    """Text or tokens cannot be used: no files, nothing in them, or a sequence longer than the
    context.
    """


class TokenizerError(TLSparseError, ValueError):
    """A tokenizer is missing or does not fit: a candidate is not a single token, the sizes differ,
    …
    """


class TaskError(TLSparseError, ValueError):
    """A task is unknown, or its prompt pairs break the rules of a task."""


class HookNameError(TLSparseError, KeyError):
    """A hook name or node location does not exist on the model."""

    __str__ = Exception.__str__  # KeyError would show the message's repr


class CircuitError(TLSparseError, ValueError):
    """A circuit does not fit: another model's, wrong shapes, or a node that does not exist."""


class PruneError(TLSparseError, RuntimeError):
    """No circuit can be found: the model itself does not reach the target loss, or no set of nodes
    does.
    """


class UnsupportedError(TLSparseError, NotImplementedError):
    """What was asked for cannot be right on such a model; the message says why and what to do
    instead.
    """


class TrainError(TLSparseError, RuntimeError):
    """Training cannot start or go on."""


class SuiteError(TLSparseError, RuntimeError):
    """A suite or a search cannot start or go on: its folder or storage is another's, or it was
    interrupted.
    """
