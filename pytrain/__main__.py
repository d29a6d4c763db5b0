"""`python -m pytrain` and the `pytrain` command: nothing heavy is imported before it is needed."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status back (see `pytrain.errors.ExitCode`)."""
    from pytrain.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
