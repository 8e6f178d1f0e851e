"""Contract 2: model_name and version_name, hostile ones; architecture fingerprint; aliases and field names;
force_table_recreate; auto_sync without endpoint; the key is never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contract_models import Net, batch, refused, rows_of
from torch import nn

from ml_debugger import TracerConfig, errors, open_trace

HOSTILE = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "a/b\\c",
    "line\nbreak",
    "größe-模型-🦊",
    "x" * 10_240,
    "%s%n{0}",
    "CON",
    " spaces ",
    "-rf",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("which", ["model_name", "version_name"])
def test_any_non_empty_text_is_a_name_and_never_a_path(
    name: str, which: str, make_tracer: Any, store: Path, tmp_path: Path
) -> None:
    outside = {p for p in tmp_path.iterdir() if p != store}
    pair = (name, "v1") if which == "model_name" else ("net", name)
    tracer = make_tracer(None, *pair)
    tracer(*batch(2))
    tracer.close()
    assert rows_of(*pair) == 2
    assert {p for p in tmp_path.iterdir() if p != store} == outside
    assert len(list(store.iterdir())) == 1


def test_names_that_look_alike_as_paths_are_different_traces(make_tracer: Any) -> None:
    names = ["a/b", "a_b", "a\\b", "A_b", "a_b ", "a" * 300, "a" * 301]
    for size, name in enumerate(names, 1):
        tracer = make_tracer(None, name)
        tracer(*batch(size))
        tracer.close()
    assert [rows_of(name) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("pair", [("", "v1"), ("net", "")])
def test_an_empty_name_is_refused(pair: tuple[str, str], make_tracer: Any, store: Path) -> None:
    with refused(errors.InvalidInputError):
        make_tracer(None, *pair)
    assert not store.exists()


@pytest.mark.parametrize("name", [None, 3, b"net", ["net"]])
def test_a_name_that_is_not_text_is_refused(name: Any, make_tracer: Any, store: Path) -> None:
    with refused(errors.InvalidTypeError):
        make_tracer(None, name)
    assert not store.exists()


def test_opening_the_pair_with_another_architecture_is_refused(make_tracer: Any) -> None:
    first = make_tracer(Net(6), layers={"hidden": "body"})
    first(*batch(2))
    first.flush()
    for other in (Net(7), nn.Sequential(nn.Linear(4, 3)), Net(6).double()):
        with refused(errors.ArchitectureMismatchError):
            make_tracer(other, layers={"hidden": "" if isinstance(other, nn.Sequential) else "body"})
    assert rows_of() == 2


def test_the_refusal_leaves_the_first_trace_usable(make_tracer: Any) -> None:
    first = make_tracer(Net(6), layers={"hidden": "body"})
    first(*batch(2, 0))
    with refused(errors.ArchitectureMismatchError):
        make_tracer(Net(7), layers={"hidden": "body"})
    first(*batch(3, 1))
    first.flush()
    assert rows_of() == 5


def test_the_same_architecture_with_other_weights_is_the_same_model(make_tracer: Any) -> None:
    make_tracer(Net(6, seed=1), layers={"hidden": "body"}).close()
    tracer = make_tracer(Net(6, seed=2), layers={"hidden": "body"})
    tracer(*batch(2))
    tracer.flush()
    assert rows_of() == 2


@pytest.mark.parametrize(
    "change", [{"layers": {"other": "body"}}, {"additional_fields": [{"name": "camera", "type": "str"}]}]
)
def test_other_aliases_or_fields_than_recorded_are_an_error_without_recreate(
    change: dict[str, Any], make_tracer: Any
) -> None:
    make_tracer(Net(), layers={"hidden": "body"}).close()
    with refused(ValueError):
        make_tracer(Net(), **{"layers": {"hidden": "body"}, **change})


def test_force_table_recreate_starts_from_empty_tables(make_tracer: Any) -> None:
    first = make_tracer()
    first(*batch(4), n_epoch=1)
    first.close()
    tracer = make_tracer(force_table_recreate=True)
    assert rows_of() == 0
    tracer(*batch(2), n_epoch=2)
    tracer.flush()
    assert list(open_trace("net", "v1").epochs) == [2]


def test_force_table_recreate_takes_a_new_architecture_and_new_fields(make_tracer: Any) -> None:
    first = make_tracer()
    first(*batch(4))
    first.close()
    tracer = make_tracer(
        Net(9),
        layers={"wide": "body"},
        additional_fields=[{"name": "camera", "type": "str"}],
        force_table_recreate=True,
    )
    tracer(*batch(2), camera="left")
    tracer.flush()
    data = open_trace("net", "v1").arrays("extracted_feature")
    assert data["wide"].shape == (2, 9)
    assert "hidden" not in data
    assert list(data["camera"]) == ["left", "left"]


BAD_NAMES = [
    "",
    "x" * 101,
    "a/b",
    "a\\b",
    "a..b",
    "..",
    "a\nb",
    "a\x00b",
    "a\x7fb",
    "input_id",
    "dataset_type",
    "n_epoch",
    "logits",
    "label",
    "row_id",
    "model_input",
    "ground_truth",
    "input_ids",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
@pytest.mark.parametrize("kind", ["alias", "additional_fields", "additional_label_fields"])
def test_reserved_or_malformed_alias_and_field_names_are_refused(
    name: str, kind: str, make_tracer: Any, store: Path
) -> None:
    with refused(errors.InvalidInputError):
        if kind == "alias":
            make_tracer(Net(), layers={name: "body"})
        else:
            make_tracer(Net(), layers={"hidden": "body"}, **{kind: [{"name": name, "type": "str"}]})
    assert not store.exists()


@pytest.mark.parametrize("name", ["a", "x" * 100, "größe", "with space", "layer4.1.relu", "a-b_c"])
def test_names_of_1_to_100_characters_are_aliases(name: str, make_tracer: Any) -> None:
    tracer = make_tracer(Net(), layers={name: "body"})
    tracer(*batch(2))
    tracer.flush()
    assert open_trace("net", "v1").arrays("extracted_feature")[name].shape == (2, 6)


@pytest.mark.parametrize(
    "names",
    [
        ("hidden", "hidden"),
        ("camera", "camera"),
        ("x", "x.values"),
        ("x", "x.offsets"),
        ("x", "x.shapes"),
        ("hidden", "hidden.1"),
    ],
)
def test_repeated_and_derived_names_are_refused(
    names: tuple[str, str], make_tracer: Any, store: Path
) -> None:
    fields = [{"name": n, "type": "int"} for n in names if n != "hidden"]
    with refused(errors.InvalidInputError):
        make_tracer(
            Net(),
            layers={"hidden": "body"},
            config=TracerConfig(repeat="all"),
            additional_fields=fields if fields else [{"name": "hidden", "type": "int"}],
        )
    assert not store.exists()


def test_auto_sync_without_an_endpoint_is_an_invalid_input(make_tracer: Any, store: Path) -> None:
    with refused(errors.InvalidInputError) as caught:
        make_tracer(auto_sync=True)
    assert "api_endpoint" in str(caught.value) or "MLD_API_ENDPOINT" in str(caught.value)
    assert not store.exists()


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_the_key_appears_in_no_repr_and_no_file(
    source: str, make_tracer: Any, store: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    key = "canary-51c7e0"
    keywords: dict[str, Any] = {"api_endpoint": "http://127.0.0.1:9/"}
    if source == "argument":
        keywords["api_key"] = key
    else:
        monkeypatch.setenv("MLD_API_KEY", key)
    tracer = make_tracer(**keywords)
    tracer(*batch(2))
    tracer.flush()
    path = tracer.export(store.parent / "out.zip")
    tracer.close()
    shown = repr(tracer) + str(tracer) + repr(tracer.stats()) + repr(TracerConfig())
    assert key not in shown
    for file in [path, *(p for p in store.rglob("*") if p.is_file())]:
        assert key.encode() not in file.read_bytes()
    assert key not in "".join(capfd.readouterr())
