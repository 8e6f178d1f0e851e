"""The command ``ml-debugger``."""

from __future__ import annotations


def main() -> None:
    """Run the command line; ends the process.

    Exit status: 0 fine, 1 failed, damage found or unknown trace, 2 wrong usage.
    """
    from ml_debugger.cli.app import cli

    cli(prog_name="ml-debugger")
