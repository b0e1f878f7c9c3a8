"""config.json of a packed directory as a transformers config."""

from __future__ import annotations

import json
from typing import Any

from transformers.configuration_utils import PretrainedConfig


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
        super().__init__(**options)

    def to_json_string(self, *args: Any, **options: Any) -> str:
        """As in transformers, which sorts keys: gates must stay in canonical order."""
        return json.dumps(json.loads(super().to_json_string(*args, **options)) | {"spec": self.spec, "gates": self.gates}, indent=2) + "\n"
