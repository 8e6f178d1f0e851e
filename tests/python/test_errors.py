"""The exception family: builtin bases, plain messages, hints, pickling."""

from __future__ import annotations

import inspect
import pickle

import pytest

from ml_debugger import errors

BASES = {
    "InvalidInputError": ValueError,
    "InvalidTypeError": TypeError,
    "LayerNotFoundError": KeyError,
    "AliasNotCapturedError": RuntimeError,
    "ArchitectureMismatchError": ValueError,
    "NotFoundError": KeyError,
    "TracerClosedError": RuntimeError,
    "TraceInUseError": RuntimeError,
    "StorageError": OSError,
    "DiskBudgetError": errors.StorageError,
    "CorruptDataError": errors.StorageError,
    "RingOverflowError": RuntimeError,
    "StreamCaptureError": RuntimeError,
    "TraceStallError": TimeoutError,
    "UploadError": OSError,
    "AuthenticationError": errors.UploadError,
}


def test_the_family_is_complete() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert found == {*BASES, "MlDebuggerError"} == set(errors.__all__)


@pytest.mark.parametrize("name", sorted(BASES))
class TestEachError:
    def test_is_ours_and_a_builtin(self, name: str) -> None:
        cls = getattr(errors, name)
        assert issubclass(cls, errors.MlDebuggerError)
        assert issubclass(cls, BASES[name])

    def test_prints_as_a_sentence_that_ends_with_the_remedy(self, name: str) -> None:
        error = getattr(errors, name)("expected 3, got 'x'\n", "pass 3")
        assert str(error) == "expected 3, got 'x'\n; pass 3"
        assert error.hint == "pass 3"

    def test_survives_pickle(self, name: str) -> None:
        error = getattr(errors, name)("message", "hint")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.hint) == (str(error), "hint")

    def test_needs_no_hint(self, name: str) -> None:
        error = getattr(errors, name)("message")
        assert (str(error), error.hint) == ("message", "")
