"""What the libraries say of themselves, kept off our output."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet() -> None:
    """No advice, bars or telemetry of the libraries between our own lines."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    ours = logging.getLogger("rnn2bin")
    if not ours.handlers:
        ours.addHandler(_echo_handler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _echo_handler() -> logging.Handler:
    """Our own warnings, a line each on what is stderr at that moment."""
    handler = logging.Handler()
    handler.emit = lambda record: print(f"rnn2bin: {record.getMessage()}", file=sys.stderr)  # type: ignore[method-assign]
    return handler
