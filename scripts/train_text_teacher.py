"""Train a float character model to have something to convert: a plain torch LSTM or GRU with embedding and linear head.

    python scripts/train_text_teacher.py kjv.txt --out kjv.pt --iterations 3228 --seed 0

The last 5% of the text are held out and never seen. Writes an ordinary PyTorch state dict (`embedding.weight`, `rnn.*`,
`head.*`), as a user would have one; characters are numbered in sorted order, which is rnn2bin's default for text.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", choices=["LSTM", "GRU"], default="LSTM")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=3228)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    tokens = torch.tensor([number[c] for c in text])
    held_out = int(len(tokens) * 0.95)
    streams = tokens[: held_out // args.batch_size * args.batch_size].view(args.batch_size, -1).t().contiguous()
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(len(characters), 128),
            "rnn": getattr(nn, args.cell)(128, args.hidden_size, args.layers),
            "head": nn.Linear(args.hidden_size, len(characters)),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations, args.learning_rate / 20)
    state, at, began = None, 0, time.time()

    def loss_of(x: torch.Tensor, y: torch.Tensor, state):
        out, state = model["rnn"](model["embedding"](x), state)
        return functional.cross_entropy(model["head"](out).flatten(0, 1), y.flatten()), state

    for iteration in range(args.iterations):
        if at + args.window + 1 > len(streams):
            at, state = 0, None
        x, y = streams[at : at + args.window], streams[at + 1 : at + args.window + 1]
        at += args.window
        loss, state = loss_of(x, y, state)
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if iteration % 200 == 0:
            print(f"{iteration} train {loss.item() / math.log(2):.4f} bits/char {time.time() - began:.0f} s", flush=True)
    with torch.no_grad():
        rest = tokens[held_out:]
        rest = rest[: len(rest) // 16 * 16].view(16, -1).t()
        loss, _ = loss_of(rest[:-1], rest[1:], None)
    print(f"held out {loss.item() / math.log(2):.4f} bits/char after {time.time() - began:.0f} s")
    torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
