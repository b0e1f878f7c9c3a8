"""The process that converts one job: `python -I -m rnn2bin.serve.child`, started by `conversion` in the job's folder.

stdin: one JSON line, the task; it stays open as long as the worker lives. stdout: NDJSON, what happens. Anything that libraries print
goes to stderr, the job's log. Files are named as they lie in the job's folder, so that no message knows where that is.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rnn2bin.serve import isolation

EVERY = 0.5  # seconds between two reports of progress, at least; a long run reports less often as it goes on
REPORTS = 400  # over any stretch of a run that is as long as all before it
Tell = Callable[[dict[str, Any]], None]


def main() -> int:
    os.nice(5)  # the page answers first
    task = json.loads(sys.stdin.readline())
    network = isolation.leave_network()
    isolation.limit(memory=task["memory"], cpu=task["cpu"], file=task["file"])
    isolation.die_with(task["parent"])
    threading.Thread(target=_until_alone, daemon=True).start()
    tell = _own_stdout()
    tell({"network": network})
    return convert(task, tell)


def _until_alone() -> None:
    """Where the system does not end this process with its worker, the end of stdin does."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _own_stdout() -> Tell:
    """A way to write to stdout that nobody else has: what else prints there goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def tell(what: dict[str, Any]) -> None:
        out.write(json.dumps(what) + "\n")

    return tell


def convert(task: dict[str, Any], tell: Tell) -> int:
    """The exit code; how it ended is told before."""
    from rnn2bin import libraries
    from rnn2bin.errors import ResourceError, Rnn2binError

    libraries.quiet()
    tell({"stage": "load"})  # which begins with the libraries
    try:
        from rnn2bin import pipeline, recipe_yaml

        recipe = recipe_yaml.validate_text(task["recipe"], name="recipe")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=task["names"])})
        options: dict[str, Any] = {"resume": True, "force": True, "stage": lambda name: tell({"stage": name})}
        result = pipeline.run(task["model"], recipe, task["data"], _path(task["out"]), progress=Watch(tell), **options)
        tell({"done": summary(result.report)})
    except Rnn2binError as error:
        return _refused(tell, error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's own way to say it
            raise
        return _refused(tell, ResourceError("out of memory; lower train.batch_size or train.window"))
    return 0


def _refused(tell: Tell, error: Any) -> int:
    tell({"error": {"code": error.code, "status": error.http_status, "reasons": list(error.reasons)}})
    return int(error.exit_code)


def _path(name: str) -> Any:
    from pathlib import Path

    return Path(name)


class Watch:
    """A conversion's progress, told now and then, with the time left as far as the last steps tell."""

    def __init__(self, tell: Tell, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.tell, self.clock = tell, clock
        self.began = clock()
        self.last = self.began - EVERY
        self.seen: tuple[Any, Any] = (None, None)
        self.first: tuple[Any, int, float] | None = None  # training, step, when

    def __call__(self, now: dict[str, Any]) -> None:
        at, training = self.clock(), (now.get("training", 1), now.get("trying_rate"))  # short runs count for themselves
        if self.first is None or self.first[0] != training:
            self.first = (training, now["step"], at)
        seen = (training, now["measured"])
        pause = max(EVERY, (at - self.began) / REPORTS)
        if seen != self.seen:  # a measurement, which may come with every step
            pause /= 5
        if now["step"] == now["steps"] or at - self.last >= pause:
            self.last, self.seen = at, seen
            self.tell({"progress": {name: _finite(value) for name, value in {**now, "seconds_left": self._left(now, at)}.items()}})

    def _left(self, now: dict[str, Any], at: float) -> float | None:
        """Of this training, by its mean step."""
        _, step, began = self.first or (0, now["step"], at)
        done = now["step"] - step
        return (at - began) / done * max(0, now["steps"] - now["step"]) if done else None


def _finite(value: Any) -> Any:
    """JSON has no NaN, which the loss is before the first step."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report stands in the list of jobs."""
    value = lambda of: report[of]["metric"] if report.get(of) else None
    return {
        "task": report["task"],
        "metric": report["metric"],
        **{name: value(name) for name in ("teacher", "soft_student", "binary", "native")},
        "drop": report["drop"],
        "touched": (report.get("density") or {}).get("weights_touched"),  # of all that a step reads: the report's figure
        "read": (report.get("density") or {}).get("read"),  # of the layers alone: what budget.density counts
        "seconds": report["cost"]["seconds"],
        "steps": report["cost"]["steps"],
        "size": report["size"],
    }


if __name__ == "__main__":
    sys.exit(main())
