"""``python -m ml_debugger.cli`` is ``ml-debugger``."""

from ml_debugger.cli import main

main()
