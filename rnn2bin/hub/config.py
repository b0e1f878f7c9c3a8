"""config.json of a packed directory as a transformers config."""

from __future__ import annotations

import json
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from rnn2bin import spec as specs
from rnn2bin.errors import UnsupportedError
from rnn2bin.packed import labels


def _outputs(content: dict[str, Any]) -> int:
    """Classes that the network tells apart; transformers' default where the spec says nothing. A damaged spec is the model's to refuse."""
    try:
        return specs.from_dict(content).main.output_size
    except (UnsupportedError, KeyError, TypeError, ValueError):
        return 2


class Rnn2binConfig(PretrainedConfig):
    """The fields of a packed directory's config.json, as `rnn2bin.pack` wrote them; see there."""

    model_type = "rnn2bin"

    def __init__(
        self,
        *,
        format_version: int = 1,
        spec: dict[str, Any] | None = None,
        gates: dict[str, dict[str, str]] | None = None,
        levels: str = "learned",
        task: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.format_version, self.levels = format_version, levels
        self.spec, self.gates = spec or {}, gates or {}
        self.task, self.provenance = task or {}, provenance or {}
        named = labels({"task": self.task}) if isinstance(task, dict) else None
        if named and "id2label" not in options:
            options["id2label"] = dict(enumerate(named))
            options["label2id"] = {name: index for index, name in enumerate(named)}
        elif "id2label" not in options and "num_labels" not in options:
            options["num_labels"] = _outputs(self.spec)
        super().__init__(**options)

    def to_json_string(self, *args: Any, **options: Any) -> str:
        """As in transformers, which sorts keys: gates must stay in canonical order."""
        return json.dumps(json.loads(super().to_json_string(*args, **options)) | {"spec": self.spec, "gates": self.gates}, indent=2) + "\n"
