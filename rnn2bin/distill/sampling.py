"""Data-free conversion: sequences sampled from the teacher itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnn2bin.cells.network import Network
from rnn2bin.data import Part, Parts, split, token_names
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import UsageError
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.recipe import Recipe, Sampling

NO_DATA = (
    "no data: give --data FILE (.npz, .safetensors or .pt with inputs (N,T,I) or (N,T), or a .txt), "
    "or name it in the recipe (data: {path: FILE}); only networks that read tokens and predict the next one can be converted without data"
)


def data_free(teacher: Network, recipe: Recipe, *, vocabulary: Sequence[str] | None = None) -> Parts:
    """Parts sampled from a token-in, token-out teacher. Raises UsageError (exit 2) with the ways to give data for any other network.

    `vocabulary`: what a packed directory numbers tokens by; else they are what the recipe names.
    """
    main = teacher.spec.main
    fits = (
        teacher.spec.decode is None
        and main.embedding is not None
        and main.windowed
        and bool(main.head or main.graph)
        and main.output_size == main.embedding.num_embeddings
    )
    if not fits or recipe.task not in ("auto", "next-token", "match"):
        raise UsageError(NO_DATA)
    tokens = sample_tokens(teacher, recipe.data.sample, seed=recipe.seed)
    parts = split(Part(tokens), recipe)
    names = tuple(vocabulary) if vocabulary else token_names(recipe.data, teacher.spec)
    return Parts(parts.train, parts.valid, parts.test, data_free=True, vocabulary=names)


@torch.no_grad()
def sample_tokens(teacher: Network, sampling: Sampling, *, seed: int) -> Tensor:
    """(N, length) tokens, each drawn from the teacher's own distribution after a uniformly drawn first token."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = teacher.spec.main.output_size
    token = torch.randint(vocabulary, (1, sampling.sequences), generator=generator)
    state, tokens = None, [token]
    for _ in range(sampling.length - 1):
        out = teacher(token, state, mode=FLOAT, walk=run_cell, logits=True)
        state = out.state
        token = torch.multinomial(torch.softmax(out.y[0] / sampling.temperature, -1), 1, generator=generator).t()
        tokens.append(token)
    return torch.cat(tokens).t().contiguous()
