"""A packed directory's vocabulary as a tokenizer that transformers reads: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
UNKNOWN = ("<unk>", "<UNK>", "[UNK]", "<oov>", "UNK")
PADS = ("<pad>", "<PAD>", "[PAD]", "PAD")


def characters(vocabulary: Sequence[str]) -> bool:
    """Whether its tokens are single characters, but for names such as <unk>."""
    return all(len(token) == 1 or (token[:1] + token[-1:]) in ("<>", "[]") for token in vocabulary)


def write(folder: Path, vocabulary: Sequence[str] | None) -> bool:
    """Writes both files where the vocabulary can be a tokenizer's: no token twice or empty. Says whether it did.

    Characters are tokens of themselves, words are split at white space; nothing is added before or behind a text.
    """
    if not vocabulary or len(set(vocabulary)) != len(vocabulary) or "" in vocabulary:
        return False
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    named = lambda names: next((name for name in names if name in vocabulary), None)
    unknown, pad = named(UNKNOWN), named(PADS)
    numbers = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=unknown) if unknown else models.WordLevel(numbers))
    if characters(vocabulary):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / FILE))
    # what reads this file writes it anew: only what the network itself says
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "clean_up_tokenization_spaces": False}
    content |= {name: token for name, token in (("unk_token", unknown), ("pad_token", pad)) if token}  # type: ignore[misc]
    content |= {"model_input_names": ["input_ids", "attention_mask"]}  # type: ignore[dict-item]
    (folder / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True
