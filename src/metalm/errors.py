"""Errors that are the user's to mend, each with the exit code that `metalm` ends with.

Codes follow sysexits: a scheduler must be able to tell "never start this again" (64, 65) from
"start it again" (75) and from "start it again on other nodes" (69). Anything that is not a MetaLMError is
a fault of ours: exit 70 with a stack trace.
"""

EXIT_DONE = 0
EXIT_USAGE = 64
EXIT_DATA = 65
EXIT_NODE = 69
EXIT_FAULT = 70
EXIT_RESTART = 75


class MetaLMError(Exception):
    """Base of all errors shown to the user as one message, without a stack trace."""

    exit_code = EXIT_FAULT


class ConfigError(MetaLMError):
    """The configuration or the command line is wrong."""

    exit_code = EXIT_USAGE


class TopologyError(MetaLMError):
    """The ranks that were started cannot hold the requested parallel layout."""

    exit_code = EXIT_USAGE


class DataError(MetaLMError):
    """Shards, an index, a tokenizer or raw input cannot be used."""

    exit_code = EXIT_DATA


class CheckpointError(MetaLMError):
    """A checkpoint is missing, damaged or does not fit the model."""

    exit_code = EXIT_DATA


class BusyError(MetaLMError):
    """What the run needs is not free yet: the same command works later."""

    exit_code = EXIT_RESTART


class FaultError(MetaLMError):
    """The run cannot go on, by no fault of its config or data; starting it again may help."""


class BadSample(Exception):
    """A sample that cannot be used: it is skipped. Its one argument is the cause that it is counted under."""

    @property
    def cause(self) -> str:
        """The name of the counter."""
        return self.args[0]
