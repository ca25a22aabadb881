"""The errors users see. Each carries one message that names the thing, the reason and the remedy."""


class WeftError(Exception):
    """Base of all expected failures; the command line prints it without a traceback."""

    exit_code = 2


class ModelError(WeftError, ValueError):
    """The user's model, file, configuration or arguments cannot be used (exit code 2)."""

    exit_code = 2


class ToolError(WeftError):
    """A tool, a file system or the machine is at fault (exit code 3)."""

    exit_code = 3


class MismatchError(WeftError):
    """Two executions that must be equal differ (exit code 4)."""

    exit_code = 4


class EngineFault(MismatchError):
    """The engine stopped with an error status: illegal instruction, bus error, watchdog, fault."""
