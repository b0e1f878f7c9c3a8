"""Numbers that must not move unless they are meant to; scripts/write_goldens.py writes them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tolerances import TOLERANCES

ROOT = Path(__file__).parent.parent


def script():
    spec = importlib.util.spec_from_file_location("write_goldens", ROOT / "scripts" / "write_goldens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["lstm", "gru"])
def test_losses_of_the_smoke_recipe(case):
    """Exact on one machine; within the table on others, as long as no bit stands right at its threshold."""
    wanted = json.loads((ROOT / "tests" / "goldens" / "smoke.json").read_text())[case]
    rtol, atol = TOLERANCES[torch.float32]
    assert script().losses(case) == pytest.approx(wanted, rel=rtol, abs=atol)
