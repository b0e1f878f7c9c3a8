"""What an operator decides about a service, once, when it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from rnn2bin.errors import UsageError

GB = 10**9
QUEUE, WORKFLOW, VERSION = "conversions", "convert", "1"  # names in DBOS's tables; VERSION changes when the workflow's steps do


@dataclass(frozen=True)
class Limits:
    """Of one conversion's child process."""

    memory: int = 16 * GB  # bytes of private writable memory (RLIMIT_DATA)
    cpu: int = 48 * 3600  # seconds of processor time (RLIMIT_CPU)
    file: int = 20 * GB  # bytes of the largest file it writes (RLIMIT_FSIZE)
    threads: int = 1  # of its arithmetic
    stalls: int = 30  # times in a row that it is started over without a new checkpoint


@dataclass(frozen=True)
class Settings:
    home: Path
    db: str  # an SQLAlchemy URL: sqlite:///… or postgresql://…
    upload_bytes: int = 2 * GB
    slots: int = 1  # conversions that a worker runs at once
    lease: float = 15.0  # seconds after which a worker that gives no sign is taken for dead
    grace: float = 2.5  # seconds a child has to write its last checkpoint
    poll: float = 0.25  # seconds between looks at the data base
    pickup: float = 0.5  # seconds between a worker's looks at the queue
    limits: Limits = field(default_factory=Limits)

    @property
    def remote(self) -> bool:
        """Whether workers may be on other machines: files then go through the data base."""
        return self.db.startswith("postgresql")


def default_home() -> Path:
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "rnn2bin"


def settings(home: Path | None = None, db: str | None = None, **options: object) -> Settings:
    """Settings with every default filled in; the home is made. Raises UsageError for a data base that is neither SQLite nor PostgreSQL."""
    home = (home or default_home()).absolute()
    url = db or f"sqlite:///{home / 'service.sqlite'}"
    if url.startswith("postgres://"):
        url = "postgresql" + url.removeprefix("postgres")
    if not url.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        raise UsageError("--db: must be postgresql://… or sqlite:///FILE")
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"--home: cannot be made ({error.strerror})") from None
    return Settings(home=home, db=url, **options)  # type: ignore[arg-type]
