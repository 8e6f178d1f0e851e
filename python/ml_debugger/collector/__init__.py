"""The collector: a small server that takes uploads, keeps them as traces, and shows what it has."""

from __future__ import annotations

from ml_debugger.collector.keys import KeyRing, add_key, hashed_key, new_key
from ml_debugger.collector.server import DEFAULT_PORT, serve

__all__ = ["DEFAULT_PORT", "KeyRing", "add_key", "hashed_key", "new_key", "serve"]
