"""How good the float networks of docs/public-networks.md are on the test parts that scripts/public_data.py writes.

python scripts/public_teachers.py dga --packages demo --data demo/dga
"""

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rnn2bin import recipe_yaml
from rnn2bin.cells.network import teacher_network
from rnn2bin.distill.window import run_cell
from rnn2bin.loaders import load
from rnn2bin.recipe import Source

IGNORED = -100
Metrics = dict[str, float]
FILES: dict[str, tuple[str, Source | str]] = {
    "vad": ("silero_vad/data/silero_vad_16k_op15.onnx", Source(input_shape=[576])),
    "dga": ("dgaintel/domain_classifier_model.h5", Source()),
    "text": ("textgenrnn/textgenrnn_weights.hdf5", "textgenrnn.yaml"),
    "words": ("eng_150/weights.h5", "chars2vec.yaml"),
    "polyphone": ("g2pM/np_ckpt.pkl", "g2pm.yaml"),
    "diacritics": ("assets/bilstm_best.pt", "diacritics.yaml"),
}


@torch.no_grad()
def outputs(case: str, packages: Path, inputs: np.ndarray, lengths: np.ndarray | None, *, rows: int) -> Tensor:
    """Before the last activation: (N,O), or (N,T,O) zero-padded."""
    name, source = FILES[case]
    path = next(iter(sorted(packages.rglob(name))), None)
    if path is None:
        raise SystemExit(f"no {name} below {packages}: run scripts/public_packages.sh")
    loaded = load(path, source=recipe_yaml.read(source).source if isinstance(source, str) else source)
    network = teacher_network(loaded.spec, loaded.weights)
    found = []
    for at in range(0, len(inputs), rows):
        real = None if lengths is None else torch.from_numpy(lengths[at : at + rows])
        x = torch.from_numpy(inputs[at : at + rows]).transpose(0, 1)
        y = network(x, lengths=real, walk=run_cell, logits=True).y
        found.append(y.transpose(0, 1) if y.ndim == 3 else y)
    return torch.cat(found)


def yes_or_no(y: np.ndarray, truth: np.ndarray) -> Metrics:
    said, ranks = y > 0, np.empty(len(y))
    ranks[np.argsort(y, kind="stable")] = np.arange(1, len(y) + 1)
    yes = int(truth.sum())
    auc = (ranks[truth == 1].sum() - yes * (yes + 1) / 2) / (yes * (len(y) - yes))
    f1 = 2 * int((said & (truth == 1)).sum()) / int(said.sum() + truth.sum())
    return {"accuracy": float((said == truth).mean()), "auc": float(auc), "f1": f1, "n": len(y)}


def next_character(y: Tensor, truth: Tensor) -> Metrics:
    bits = torch.nn.functional.cross_entropy(y, truth) / math.log(2)
    return {"accuracy": float((y.argmax(-1) == truth).float().mean()), "bits": float(bits), "n": len(y)}


def labels(y: Tensor, truth: Tensor) -> Metrics:
    counted = truth != IGNORED
    return {"accuracy": float((y.argmax(-1)[counted] == truth[counted]).float().mean()), "n": int(counted.sum())}


def majority(data: Path, test: dict[str, np.ndarray]) -> float:
    """Always the reading that a character has most often in the training part."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    with np.load(data / "train.npz") as train:
        counted = train["targets"] != IGNORED
        for character, reading in zip(train["inputs"][counted], train["targets"][counted], strict=True):
            counts[character][reading] += 1
    counted = test["targets"] != IGNORED
    said = [counts[c].most_common(1)[0][0] if c in counts else IGNORED for c in test["inputs"][counted]]
    return float((np.array(said) == test["targets"][counted]).mean())


def typos(vectors: dict[str, Tensor]) -> Metrics:
    """For each typo of the test part, whether its word is the nearest of all, or one of the nearest five."""
    words = torch.cat([part[: len(part) // 2] for part in vectors.values()])
    wrong = vectors["test"][len(vectors["test"]) // 2 :]
    right = torch.cdist(wrong, words).argsort(1)[:, :5] == torch.arange(len(wrong))[:, None]
    return {"top_1": float(right[:, 0].float().mean()), "top_5": float(right.any(1).float().mean()), "words": len(words), "n": len(wrong)}


def measure(case: str, packages: Path, data: Path) -> Metrics:
    test = dict(np.load(data / "test.npz"))
    run: Callable[[dict[str, np.ndarray]], Tensor] = lambda part: outputs(
        case, packages, part["inputs"], part.get("lengths"), rows={"diacritics": 8, "vad": 64}.get(case, 256)
    )
    if case == "words":
        return typos({name: run(dict(np.load(data / f"{name}.npz"))) for name in ("test", "valid", "train")})
    y, truth = run(test), torch.from_numpy(test["targets"])
    if case in ("vad", "dga"):
        return yes_or_no(y.flatten().numpy(), test["targets"].flatten())
    if case == "text":
        return next_character(y, truth)
    return labels(y, truth) | ({"majority": majority(data, test)} if case == "polyphone" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=FILES)
    parser.add_argument("--packages", type=Path, default=Path("demo"))
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    print({name: round(value, 4) for name, value in measure(args.case, args.packages, args.data).items()})


if __name__ == "__main__":
    main()
