"""Entry of the setup that `make` runs before every other word; see development_environment.py.

Kept apart because this file must be understood by interpreters that are too old for the rest.
"""

import sys

MINIMUM_PYTHON = (3, 10)

ADVICE = (
    "[setup] Python 3.10 or newer is needed, %s is %s: install a newer one (Debian/Ubuntu: "
    "apt install python3, Fedora: dnf install python3, macOS: brew install python) and name it, as in "
    "make PYTHON=python3.11 test"
)

if sys.version_info < MINIMUM_PYTHON:
    sys.exit(ADVICE % (sys.executable, sys.version.split()[0]))

from development_environment import main  # noqa: E402

sys.exit(main())
