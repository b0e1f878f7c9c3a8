"""The stages of a conversion, by name: what the pipeline goes through and the service shows. No torch here."""

from __future__ import annotations

from collections.abc import Callable

STAGES = ("load", "calibrate", "distill", "pack", "verify")
Stage = Callable[[str], None]  # told the name of each of them as it begins


def unwatched(_: str) -> None:
    """A `Stage` of a conversion whose stages nobody follows."""
