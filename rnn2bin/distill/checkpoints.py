"""Checkpoints on disk: which there are, which is whole, which go. What is in one says the trainer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from rnn2bin import storage

KEPT = 2  # the newest, and the one before it for when that is damaged

log = logging.getLogger("rnn2bin")


def every(out: Path) -> list[Path]:
    """All of them, whole or not, oldest first."""
    numbered = {folder: folder.name.rpartition("-")[2] for folder in out.glob("checkpoint-*")}
    return sorted((folder for folder, number in numbered.items() if number.isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest(out: Path) -> Path | None:
    """The latest whole checkpoint in `out`."""
    return next((folder for folder in reversed(every(out)) if storage.flaw(folder) is None), None)


def rotate(out: Path) -> None:
    """Remove all but the newest KEPT."""
    for older in every(out)[:-KEPT]:
        shutil.rmtree(older, ignore_errors=True)


def discard_newer(out: Path, checkpoint: Path | None) -> None:
    """Remove checkpoints that this run will write again (all of them where it starts anew), with a word where one was not whole: as the
    newest by number they would make the rotation delete the ones that are being written."""
    for folder in every(out):
        if checkpoint is None or step_of(folder) > step_of(checkpoint):
            flaw = storage.flaw(folder)
            if flaw:
                log.warning("%s is passed over: %s", folder, flaw)
            shutil.rmtree(folder)
