"""Write tests/goldens/smoke.json: the losses of every step of recipes/smoke.yaml on two small networks. Run it when they are meant to move.

python scripts/write_goldens.py
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from conftest import state_dict  # noqa: E402

from rnn2bin import pipeline  # noqa: E402

CASES = {"lstm": {"cell": "LSTM", "layers": 2}, "gru": {"cell": "GRU"}}


def losses(case: str) -> list[float]:
    """The loss of each step: data-free conversion of a seeded random network that predicts tokens."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pt"
        torch.save(state_dict(tokens=True, outputs=11, **CASES[case]), model)
        pipeline.convert(model, recipe="smoke.yaml", out=Path(folder) / "OUT", progress=lambda now: found.append(now["loss"]))
    return found


if __name__ == "__main__":
    target = ROOT / "tests" / "goldens" / "smoke.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({case: losses(case) for case in CASES}, indent=1) + "\n")
    print(target)
