"""One pretrained network converted with every estimator at equal compute: what is lost, the gap between soft and hard gates, density.

    python scripts/studies/conversion.py                 # one night on two cores
    python scripts/studies/conversion.py --quick         # a minute

The teacher is a character LSTM over the King James Bible (Debian's bible-kjv; scripts/train_text_teacher.py). Every estimator runs from the
same calibrated start, by the same batches, for the same number of steps; nothing but `gates` differs. `anneal.yaml` is the default recipe.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, Column, Numbers, Results, Study, points, run

sys.path.insert(0, str(ROOT / "scripts"))
import results as public

from rnn2bin import pipeline
from rnn2bin.recipe import Recipe, parse

FIXED = lambda value: {"schedule": "constant", "start": value, "end": value}
LINE = lambda start, end: {"schedule": "linear", "start": start, "end": end}
WHOLE = {"straight_through_from": 1.0, "slope": FIXED(1.0), "temperature": FIXED(1.0)}
DRAWN = WHOLE | {"noise": 1.0}
RISE = LINE(1.0, 5.0)  # HM-RNN's
FALL = {"schedule": "exponential", "start": 1.0, "end": 0.1}
VARIANTS: dict[str, dict] = {
    "anneal.yaml (the default)": {},
    "straight-through, identity": WHOLE | {"estimator": "straight-through", "backward": "identity"},
    "straight-through, sigmoid": WHOLE | {"estimator": "straight-through", "backward": "sigmoid"},
    "straight-through, hard-sigmoid": WHOLE | {"estimator": "straight-through", "backward": "hard-sigmoid"},
    "straight-through, sigmoid, slope 2 → 3": WHOLE | {"estimator": "straight-through", "backward": "sigmoid", "slope": LINE(2.0, 3.0)},
    "straight-through, hard-sigmoid, slope 1 → 5": WHOLE | {"estimator": "straight-through", "backward": "hard-sigmoid", "slope": RISE},
    "stochastic, identity": DRAWN | {"estimator": "stochastic", "backward": "identity"},
    "stochastic, sigmoid": DRAWN | {"estimator": "stochastic", "backward": "sigmoid"},
    "stochastic, hard-sigmoid": DRAWN | {"estimator": "stochastic", "backward": "hard-sigmoid"},
    "stochastic, hard-sigmoid, slope 1 → 5": DRAWN | {"estimator": "stochastic", "backward": "hard-sigmoid", "slope": LINE(1.0, 5.0)},
    "hard-sigmoid, slope 1 → 5": WHOLE | {"estimator": "hard-sigmoid", "slope": LINE(1.0, 5.0)},
    "Gumbel-sigmoid, τ 1 → 0.1": DRAWN | {"estimator": "gumbel", "temperature": FALL},
    "Gumbel-sigmoid, τ 0.9": DRAWN | {"estimator": "gumbel", "temperature": FIXED(0.9)},
    "Gumbel-sigmoid, τ 0.9, noise on a fifth": WHOLE | {"estimator": "gumbel", "temperature": FIXED(0.9), "noise": 0.2},
    "Gumbel-sigmoid, hard, τ 1 → 0.1": DRAWN | {"estimator": "gumbel-hard", "temperature": FALL},
    "Gumbel-softmax, τ 1 → 0.1": DRAWN | {"estimator": "gumbel-softmax", "temperature": FALL},
    "sharpened sigmoid, τ 0.2 (control)": WHOLE | {"estimator": "sigmoid", "temperature": FIXED(0.2)},
    "ReinMax": DRAWN | {"estimator": "reinmax"},
    "ReinMax, τ 1.5": DRAWN | {"estimator": "reinmax", "temperature": FIXED(1.5)},
    "REINFORCE, no baseline": DRAWN | {"estimator": "reinforce", "reinforce": {"baseline": "none"}},
    "REINFORCE, running mean": DRAWN | {"estimator": "reinforce", "reinforce": {"baseline": "mean"}},
    "REINFORCE, per unit": DRAWN | {"estimator": "reinforce", "reinforce": {"baseline": "unit"}},
    "REINFORCE, conditional mean": DRAWN | {"estimator": "reinforce", "reinforce": {"baseline": "conditional"}},
    "REINFORCE, exponential reward": DRAWN | {"estimator": "reinforce", "reinforce": {"baseline": "mean", "reward": "exponential"}},
}
QUICK = ("anneal.yaml (the default)", "stochastic, sigmoid", "ReinMax", "REINFORCE, running mean")


@dataclass(frozen=True)
class Size:
    steps: int
    batch_size: int
    window: int
    copies: int
    hidden: int  # of the teacher
    teacher: int  # its iterations
    held_out: int  # characters of the validation and of the test part
    seeds: int


SIZES = {"quick": Size(20, 8, 32, 1, 48, 150, 4000, 1), "full": Size(4000, 64, 64, 4, 256, 3228, 100_000, 3)}


def folder_of(size: Size) -> Path:
    return Path(tempfile.gettempdir()) / f"study-conversion-{size.hidden}-{size.teacher}"


def teacher(size: Size) -> tuple[Path, list[str]]:
    """The teacher's file, made where it is not there, and the data."""
    folder = folder_of(size)
    path = folder / "teacher.pt"
    if not path.exists():
        public.make_text(folder)
        command = [sys.executable, str(ROOT / "scripts" / "train_text_teacher.py"), str(folder / "kjv.txt"), "--out", str(path)]
        subprocess.run([*command, "--hidden-size", str(size.hidden), "--iterations", str(size.teacher)], check=True, stdout=sys.stderr)
    for part in ("valid", "test"):
        text = (folder / f"{part}.txt").read_text(encoding="utf-8")
        (folder / f"{part}-{size.held_out}.txt").write_text(text[: size.held_out], encoding="utf-8")
    return path, [f"train={folder / 'train.txt'}", *(f"{part}={folder / f'{part}-{size.held_out}.txt'}" for part in ("valid", "test"))]


def recipe(variant: str, seed: int, size: Size) -> Recipe:
    train = {"steps": size.steps, "max_steps": size.steps, "batch_size": size.batch_size, "window": size.window}
    train["evaluate_every"] = max(1, size.steps // 8)
    gates = {"copies": size.copies} | VARIANTS[variant]
    return parse({"task": "next-token", "seed": seed, "gates": gates, "train": train, "report": {"controls": False}})


def measure(variant: str, seed: int, size: Size) -> Numbers:
    path, data = teacher(size)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        report = pipeline.convert(path, recipe=recipe(variant, seed, size), data=data, out=Path(folder) / "out").report
    hard, soft, float_ = (report[name]["metric"] for name in ("binary", "soft_student", "teacher"))
    return {
        "hard": hard,
        "lost": hard - float_,
        "lost_half": (report["drop"]["ci95"][1] - report["drop"]["ci95"][0]) / 2,
        "gap": hard - soft,
        "accuracy": 100 * report["binary"]["extra"]["accuracy"],
        "density": 100 * report["density"]["weights_touched"],
        "best_step": report["cost"]["best_step"],
        "training": report["cost"]["seconds"],
        "teacher": float_,
    }


def plot(results: Results, path: Path) -> None:
    points(results, path, column="lost", label="bits per character lost against the float teacher, on unseen text")


STUDY = Study(
    name="conversion",
    title="Conversion: every estimator at equal compute",
    columns=(
        Column("hard", "bits per character, binary", 3),
        Column("lost", "lost", 3),
        Column("gap", "binary − soft", 3),
        Column("accuracy", "accuracy %", 1),
        Column("density", "weights read %", 1),
        Column("best_step", "best step", 0, interval=False),
        Column("training", "training, s", 0, interval=False),
    ),
    variants=lambda size: list(VARIANTS) if size != SIZES["quick"] else QUICK,
    measure=measure,
    sizes=SIZES,
    plot=plot,
)

if __name__ == "__main__":
    run(STUDY)
