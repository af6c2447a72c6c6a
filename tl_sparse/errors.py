"""Every error this package raises on bad input derives from `TLSparseError`.

A message names the file or field, says what is wrong, and what would be right.
"""


class TLSparseError(Exception):
    """Base class of the errors of this package."""


class ConfigError(TLSparseError, ValueError):
    """A configuration value is impossible; the message names field, value and valid range."""


class CheckpointError(TLSparseError, ValueError):
    """A model or circuit file is missing, damaged, or does not fit its configuration."""


class DataError(TLSparseError, ValueError):
    """Text or tokens cannot be used: no files, empty ones, or sequences beyond the context."""


class TokenizerError(TLSparseError, ValueError):
    """A tokenizer is missing or does not fit: a candidate is not one token, or the sizes differ."""


class TaskError(TLSparseError, ValueError):
    """A task is unknown, or its prompt pairs break the rules of a task."""


class HookNameError(TLSparseError, KeyError):
    """A hook name or node location does not exist on the model."""

    __str__ = Exception.__str__  # KeyError would show the message's repr


class CircuitError(TLSparseError, ValueError):
    """A circuit does not fit: another model's, wrong shapes, or a node that does not exist."""


class PruneError(TLSparseError, RuntimeError):
    """No circuit can be found: the model, or every set of its nodes, misses the target loss."""


class UnsupportedError(TLSparseError, NotImplementedError):
    """A request that cannot give a right result on such a model; the message says why, and what to
    do instead.
    """


class TrainError(TLSparseError, RuntimeError):
    """Training cannot start or continue."""


class SuiteError(TLSparseError, RuntimeError):
    """A suite or a search cannot start or continue: its folder or storage belongs to another one,
    or it was interrupted.
    """
