"""The tracer in frameworks that run the loop themselves, sample ids for any dataset, and ways onward.

`lightning` and `transformers` here are modules of their own, which import the framework of that name.
"""

from ml_debugger.integrations.sample_ids import CollateWithIds, WithIds

__all__ = ["CollateWithIds", "WithIds"]
