"""Where files lie below the service's home, and how they come to another machine: through the data base, where workers may be remote."""

from __future__ import annotations

import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnn2bin import storage
from rnn2bin.serve.store import Row, Store

OUT, ARCHIVE, LOG = "out", "out.tar", "log.txt"
NAMES = ("vocabulary", "labels")  # data that only name others: knobs of a recipe's `data`
MOST_NAME = 100


def safe_name(name: str) -> str:
    """A file's name that is only a name: it can end where the loaders look for a suffix, and leads nowhere. '' where nothing is left."""
    last = re.split(r"[/\\]", name)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip(".-_")[-MOST_NAME:]


@dataclass(frozen=True)
class Folders:
    home: Path
    store: Store
    remote: bool

    # -- uploads

    def upload(self, id: str) -> Path:
        return self.home / "uploads" / id

    def keep_upload(self, id: str) -> None:
        """Called when the file lies there whole."""
        if self.remote:
            self.store.put_file(id, self.upload(id))

    def drop_upload(self, id: str) -> None:
        self.upload(id).unlink(missing_ok=True)
        if self.remote:
            self.store.drop_file(id)

    # -- jobs

    def job(self, id: str) -> Path:
        return self.home / "jobs" / id

    def lay_out(self, job: Row) -> dict[str, Any]:
        """The job's folder with its inputs; what they are called there: {model, data, names}. FileNotFoundError where an upload is gone."""
        folder, request = self.job(job["id"]), job["request"]
        for name in ("model", "data", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        given = {role: self._bring(one, folder / "data", f"{role}-{one['name']}") for role, one in request["data"].items()}
        model = self._bring(request["model"], folder / "model", request["model"]["name"])
        names = {role: f"data/{given.pop(role)}" for role in NAMES if role in given}
        data = f"data/{given['all']}" if "all" in given else [f"{role}=data/{name}" for role, name in given.items()]
        return {"model": f"model/{model}", "data": data or None, "names": names}

    def _bring(self, upload: Row, into: Path, name: str) -> str:
        """An upload under its own name, without a second copy where the file system knows links."""
        source, target = self.upload(upload["id"]), into / name
        if target.exists():
            return name
        if not source.exists():
            source.parent.mkdir(parents=True, exist_ok=True)
            if not (self.remote and self.store.get_file(upload["id"], source)):
                raise FileNotFoundError(upload["name"])
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)
        return name

    def wrap_up(self, id: str) -> tuple[dict[str, Row], int]:
        """({name: {sha256, bytes}} of what a conversion made, all of it together as a .tar too; bytes of disk)."""
        folder = self.job(id)
        files = sorted(path for path in (folder / OUT).rglob("*") if path.is_file())
        found = {path.relative_to(folder / OUT).as_posix(): path for path in files}
        archive, part = folder / ARCHIVE, folder / (ARCHIVE + ".part")
        with tarfile.open(part, "w") as tar:
            for name, path in found.items():
                entry = tarfile.TarInfo(f"{OUT}/{name}")  # the same bytes whoever packs it, and when
                entry.size, entry.mode = path.stat().st_size, 0o644
                with path.open("rb") as stream:
                    tar.addfile(entry, stream)
        storage.sync(part)
        part.replace(archive)
        if self.remote:
            self.store.put_file(f"{id}/{ARCHIVE}", archive)
        entries = {name: self._entry(path) for name, path in {**found, ARCHIVE: archive}.items()}
        return entries, sum(one["bytes"] for one in entries.values())

    def _entry(self, path: Path) -> Row:
        return {"sha256": storage.sha256(path), "bytes": path.stat().st_size}

    def clean_up(self, id: str) -> None:
        """After the end: inputs are the uploads', checkpoints stay for a retry."""
        for name in ("model", "data", "tmp"):
            shutil.rmtree(self.job(id) / name, ignore_errors=True)

    def drop_job(self, id: str) -> None:
        shutil.rmtree(self.job(id), ignore_errors=True)
        if self.remote:
            self.store.drop_file(f"{id}/{ARCHIVE}")

    def artifact(self, id: str, name: str) -> Path | None:
        """The file of a finished job; None where it is gone. `name` stands in the job's list of artifacts: it leads nowhere else."""
        folder = self.job(id)
        path = folder / ARCHIVE if name == ARCHIVE else folder / OUT / name
        if not path.is_file() and self.remote:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.store.get_file(f"{id}/{ARCHIVE}", folder / ARCHIVE):
                return None
            with tarfile.open(folder / ARCHIVE) as tar:
                tar.extractall(folder, filter="data")
        return path if path.is_file() else None
