"""`TraceDefinition`: what a tracer is to record, as its arguments say: layers under aliases, and fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ml_debugger.config import TracerConfig
from ml_debugger.errors import InvalidInputError
from ml_debugger.store.layout import VersionInfo
from ml_debugger.tracer.call import TracedCall, parse_values
from ml_debugger.tracer.description import Columns
from ml_debugger.tracer.fields import FieldValue, parse_fields
from ml_debugger.tracer.fingerprint import fingerprint
from ml_debugger.tracer.head import HEAD_ALIAS
from ml_debugger.tracer.layers import Layer, resolve_layers
from ml_debugger.tracer.names import check_column_name, check_column_names


class TraceDefinition:
    """Layers, aliases and fields of a tracer, checked; refers to the modules of the layers.

    Args:
        model: Where the layers are.
        target_layers: Module path by alias; None for the head, which a forward has to show.
        additional_fields: Specifications of the extra columns of ``extracted_feature``.
        additional_label_fields: Specifications of those of ``ground_truth``.
        config: Its ``reduce`` and ``batch_dim`` may name the aliases only.

    Raises:
        InvalidInputError: A bad name or field.
        InvalidTypeError: An argument has the wrong type.
        LayerNotFoundError: A path names no module.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        target_layers: Mapping[str, str] | None,
        additional_fields: list[dict[str, Any]] | None,
        additional_label_fields: list[dict[str, Any]] | None,
        config: TracerConfig,
    ) -> None:
        self._model = model
        self.searches_head = target_layers is None
        self.fields = parse_fields(additional_fields, "additional_fields")
        self.label_fields = parse_fields(additional_label_fields, "additional_label_fields")
        self.layers: list[Layer] = [] if target_layers is None else resolve_layers(model, target_layers)
        aliases = [check_column_name(layer.alias, "an alias of target_layers") for layer in self.layers]
        self.aliases = [HEAD_ALIAS] if self.searches_head else aliases
        names = [field.name for field in (*self.fields, *self.label_fields)]
        check_column_names([*self.aliases, *names])
        self.names = frozenset(names)
        self._check_options(config)

    def _check_options(self, config: TracerConfig) -> None:
        for option, known in (("reduce", self.aliases), ("batch_dim", [*self.aliases, "logits"])):
            for alias in getattr(config, option) or ():
                if alias not in known:
                    raise InvalidInputError(
                        f"TracerConfig.{option} names {alias!r}, expected an alias of {known}",
                        "use the aliases traced",
                    )

    def columns(self, *, keep_all_runs: bool) -> Columns:
        """The columns of its tables, numbered."""
        return Columns(
            self.aliases,
            self.fields,
            self.label_fields,
            keep_all_runs=keep_all_runs,
            obstacles={layer.alias: layer.obstacle for layer in self.layers},
        )

    def version_info(self, model_name: str, version_name: str) -> VersionInfo:
        """What `version.json` is to hold."""
        return VersionInfo(
            model_name,
            version_name,
            fingerprint(self._model),
            {HEAD_ALIAS: None} if self.searches_head else {layer.alias: layer.path for layer in self.layers},
            [field.specification for field in self.fields],
            [field.specification for field in self.label_fields],
        )

    def parse_values(
        self, keywords: dict[str, Any], call: TracedCall, *, has_labels: bool
    ) -> list[FieldValue]:
        """Values of the fields, and of the label fields if there are labels; raises as `Field.parse`."""
        values = parse_values(self.fields, keywords, call)
        return values + parse_values(self.label_fields, keywords, call) if has_labels else values
