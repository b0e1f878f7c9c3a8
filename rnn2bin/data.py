"""Data: `--data` files -> train, validation and test parts that never overlap, and the batches training sees.

Shapes on disk are sequence-first, (N,T) tokens or (N,T,I) floats; batches are time-major, (T,B) or (T,B,I).
Validation chooses checkpoints; test is read by the report alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rnn2bin import recipe as recipes
from rnn2bin.errors import DataError, Rnn2binError
from rnn2bin.spec import RnnSpec

KEYS = {"inputs", "lengths", "targets", "target_lengths"}
IGNORE = -100  # label of a step that does not count
TEXT_ROWS = 32  # held-out text is read as that many streams side by side
TEXT_BLOCK = 512  # … in windows of that many tokens; a row of a window counts as one sequence in intervals


@dataclass(frozen=True)
class Part:
    """Sequences: inputs (N,T) int or (N,T,I) float; lengths (N); targets (N), (N,U) or float; target_lengths (N).

    `stream` marks text cut into N long rows: state carries along a row, and targets are the next tokens.
    `per_sequence` marks targets without a time axis, (N,) or (N,O): their second axis is never time, even where O equals T.
    `answers`: the teacher's outputs where training keeps them, (N,T,O) or (N,O); of a stream along the rows that it is trained in
    (distill/answers.py).
    """

    inputs: Tensor
    lengths: Tensor | None = None
    targets: Tensor | None = None
    target_lengths: Tensor | None = None
    stream: bool = False
    per_sequence: bool = False
    answers: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def tokens(self) -> bool:
        return not self.inputs.is_floating_point()

    def take(self, index: Tensor) -> Part:
        pick = lambda t: None if t is None else t[index]
        return replace(
            self,
            inputs=self.inputs[index],
            lengths=pick(self.lengths),
            targets=pick(self.targets),
            target_lengths=pick(self.target_lengths),
            answers=pick(self.answers),
        )


@dataclass(frozen=True)
class Batch:
    """Time-major slice: inputs (T,B[,I]); lengths (B); targets and answers as in `Part`, time-major where they have time;
    `first`: states start at zero."""

    inputs: Tensor
    lengths: Tensor | None
    targets: Tensor | None
    target_lengths: Tensor | None
    first: bool = True
    answers: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        move = lambda t: None if t is None else t.to(device)
        names = ("inputs", "lengths", "targets", "target_lengths", "answers")
        return replace(self, **{name: move(getattr(self, name)) for name in names})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Names:
    """What tokens read and classes given stand for, in the network's order; None: numbers."""

    inputs: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Parts:
    train: Part
    valid: Part
    test: Part
    data_free: bool = False
    vocabulary: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None

    @property
    def names(self) -> Names:
        return Names(self.vocabulary, self.labels)

    def each(self, change: Callable[[Part], Part]) -> Parts:
        """The same change made to all three."""
        return replace(self, train=change(self.train), valid=change(self.valid), test=change(self.test))


# ---------------------------------------------------------------------------------------------- reading


def load_parts(
    given: str | Path | Sequence[str] | None,
    recipe: recipes.Recipe,
    spec: RnnSpec,
    *,
    vocabulary: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Parts | None:
    """The parts of `--data` (a path, or `train=…`, `valid=…`, `test=…`), else of the recipe's `data:`; None where neither names any.

    `vocabulary`, `labels`: what a packed directory numbers characters or words, and classes, by; else they are what the recipe names, or
    found from the text. Raises DataError with every reason.
    """
    paths = named_files(given, recipe.data)
    if not paths:
        return None
    text = [path.suffix.lower() in (".txt", ".text") for path in paths.values()]
    if any(text) and not all(text):
        raise DataError("data: give either text files or tensor files, not both")
    parts = _text_parts(paths, recipe.data, spec, vocabulary) if all(text) else _tensor_parts(paths, recipe)
    parts = replace(parts, labels=_labels(recipe.data, spec, labels))
    if not all(text):
        parts = replace(parts, vocabulary=tuple(vocabulary) if vocabulary else token_names(recipe.data, spec))
    for name in ("train", "valid", "test"):
        check_part(getattr(parts, name), spec, where=name)
    return parts


def one_file(given: str | Path | Sequence[str] | None) -> Path | None:
    """The file, where exactly one is given: FILE, or test=FILE."""
    items = [given] if isinstance(given, str | Path) else list(given or ())
    if len(items) != 1 or str(items[0]).startswith(("train=", "valid=")):
        return None
    return Path(str(items[0]).removeprefix("test="))


def named_files(given: str | Path | Sequence[str] | None, data: recipes.Data) -> dict[str, Path]:
    """{all} or {train, valid, test}: the files of `--data`, else of the recipe's `data:`. DataError where they do not go together,
    or are not there."""
    if given is None:
        named = {"train": data.train, "valid": data.valid_path, "test": data.test_path, "all": data.path}
        paths = {name: Path(path) for name, path in named.items() if path}
    else:
        items = [given] if isinstance(given, str | Path) else list(given)
        paths = {}
        for item in items:
            name, _, file = str(item).partition("=")
            name, file = (name, file) if file and name in ("train", "valid", "test") else ("all", str(item))
            if name in paths:
                raise DataError(f"data: {paths[name]} and {file} are given for the same part; give one file a part")
            paths[name] = Path(file)
    if paths and not ("all" in paths) ^ ("train" in paths):
        raise DataError("data: give one file, or train=FILE with optional valid=FILE and test=FILE")
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path}: no such data file")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the data file is empty")
    return paths


def read_tensors(path: Path) -> Part:
    """One tensor file -> Part. Raises DataError."""
    from rnn2bin.loaders import npz, pytorch, safetensors_file

    readers = {".npz": npz.read, ".safetensors": safetensors_file.read, ".pt": pytorch.read, ".pth": pytorch.read}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of data; give .npz, .safetensors, .pt (tensors only) or .txt")
    try:
        tensors = reader(path)
    except Rnn2binError as error:
        raise DataError(*error.reasons) if error.exit_code != 4 else error from None
    return part_from(tensors, where=str(path))


def part_from(tensors: Mapping[str, Tensor], *, where: str = "data") -> Part:
    """A Part from named arrays; DataError lists everything that does not fit."""
    unknown = sorted(set(tensors) - KEYS)
    reasons = [f"{where}: unknown array {name!r}; known: {', '.join(sorted(KEYS))}" for name in unknown]
    inputs = tensors.get("inputs")
    if inputs is None:
        raise DataError(*reasons, f"{where}: needs an array 'inputs' of shape (N,T) or (N,T,I)")
    if inputs.ndim < 2:
        reasons.append(f"{where}: inputs have shape {tuple(inputs.shape)}; wanted (N,T) tokens or (N,T,I) floats")
    if inputs.numel() == 0:
        reasons.append(f"{where}: no sequences: inputs have shape {tuple(inputs.shape)}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            at = tuple(int(i) for i in (~torch.isfinite(tensor.float())).nonzero()[0])
            reasons.append(f"{where}: {name}{list(at)} is NaN or infinite in float32; remove or repair these values")
        if not tensor.ndim:
            reasons.append(f"{where}: {name} is a single number; wanted one entry for each sequence")
        elif inputs.ndim and tensor.shape[0] != inputs.shape[0]:
            reasons.append(f"{where}: {name} has {tensor.shape[0]} sequences, inputs {inputs.shape[0]}")
    reasons += _length_reasons(tensors, "lengths", "inputs", where) + _length_reasons(tensors, "target_lengths", "targets", where)
    if reasons:
        raise DataError(*reasons)
    cast = lambda t: None if t is None else (t.float() if t.is_floating_point() else t.long())
    return Part(*(cast(tensors.get(name)) for name in ("inputs", "lengths", "targets", "target_lengths")))  # type: ignore[arg-type]


def _length_reasons(tensors: Mapping[str, Tensor], name: str, of: str, where: str) -> list[str]:
    lengths, target = tensors.get(name), tensors.get(of)
    if lengths is None:
        return []
    if target is None or target.ndim < 2:
        return [f"{where}: {name} given, but {of} have no time axis"]
    if lengths.ndim != 1 or lengths.is_floating_point():
        return [f"{where}: {name} must be whole numbers of shape (N,), not {tuple(lengths.shape)}"]
    if lengths.numel() and (int(lengths.min()) < 1 or int(lengths.max()) > target.shape[1]):
        return [f"{where}: {name} must lie in 1…{target.shape[1]}; found {int(lengths.min())}…{int(lengths.max())}"]
    return []


def _tensor_parts(paths: dict[str, Path], recipe: recipes.Recipe) -> Parts:
    read = {name: read_tensors(path) for name, path in paths.items()}
    whole = read["all"] if "all" in read else read["train"]
    return split(whole, recipe, valid=read.get("valid"), test=read.get("test"))


def split(whole: Part, recipe: recipes.Recipe, *, valid: Part | None = None, test: Part | None = None) -> Parts:
    """A seeded split of what is not given apart; raises DataError where a part would be empty."""
    n = len(whole)
    n_test = 0 if test is not None else max(1, round(n * recipe.data.test))
    n_valid = 0 if valid is not None else max(1, round(n * recipe.data.valid))
    if n - n_test - n_valid < 1:
        raise DataError(f"data: {n} sequences are too few to hold out {n_valid} for validation and {n_test} for the report")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(recipe.seed))
    return Parts(
        train=whole.take(order[n_test + n_valid :]),
        valid=valid if valid is not None else whole.take(order[n_test : n_test + n_valid]),
        test=test if test is not None else whole.take(order[:n_test]),
    )


def check_part(part: Part, spec: RnnSpec, *, where: str) -> None:
    """Inputs against what the network reads; DataError."""
    entry = spec.entry
    if entry.embedding:
        if not part.tokens:
            raise DataError(f"{where}: the network reads tokens, but inputs are {part.inputs.dtype}; give whole numbers of shape (N,T)")
        low, high = int(part.inputs.min()), int(part.inputs.max())
        if low < 0 or high >= entry.embedding.num_embeddings:
            raise DataError(f"{where}: tokens must lie in 0…{entry.embedding.num_embeddings - 1}; found {low}…{high}")
    elif part.tokens or tuple(part.inputs.shape[2:]) != entry.input_shape:
        kind, wanted = "whole numbers" if part.tokens else "floats", ",".join(("N", "T", *map(str, entry.input_shape)))
        raise DataError(f"{where}: the network reads floats ({wanted}), but inputs are {kind} {tuple(part.inputs.shape)}")
    if entry.graph and entry.graph.steps not in (None, part.inputs.shape[1]):
        found = tuple(part.inputs.shape)
        raise DataError(f"{where}: the network reads sequences of {entry.graph.steps} steps, but inputs are {found}; pad or cut them")
    if entry.graph and part.lengths is not None and not entry.graph.padded:
        raise DataError(f"{where}: this network's outputs change with what is padded, so lengths do not help; give sequences of one length")


# ---------------------------------------------------------------------------------------------- text


def _text_parts(paths: dict[str, Path], data: recipes.Data, spec: RnnSpec, known: Sequence[str] | None) -> Parts:
    if spec.entry.embedding is None or spec.decode:
        raise DataError("data: text needs a network with token input (one section with an embedding or one-hot tokens)")
    texts = {name: read_text(path) for name, path in paths.items()}
    if known:
        encode, vocabulary = lambda text: encode_text(text, known), tuple(known)
    else:
        encode, vocabulary = _vocabulary(texts, data, spec.entry.embedding.num_embeddings)
    streams = {name: encode(text) for name, text in texts.items()}
    whole = streams["all"] if "all" in streams else streams["train"]
    # Contiguous, in order: neighbouring text never stands on both sides of a cut but at the cut itself.
    n_test = 0 if "test" in streams else int(len(whole) * data.test)
    n_valid = 0 if "valid" in streams else int(len(whole) * data.valid)
    end = len(whole) - n_test - n_valid
    valid = streams.get("valid", whole[end : end + n_valid])
    test = streams.get("test", whole[end + n_valid :])
    for name, part in (("train", whole[:end]), ("valid", valid), ("test", test)):
        if len(part) < 2 * TEXT_ROWS:
            raise DataError(f"data: only {len(part)} tokens of text for {name}; at least {2 * TEXT_ROWS} are needed")
    return Parts(Part(whole[:end][None], stream=True), rows_of(valid), rows_of(test), vocabulary=vocabulary)


def rows_of(tokens: Tensor, rows: int = TEXT_ROWS) -> Part:
    """A token stream (K,) -> `rows` streams side by side (rows, K // rows)."""
    return Part(tokens[: len(tokens) // rows * rows].view(rows, -1), stream=True)


def read_text(path: Path) -> str:
    """DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None


def _vocabulary(texts: dict[str, str], data: recipes.Data, size: int):
    """(text -> tokens, vocabulary or None). Raises DataError when no numbering of the text has the network's size."""
    if data.vocabulary:
        words = _lines(data.vocabulary, "data.vocabulary", "token", size)
        return _by_table(words, data.tokens == "words"), words
    characters = tuple(sorted(set("".join(texts.values()))))
    if data.tokens in ("auto", "characters") and len(characters) == size:
        return _by_table(characters, False), characters
    if data.tokens in ("auto", "bytes") and size == 256:
        return lambda text: torch.tensor(list(text.encode())), None
    raise DataError(
        f"data: the network knows {size} tokens; the text has {len(characters)} different characters. "
        "Give data.vocabulary (a file with one token a line, in the network's order), or token numbers in an .npz"
    )


def _lines(file: str, knob: str, what: str, size: int) -> tuple[str, ...]:
    """The lines of a file of names, as many as the network knows; DataError."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path}: no such {knob.removeprefix('data.')} file; {knob} names a file with one {what} a line")
    words = tuple(read_text(path).removesuffix("\n").split("\n"))
    if len(words) != size:
        raise DataError(f"{path}: {len(words)} {what}s, but the network knows {size}; {knob} names a file with one {what} a line")
    return words


def token_names(data: recipes.Data, spec: RnnSpec) -> tuple[str, ...] | None:
    """What tokens stand for that came as numbers, where the recipe says."""
    if data.vocabulary is None:
        return None
    if spec.entry.embedding is None:
        raise DataError("data: data.vocabulary names tokens, but the network reads floats; leave it out")
    return _lines(data.vocabulary, "data.vocabulary", "token", spec.entry.embedding.num_embeddings)


def _labels(data: recipes.Data, spec: RnnSpec, known: Sequence[str] | None) -> tuple[str, ...] | None:
    """What the classes given stand for, where the recipe or the packed directory says. One output is two classes."""
    if known is not None or data.labels is None:
        return None if known is None else tuple(known)
    size = (spec.sections["decoder"] if spec.decode else spec.main).output_size
    return _lines(data.labels, "data.labels", "label", 2 if size == 1 else size)


def encode_text(text: str, vocabulary: Sequence[str] | None) -> Tensor:
    """Text -> tokens (K,) by a packed model's vocabulary; bytes where it has none."""
    if not vocabulary:
        return torch.tensor(list(text.encode()), dtype=torch.long)
    # <unk>, [PAD] and their like stand beside single characters too.
    words = any(len(token) > 1 and token[0] + token[-1] not in ("<>", "[]") for token in vocabulary)
    return _by_table(tuple(vocabulary), words)(text)


def _by_table(tokens: tuple[str, ...], words: bool):
    number = {token: index for index, token in enumerate(tokens)}

    def encode(text: str) -> Tensor:
        pieces = text.split() if words else text
        missing = sorted(set(pieces) - number.keys())
        unknown = number.get("<unk>", number.get("[UNK]"))
        if missing and unknown is None:
            raise DataError(f"data: {len(missing)} tokens of the text are not in the vocabulary, e.g. {missing[0]!r}")
        return torch.tensor([number.get(piece, unknown) for piece in pieces], dtype=torch.long)

    return encode


# ---------------------------------------------------------------------------------------------- batches


class Batches:
    """Training batches by index: item k is always the same batch, so that a resumed run sees what an uninterrupted one sees.

    Streams: `batch_size` rows side by side, consecutive windows, wrapping around with fresh states. Sequences: a seeded permutation an
    epoch, lengths bucketed, cut to the longest of the batch; longer ones than `window` are walked in windows where `windowed`.

    With several `processes` item k·processes + r is process r's rows of batch k: together they see what one would see.
    """

    def __init__(self, part: Part, *, batch_size: int, window: int, seed: int, length: int, windowed: bool, processes: int = 1) -> None:
        self.part, self.window, self.seed, self.length, self.processes = part, window, seed, length * processes, processes
        if part.stream:
            flat = part.inputs.flatten()
            rows = max(1, min(batch_size, len(flat) // (window + 1)))
            self.rows = flat[: len(flat) // rows * rows].view(rows, -1)
            self.per_pass = max(1, (self.rows.shape[1] - 1) // window)
            self._check_shares(rows)
            return
        self.batch_size = min(batch_size, len(part))
        self._check_shares(self.batch_size)
        steps = part.inputs.shape[1]
        self.windows = -(-steps // window) if windowed and steps > window else 1
        self._epoch: tuple[int, list[Tensor]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> Batch:
        k, process = divmod(item, self.processes)
        return self._stream(k, process) if self.part.stream else self._sequences(k, process)

    def _check_shares(self, rows: int) -> None:
        if rows < self.processes:
            raise DataError(f"data: a batch has {rows} sequences, too few for {self.processes} processes; raise train.batch_size")

    def _stream(self, k: int, process: int) -> Batch:
        at = k % self.per_pass
        cut = share(self.rows, process, self.processes)[:, at * self.window : (at + 1) * self.window + 1].t()
        answers = self.part.answers
        if answers is not None:
            answers = share(answers, process, self.processes)[:, at * self.window :][:, : len(cut) - 1].transpose(0, 1)
        return Batch(cut[:-1], None, cut[1:], None, first=at == 0, answers=answers)

    def _sequences(self, k: int, process: int) -> Batch:
        which, at = divmod(k, self.windows)
        per_epoch = len(self.part) // self.batch_size
        epoch, place = divmod(which, per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        batch = collate(self.part.take(share(self._epoch[1][place], process, self.processes)))
        return batch if self.windows == 1 else cut_window(batch, at * self.window, self.window)

    def _order(self, epoch: int) -> list[Tensor]:
        """The epoch's batches: shuffled; within stretches of 16 batches sorted by length, so that batches pad little."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.part), generator=generator)[: len(self.part) // self.batch_size * self.batch_size]
        if self.part.lengths is not None:
            stretch = 16 * self.batch_size
            order = torch.cat([piece[self.part.lengths[piece].argsort(stable=True)] for piece in order.split(stretch)])
        batches = list(order.split(self.batch_size))
        return [batches[int(i)] for i in torch.randperm(len(batches), generator=generator)]


def share(rows: Tensor, process: int, processes: int) -> Tensor:
    """One process's rows (axis 0) of a batch; the first ones have one more where they do not divide."""
    return rows if processes == 1 else rows.tensor_split(processes)[process]


def collate(part: Part, *, first: bool = True) -> Batch:
    """Sequences -> one time-major batch, cut to its longest."""
    longest = max(1, int(part.lengths.max())) if part.lengths is not None else part.inputs.shape[1]  # all may be empty: one pad stays
    inputs = part.inputs[:, :longest].transpose(0, 1)
    targets = part.targets
    if targets is not None and targets.ndim > 1 and not part.per_sequence:
        longest_target = int(part.target_lengths.max()) if part.target_lengths is not None else longest
        targets = targets[:, :longest_target].transpose(0, 1)
    answers = part.answers
    if answers is not None and answers.ndim > 2:
        steps = longest if part.target_lengths is None or targets is None else len(targets)
        answers = answers[:, :steps].transpose(0, 1)
    return Batch(inputs.contiguous(), part.lengths, targets, part.target_lengths, first=first, answers=answers)


def cut_window(batch: Batch, start: int, window: int) -> Batch:
    """Steps start … start + window of a batch; lengths become what is left of each sequence there (0 where it has ended)."""
    steps = batch.inputs.shape[0]
    lengths = batch.lengths if batch.lengths is not None else torch.full((batch.inputs.shape[1],), steps)
    left = (lengths - start).clamp(0, window)
    # Behind the batch's end stands its last step again, which no sequence counts.
    cut = slice(min(start, steps - 1), min(start + window, steps))
    of = lambda values: None if values is None else values[cut]
    return Batch(batch.inputs[cut], left, of(batch.targets), None, first=start == 0, answers=of(batch.answers))


def evaluation_batches(part: Part, *, batch_size: int = 256) -> Iterator[Batch]:
    """A whole part in order, without shuffling. A stream comes in windows of its rows, state to be carried where `first` is false."""
    if part.stream:
        rows = part.inputs.t()
        for start in range(0, len(rows) - 1, TEXT_BLOCK):
            cut = rows[start : start + TEXT_BLOCK + 1]
            yield Batch(cut[:-1].contiguous(), None, cut[1:].contiguous(), None, first=start == 0)
        return
    for start in range(0, len(part), batch_size):
        yield collate(part.take(torch.arange(start, min(start + batch_size, len(part)))))


def digest(parts: Parts) -> str:
    """sha256 over all tensors of all parts, for provenance."""
    state = hashlib.sha256()
    for part in (parts.train, parts.valid, parts.test):
        for tensor in (part.inputs, part.lengths, part.targets, part.target_lengths):
            if tensor is not None:
                state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()
