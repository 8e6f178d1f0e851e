"""The tracer in frameworks that run the loop themselves, sample ids for any dataset, and ways onward.

Modules of their own: `lightning` and `transformers`, which import the framework of that name, and
`projector`.
"""

from ml_debugger.integrations.sample_ids import CollateWithIds, WithIds

__all__ = ["CollateWithIds", "WithIds"]
