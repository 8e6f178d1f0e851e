"""The command ``ml-debugger``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; ends the process.

    Exit status: 0 fine, 1 failed, damage found or unknown trace, 2 wrong usage.
    """
    from ml_debugger.cli.app import cli
    from ml_debugger.cli.output import escape_what_cannot_be_encoded

    escape_what_cannot_be_encoded()
    cli(prog_name="ml-debugger")
