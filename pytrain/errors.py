"""The error a user can mend, and the exit codes of the command line."""

from enum import IntEnum


class UserError(ValueError):
    """Bad input: the message is one clear sentence that names the file, the key or the tensor.

    The command line prints it after "error: " and exits with `ExitCode.BAD_INPUT`; a script catches it as a
    `ValueError`.
    """


class ExitCode(IntEnum):
    """What the exit status of `pytrain` means; job scripts test these numbers."""

    OK = 0
    """Done."""
    CRASHED = 1
    """An unexpected exception; its traceback is on standard error."""
    BAD_INPUT = 2
    """The command line, the configuration or a file is wrong; one sentence on standard error says what."""
    STOPPED = 75
    """SIGTERM or SIGUSR1 ended training after a checkpoint was written: run again with `--resume auto`."""
    INTERRUPTED = 130
    """Ctrl-C."""
