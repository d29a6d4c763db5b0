"""The command line: thin commands that import what they call only when they are called."""

import sys
from collections.abc import Sequence

from pytrain.errors import ExitCode, UserError


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status back.

    Args:
        arguments: words after `pytrain`; those of this process if None.

    An unexpected exception is not caught: its traceback is what a bug report needs.
    """
    import click

    from pytrain.cli.root import root

    try:
        status = root.main(arguments, prog_name="pytrain", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except click.Abort:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return int(status or ExitCode.OK)
