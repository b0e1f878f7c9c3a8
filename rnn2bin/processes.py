"""Several processes at one conversion, as torchrun starts them (WORLD_SIZE, RANK): who does what, and what they agree on.

Every process trains its rows of each batch. Process 0 alone measures, writes and reports; what it finds, or fails with, is everyone's
(`lead`). Messages go by gloo, on the processors, whatever the training runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """How many processes there are; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default


def leads() -> bool:
    return rank() == 0


def join() -> None:
    """Meet the others, once; nothing where there are none."""
    if count() == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave(code: int) -> None:
    """The end of a process that is one of several. Without the interpreter's last clean-up: after an error in the middle of a step it waits
    for ever, for the messages of a step that nobody finishes."""
    import sys

    if code == 0 and (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lead(work: Callable[[], T]) -> T:
    """`work` done by process 0 alone; its result, or the error it raised, is everyone's. The error is marked as `told` in the others."""
    if count() == 1:
        return work()
    join()
    result: Any = None
    failed: BaseException | None = None
    if leads():
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as error:
            failed = error
    result, failed = _everyone((result, failed), failed=failed)
    if failed is not None:
        if not leads():
            failed.told = True  # type: ignore[attr-defined, union-attr]
        raise failed
    return result  # type: ignore[no-any-return]


def _everyone(value: Any, *, failed: BaseException | None) -> Any:
    from torch import distributed

    box = [value]
    try:
        distributed.broadcast_object_list(box, src=0, device=_cpu())  # pickled by ourselves, a moment ago
    except RuntimeError:  # nobody is left to be told
        if failed is None:
            raise
    return box[0]


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def first(work: Callable[[], T]) -> T:
    """`work` done by every process, by process 0 before the others: what fails for all is told once."""
    if count() == 1:
        return work()
    mine: list[T] = []
    lead(lambda: mine.append(work()))
    return mine[0] if mine else work()


def lost(error: BaseException) -> bool:
    """Whether `error` says that another process is gone."""
    return count() > 1 and isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "Connection closed" in str(error))


def total(*values: float) -> list[float]:
    """Each value summed over all processes."""
    if count() == 1:
        return list(values)
    import torch
    from torch import distributed

    join()
    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums)
    return sums.tolist()  # type: ignore[no-any-return]


def gathered(value: Any) -> list[Any]:
    """One value of each process, in their order, at process 0; the own one alone elsewhere."""
    if count() == 1:
        return [value]
    from torch import distributed

    join()
    found: list[Any] | None = [None] * count() if leads() else None
    distributed.gather_object(value, found, dst=0)
    return found if found is not None else [value]
