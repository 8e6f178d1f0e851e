"""Stable sample ids for any dataset, and a collate function that carries them beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, default_collate

from ml_debugger.errors import InvalidInputError, InvalidTypeError

__all__ = ["CollateWithIds", "WithIds"]

KEY = "input_id"
_FRESH_HINT = "choose another key, or take the ids that are there"


class WithIds(Dataset[Any]):
    """A dataset whose samples also carry their id; lengths, order and samplers are those of the dataset.

    A sample that is a mapping gets the key; to a tuple or list the id is appended, as a tuple; anything else
    becomes ``(sample, id)``. The id is a property of the sample, not of its place in an epoch: it is the same
    under shuffling, in every worker and in every run, as long as the dataset itself does not change:

    - Of a map-style dataset it is the index, an int.
    - Of a `Subset` (which `random_split` makes too), nested in whatever way, it is the index in the dataset
      below. Wrapped before or after the split, a sample has the same id.
    - Of a `ConcatDataset` of several datasets it is ``"<number of the dataset>/<id>"``, numbered from 0 in
      their order; of several subsets of one dataset it is the index in that.
    - ``ids`` replaces the index by names that a dataset has, such as file names.

    An `IterableDataset` has no index; its ids come from the samples, by an ``ids`` that is called with each.

    Args:
        dataset: Map-style or iterable.
        ids: Map-style: ids of the dataset, or with subsets of the one below, as a sequence of str or int; or
            a callable from index to id. Iterable: a callable from sample to id.
        key: The key in samples that are mappings. Default ``"input_id"``.

    Raises:
        InvalidInputError: An iterable dataset without ``ids``; ids in a number other than that of the
            samples; samples that have ids already.
        InvalidTypeError: ``ids`` is neither a sequence nor a callable.
    """

    def __new__(cls, dataset: Any = None, *args: Any, **kwargs: Any) -> WithIds:
        """Loaders tell the two kinds apart by their class. Unpickling calls this with no dataset."""
        if cls is WithIds and isinstance(dataset, IterableDataset):
            cls = _IterableWithIds
        return super().__new__(cls)

    def __init__(
        self,
        dataset: Dataset[Any],
        ids: Sequence[str] | Sequence[int] | Callable[[Any], str | int] | None = None,
        *,
        key: str = KEY,
    ) -> None:
        self.dataset = dataset
        self.key = key
        self._ids = ids
        self._check_ids()

    def _check_ids(self) -> None:
        self._leaves = distinct_leaves(self.dataset)
        if any(isinstance(leaf, WithIds) for leaf in self._leaves):
            raise InvalidInputError("the dataset has ids already, from another WithIds", "wrap it once")
        if self._ids is None or callable(self._ids):
            return
        if isinstance(self._ids, (str, bytes)) or not hasattr(self._ids, "__getitem__"):
            raise InvalidTypeError(
                f"ids must be a sequence or a callable, got {type(self._ids).__name__}",
                "pass one id a sample",
            )
        if len(self._leaves) > 1:
            raise InvalidInputError(
                f"one sequence of ids for {len(self._leaves)} datasets put together",
                "wrap each of them with ids of its own, and put these together",
            )
        expected = len(self._leaves[0])
        if len(self._ids) != expected:
            raise InvalidInputError(
                f"there are {len(self._ids)} ids for {expected} samples", "pass one id a sample"
            )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # What frameworks ask a dataset for, such as set_epoch, must not be hidden from them.
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def id_of(self, index: int) -> str | int:
        """The id of the sample at an index of this dataset; loads nothing."""
        if index < 0:
            index += len(self)
        leaf, position = locate(self.dataset, index)
        if self._ids is None:
            found: str | int = position
        else:
            found = self._ids(position) if callable(self._ids) else self._ids[position]
        if len(self._leaves) == 1:
            return found
        number = next(number for number, other in enumerate(self._leaves) if other is leaf)
        return f"{number}/{found}"

    def __getitem__(self, index: int) -> Any:
        return add_id(self.dataset[index], self.id_of(index), self.key)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [
            add_id(sample, self.id_of(index), self.key)
            for sample, index in zip(samples, indices, strict=True)
        ]


class _IterableWithIds(WithIds, IterableDataset[Any]):
    """Of a dataset that is a stream."""

    def _check_ids(self) -> None:
        if not callable(self._ids):
            raise InvalidInputError(
                f"an iterable dataset needs ids that are a callable, got {type(self._ids).__name__}: it has "
                "no index that would name a sample in every run and worker",
                "pass ids=lambda sample: ... that picks or makes an id of the sample's content",
            )

    def id_of(self, index: int) -> str | int:
        raise InvalidInputError("an iterable dataset has no index", "iterate over it")

    def __iter__(self) -> Iterator[Any]:
        assert callable(self._ids)
        for sample in self.dataset:  # type: ignore[attr-defined]
            yield add_id(sample, self._ids(sample), self.key)


class CollateWithIds:
    """A collate function that takes the ids off, lets another one make the batch, and adds them again.

    For samples of `WithIds` where the other function could not cope with ids, such as a tokenizer's. In the
    batch, ids are an int64 tensor (B,) if all of them are integers, else a list of B str.

    Args:
        collate: Makes a batch of samples without ids. Default torch's `default_collate`.
        key: The key in samples that are mappings. Samples that are tuples have the id at their end.

    Raises:
        InvalidInputError: A sample has no id; or ``collate`` uses the key itself.
    """

    def __init__(self, collate: Callable[[list[Any]], Any] = default_collate, key: str = KEY) -> None:
        self.collate = collate
        self.key = key

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of some samples, with their ids."""
        ids, rest = [], []
        for sample in samples:
            identity, stripped = self._split(sample)
            ids.append(identity)
            rest.append(stripped)
        batch = self.collate(rest)
        if isinstance(batch, MutableMapping) and self.key not in batch:
            batch[self.key] = batch_of_ids(ids)
            return batch
        return add_id(batch, batch_of_ids(ids), self.key)

    def _split(self, sample: Any) -> tuple[Any, Any]:
        if isinstance(sample, Mapping) and self.key in sample:
            return sample[self.key], {key: value for key, value in sample.items() if key != self.key}
        if isinstance(sample, (tuple, list)) and len(sample) > 1:
            return sample[-1], sample[0] if len(sample) == 2 else sample[:-1]
        raise InvalidInputError(
            f"a sample has no id: expected a mapping with the key {self.key!r} or a tuple that ends with "
            f"one, got a {type(sample).__name__}",
            "wrap the dataset in WithIds, with the same key",
        )


def batch_of_ids(ids: list[Any]) -> Any:
    """Ids of a batch: a tensor, which every loader knows how to cut and move, unless they are text."""
    values = [value.item() if isinstance(value, (torch.Tensor, np.generic)) else value for value in ids]
    if all(type(value) is int and -(1 << 63) <= value < 1 << 63 for value in values):
        return torch.tensor(values, dtype=torch.int64)
    return [str(value) for value in values]


def add_id(sample: Any, identity: Any, key: str) -> Any:
    """The sample, or batch, with its id, or ids."""
    if isinstance(sample, Mapping):
        if key in sample:
            raise InvalidInputError(f"there is something under {key!r} already", _FRESH_HINT)
        return {**sample, key: identity}
    if isinstance(sample, (tuple, list)):
        return (*sample, identity)
    return sample, identity


def distinct_leaves(dataset: Any) -> list[Any]:
    """The datasets at the bottom, in their order; each once, however many subsets it is used by."""
    parts: list[Any] = []
    if isinstance(dataset, Subset):
        parts = distinct_leaves(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        parts = [leaf for part in dataset.datasets for leaf in distinct_leaves(part)]
    else:
        return [dataset]
    return [leaf for number, leaf in enumerate(parts) if not any(leaf is one for one in parts[:number])]


def locate(dataset: Any, index: int) -> tuple[Any, int]:
    """The dataset at the bottom that holds a sample, and the index there."""
    while True:
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif isinstance(dataset, ConcatDataset):
            number = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
            if number:
                index -= dataset.cumulative_sizes[number - 1]
            dataset = dataset.datasets[number]
        else:
            return dataset, int(index)
