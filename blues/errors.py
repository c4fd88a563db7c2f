"""Errors that speak to the person at the terminal.

In: anything a user can get wrong. Out: one sentence that names the thing, where it is and the remedy.
The command line prints a `BluesError` without a traceback and exits with code 2 (`--debug` shows the traceback).
"""


class BluesError(Exception):
    """What was wrong, where (file, line, row, key), and what to do about it, in one clear sentence."""


class ConfigError(BluesError):
    """A configuration key, value or combination that cannot be used."""


class DataError(BluesError):
    """A source file, dataset directory, manifest or chunk that cannot be used."""


class CheckpointError(BluesError):
    """A checkpoint that is missing, damaged, or of another shape than the model."""


class TrainingError(BluesError):
    """Training that went wrong by itself: a loss or gradient that is not finite."""


class TrackingError(BluesError):
    """A tracking server that cannot be started or reached when the person asked for it explicitly."""


class ClusterError(BluesError):
    """A Ray cluster or job that cannot be started, reached or found."""
