"""Mel windows of real speech for Resemblyzer's voice encoder, from Debian's asterisk-core-sounds-*-wav packages.

    python scripts/voice_data.py /usr/share/asterisk/sounds/??_??_?_* --out DIR

The features are the encoder's own front end: 16 kHz, volume raised to -30 dBFS, 40 mel bands (slaney), window 400, hop 160, power 2, not
log; windows of 160 frames (1.6 s) every 80. Silences are not cut. A recording stands on one side of the split only. No labels: the task
is `match`. Needs numpy and scipy.
"""

import argparse
import wave
from collections.abc import Iterator
from math import gcd
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

RATE, N_FFT, HOP, BANDS, FRAMES = 16_000, 400, 160, 40, 160


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float64) / 32768
        rate = file.getframerate()
    common = gcd(rate, RATE)
    return resample_poly(pcm, RATE // common, rate // common)


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
    padded = np.pad(sound, N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    return (np.abs(np.fft.rfft(frames * window)) ** 2 @ bank.T).astype(np.float32)


def windows(path: Path, bank: np.ndarray) -> Iterator[np.ndarray]:
    sound = samples(path)
    if len(sound) < HOP * FRAMES:
        return
    frames = mel(sound, bank)
    for start in range(0, len(frames) - FRAMES + 1, FRAMES // 2):
        yield frames[start : start + FRAMES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sounds", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = sorted(f for folder in args.sounds for f in folder.rglob("*.wav") if "silence" not in f.parts)
    order = np.random.default_rng(args.seed).permutation(len(files))
    ends = (len(files) // 10, len(files) // 5)
    split = {"test": order[: ends[0]], "valid": order[ends[0] : ends[1]], "train": order[ends[1] :]}
    bank = filterbank()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in split.items():
        found = [w for i in chosen for w in windows(files[i], bank)]
        np.savez(args.out / f"{name}.npz", inputs=np.stack(found))
        print(f"{name}: {len(found)} windows of {len(chosen)} recordings")


if __name__ == "__main__":
    main()
