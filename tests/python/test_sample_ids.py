"""`WithIds` and `CollateWithIds`: the id of a sample is the same wherever it turns up."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
    random_split,
)

from ml_debugger import open_trace
from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.integrations import CollateWithIds, WithIds
from ml_debugger.training import ClassificationTracer


class Numbers(Dataset[Any]):
    """Sample i is ``first + i``: the sample itself tells what its id must be."""

    def __init__(self, length: int, first: int = 0) -> None:
        self.length, self.first = length, first
        self.epoch = -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return self.first + index

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Stream(IterableDataset[Any]):
    """Each worker has a part of the samples."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from ({"x": float(number), "name": f"f{number}"} for number in range(first, 12, step))


class WithGetItems(Numbers):
    fetched: list[list[int]]

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.fetched = [*getattr(self, "fetched", []), indices]
        return [self.first + index for index in indices]


def name_of(sample: Any) -> str:
    return str(sample["name"])


def test_tuples_get_the_id_appended_mappings_get_a_key_and_the_rest_becomes_a_pair() -> None:
    tensors = TensorDataset(torch.arange(3.0), torch.arange(3) * 2)
    assert WithIds(tensors)[2] == (2.0, 4, 2)
    assert WithIds(Numbers(4, first=10))[3] == (13, 3)
    samples: Any = [{"x": 1}, UserDict({"x": 2})]
    assert WithIds(samples)[1] == {"x": 2, "input_id": 1}
    assert WithIds(samples, key="id")[0] == {"x": 1, "id": 0}
    assert samples[0] == {"x": 1}
    assert len(WithIds(tensors)) == 3
    assert WithIds(tensors)[-1] == (2.0, 4, 2)


def test_ids_do_not_depend_on_shuffling_or_workers() -> None:
    both = ConcatDataset([Numbers(6), Subset(Numbers(9, first=100), [8, 3, 1])])
    expected = {number: f"0/{number}" for number in range(6)} | {108: "1/8", 103: "1/3", 101: "1/1"}
    loader = DataLoader(WithIds(both), batch_size=4, shuffle=True, num_workers=2)
    found = {}
    for values, ids in loader:
        found |= dict(zip(values.tolist(), ids, strict=True))
    assert found == expected


def test_a_sample_has_the_same_id_before_and_after_every_split() -> None:
    base = Numbers(20)
    train, val = random_split(base, [15, 5], torch.Generator().manual_seed(1))
    nested = Subset(Subset(train, [9, 3, 7]), [2, 0])
    for dataset in (train, val, nested, ConcatDataset([val, train]), ConcatDataset([nested, base])):
        after = [WithIds(dataset)[position] for position in range(len(dataset))]
        assert all(value == identity for value, identity in after)
    assert [Subset(WithIds(base), train.indices)[k] for k in range(15)] == [
        WithIds(train)[k] for k in range(15)
    ]


def test_given_names_follow_the_samples_through_a_split() -> None:
    names = [f"img{number}.png" for number in range(10)]
    part = Subset(Numbers(10), [7, 2])
    assert [WithIds(part, names)[k] for k in range(2)] == [(7, "img7.png"), (2, "img2.png")]
    assert WithIds(part, lambda index: f"n{index}")[1] == (2, "n2")
    assert WithIds(part, np.arange(10) * 10)[0] == (7, 70)


def test_batched_fetches_reach_a_dataset_that_knows_them() -> None:
    base = WithGetItems(10)
    loader = DataLoader(WithIds(Subset(base, range(9, -1, -1))), batch_size=5)
    assert [(values.tolist(), ids.tolist()) for values, ids in loader] == [
        ([9, 8, 7, 6, 5], [9, 8, 7, 6, 5]),
        ([4, 3, 2, 1, 0], [4, 3, 2, 1, 0]),
    ]
    assert len(base.fetched) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_take_ids_from_their_samples(workers: int) -> None:
    dataset = WithIds(Stream(), name_of)
    assert isinstance(dataset, IterableDataset) and isinstance(dataset, WithIds)
    seen = {}
    for batch in DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=CollateWithIds()):
        seen |= dict(zip(batch["x"].tolist(), batch["input_id"], strict=True))
        assert batch["name"] == batch["input_id"]
    assert seen == {float(number): f"f{number}" for number in range(12)}


def test_copies_keep_the_numbers_of_their_datasets() -> None:
    dataset = WithIds(ConcatDataset([Numbers(2), Numbers(2, first=5)]))
    for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert [other[k] for k in range(4)] == [(0, "0/0"), (1, "0/1"), (5, "1/0"), (6, "1/1")]
    stream = pickle.loads(pickle.dumps(WithIds(Stream(), name_of)))
    assert isinstance(stream, IterableDataset)


def test_what_a_framework_asks_the_dataset_for_is_passed_on() -> None:
    base = Numbers(3)
    WithIds(base).set_epoch(4)
    assert base.epoch == 4
    assert not hasattr(WithIds(base), "targets")


def test_collate_hides_ids_from_the_function_that_makes_the_batch() -> None:
    seen: list[Any] = []

    def collate(samples: list[Any]) -> Any:
        seen.append(samples)
        return UserDict({"x": torch.tensor([sample["x"] for sample in samples])})

    batch = CollateWithIds(collate)([{"x": 1.0, "input_id": "b"}, {"x": 2.0, "input_id": "a"}])
    assert seen == [[{"x": 1.0}, {"x": 2.0}]]
    assert type(batch) is UserDict and batch["input_id"] == ["b", "a"]
    inputs, labels, ids = CollateWithIds()([(torch.zeros(2), 1, 7), (torch.ones(2), 0, 9)])
    assert inputs.shape == (2, 2) and labels.tolist() == [1, 0]
    assert ids.dtype == torch.int64 and ids.tolist() == [7, 9]
    assert CollateWithIds()([(1, 2**70), (3, 4)])[1] == [str(2**70), "4"]
    assert CollateWithIds()([(1, np.int64(3)), (3, torch.tensor(4))])[1].tolist() == [3, 4]


def test_what_would_lose_or_mix_ids_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="needs ids that are a callable"):
        WithIds(Stream())
    with pytest.raises(InvalidInputError, match="3 ids for 4 samples"):
        WithIds(Numbers(4), [1, 2, 3])
    with pytest.raises(InvalidTypeError, match="got str"):
        WithIds(Numbers(4), "abcd")
    with pytest.raises(InvalidInputError, match="for 2 datasets"):
        WithIds(ConcatDataset([Numbers(1), Numbers(1)]), [1, 2])
    with pytest.raises(InvalidInputError, match="has ids already"):
        WithIds(Subset(WithIds(Numbers(4)), [0]))
    with pytest.raises(InvalidInputError, match="under 'input_id' already"):
        WithIds([{"input_id": 3}])[0]  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="has no id"):
        CollateWithIds()([{"x": 1}])


def test_recorded_ids_name_the_samples_of_the_whole_dataset(data_dir: Path) -> None:
    base = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    train, val = random_split(WithIds(base), [8, 4], torch.Generator().manual_seed(0))
    model = torch.nn.Linear(3, 2)
    with ClassificationTracer(model, "m", "v") as tracer:
        for epoch in range(2):
            for name, part in (("train", train), ("val", val)):
                for inputs, labels, ids in DataLoader(part, batch_size=3, shuffle=True):
                    tracer(inputs, labels, ids, name, epoch)
    stored = open_trace("m", "v", data_dir=data_dir).arrays("extracted_feature", n_epoch=1)
    assert sorted(map(int, stored["input_id"])) == list(range(12))
    rows = torch.stack([base[int(identity)][0] for identity in stored["input_id"]])
    assert np.array_equal(stored["features"], rows.numpy())
