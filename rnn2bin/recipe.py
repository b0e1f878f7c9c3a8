"""The recipe: what a conversion does, as closed, frozen data. This module touches no model.

The pydantic models below are the one home of every knob, its default and its bounds; `rnn2bin.recipe_yaml` reads YAML with positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from rnn2bin.kinds import CELLS, MOST_DEPTH
from rnn2bin.spec import Activation, Readout

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

Task = Literal["auto", "next-token", "classify", "tag", "regress", "match", "transduce"]
Metric = Literal["auto", "bits_per_token", "accuracy", "mse", "cosine", "agreement", "sequence_accuracy"]
ScheduleKind = Literal["constant", "linear", "exponential", "cosine", "step"]

# fmt: off
Estimator = Literal[
    "gumbel", "gumbel-hard", "gumbel-softmax", "hard-concrete", "sigmoid", "hard-sigmoid", "straight-through", "stochastic", "reinmax",
    "reinforce",
]
# fmt: on
SOFT_ESTIMATORS = frozenset({"gumbel", "gumbel-softmax", "hard-concrete", "sigmoid", "hard-sigmoid"})  # values between 0 and 1 in training

if TYPE_CHECKING:
    CellName = str
else:
    CellName = Literal[tuple(CELLS)]  # every row of the table, by name

GATE_NAMES = tuple(dict.fromkeys(gate.name for kind in CELLS.values() for gate in (*kind.gates, *kind.links)))
_T = TypeVar("_T")


def _check_gates(given: Iterable[tuple[tuple[str | int, ...], Any]], validate: Callable[[], _T]) -> _T:
    """`validate()`, with a ValidationError that holds its errors and one for each (loc, gate) of no cell at once.

    A validator that ran after the fields would stay silent as long as one of them is wrong.
    """
    known = ", ".join(GATE_NAMES)
    errors = [
        InitErrorDetails(
            type=PydanticCustomError("gate_name", "no cell has a gate {name}; gates: {known}", {"name": name, "known": known}),
            loc=loc,
            input=gate,
        )
        for loc, gate in given
        if isinstance(gate, str) and (name := gate.rpartition(".")[2]).rstrip("0123456789") not in GATE_NAMES
    ]
    try:
        value = validate()
    except ValidationError as error:
        found = error.errors(include_url=False)
        errors += [InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {})) for e in found]
    if errors:
        raise ValidationError.from_exception_data("Recipe", errors)
    return value


class Closed(BaseModel):
    """Unknown keys are errors; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Closed):
    """A value as a pure function of progress in [0, 1]; reached at `until`, constant after."""

    schedule: ScheduleKind = Field("exponential", description="the curve from start to end")
    start: Positive = Field(description="value at progress 0")
    end: Positive = Field(description="value from progress `until` on")
    until: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="progress at which `end` is reached")
    steps: Count = Field(5, description="for `schedule: step`: how many equal jumps")


class LinearSource(Closed):
    weight: str = Field(description="tensor of shape (out, in)")
    bias: str | None = Field(None, description="tensor of shape (out,)")
    activation: Activation = Field("none", description="what follows the linear layer")


class LayerSource(Closed):
    """One direction of one recurrent layer: its tensors in PyTorch's order of rows (LSTM i,f,g,o, or i,g,o where f = 1 − i; GRU r,z,n;
    others their gates, the candidate before o or at the end), or under this package's own names behind a prefix."""

    weight_ih: str | None = Field(None, description="input's weights of all blocks of rows")
    weight_hh: str | None = Field(None, description="recurrent ones")
    bias_ih: str | None = None
    bias_hh: str | None = None
    weight_hr: str | None = Field(None, description="the LSTM's projection")
    peephole: list[str] | None = Field(
        None, description="the LSTM's peepholes: a tensor for each gate, i, f, o or i, o; (hidden,), or (hidden, hidden) of full ones"
    )
    prefix: str | None = Field(
        None, description="the layer's tensors are `<prefix>gates.weight_ih`, `<prefix>candidate.bias` …: spec.LayerSpec.tensors"
    )
    depth: Annotated[int, Field(ge=1, le=MOST_DEPTH)] = Field(
        1, description="layers within a step, of recurrent_highway, gf_tanh, gf_gru, gf_lstm"
    )
    cell: CellName | None = Field(None, description="what this layer is where it is not the section's `cell`")
    activation: Literal["tanh", "relu"] = Field("tanh", description="of a plain RNN")
    reverse: LayerSource | None = Field(None, description="the backward direction's tensors")

    @model_validator(mode="after")
    def _named(self) -> LayerSource:
        if (self.prefix is None) == (self.weight_ih is None):
            raise ValueError("name a layer's tensors by `weight_ih` and the others, or all at once by `prefix`")
        return self


# fmt: off
GraphOp = Literal[
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "Cast", "CastLike", "Ceil",
    "Celu", "Clip", "Compact", "Concat", "Constant", "ConstantOfShape", "Conv", "Cos", "Cosh", "CumSum", "Div", "Dropout", "Einsum", "Elu",
    "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
    "GlobalMaxPool", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Linear", "Log", "LogSoftmax", "LpNormalization", "MatMul",
    "Max", "MaxPool", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "OneHot", "Or", "PRelu", "Pad", "PlainRnn", "Pow",
    "RMSNormalization", "Range", "Reciprocal", "Recurrent", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "ReverseSequence", "Round",
    "ScatterElements", "ScatterND", "Selu", "Shape", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign",
    "Split", "Spread", "Sqrt", "Squeeze", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu",
    "Unsqueeze", "Where", "Xor",
]
# fmt: on


def _attribute(value: Any) -> Any:
    one_kind = isinstance(value, list) and (all(type(n) is int for n in value) or all(type(n) in (int, float) for n in value))
    if not one_kind and not isinstance(value, bool | int | float | str):
        raise ValueError("must be a number, a text, true, false, or a list of numbers")
    return value


class NodeSource(Closed):
    """One operation around the layers, under ONNX's name and with its meaning (opset 17); and two that ONNX lacks: `Recurrent` runs layers
    of the section on x (B,T,·) -> y (B,T,D·R), last h (D,B,R), an LSTM's last c (D,B,H); `Linear` is x Wᵀ + b for W (out, in).

    Values are `input` (what the section reads behind its embedding, (B,T,…)), `tokens` (B,T), `lengths` (B,), outputs of the nodes before,
    and the file's tensors by their names.
    """

    op: GraphOp
    inputs: list[str] = Field(default_factory=list, description='values and tensors, "" for one left out')
    outputs: list[str] = Field(min_length=1, description="names for what it gives; the last node's first output goes on to the head")
    attributes: dict[str, Annotated[Any, AfterValidator(_attribute)]] = Field(
        default_factory=dict, description="the operation's own; of Recurrent: `layers`, which of the section's it runs, all if not given"
    )


class SectionSource(Closed):
    cell: CellName
    layers: list[LayerSource] = Field(min_length=1)
    embedding: str | None = Field(None, description="tensor of shape (vocabulary, width)")
    one_hot: bool = Field(False, description="inputs are tokens, fed as one-hot vectors")
    head: list[LinearSource] = Field(default_factory=list, description="linear layers after the last recurrent one")
    readout: Readout = Field(
        "all", description="what the head reads: all steps, the last step, the final states of both directions, the mean or max over time"
    )
    graph: list[NodeSource] | None = Field(
        None,
        min_length=1,
        description="what stands around and between the layers, in order, where they are no plain chain; takes no readout",
    )

    @model_validator(mode="after")
    def _graph_reads_out(self) -> SectionSource:
        if self.graph and self.readout != "all":
            raise ValueError("`readout` is for plain chains; a `graph` says itself what it gives (Gather, ReduceMean, …)")
        return self


class DecodeSource(Closed):
    start: Annotated[int, Field(ge=0)] = Field(description="token that starts the decoder")
    end: Annotated[int, Field(ge=0)] = Field(description="token that ends it")
    max_length: Count = Field(description="most steps it takes")


# fmt: off
KerasKind = Literal[
    "Input", "Embedding", "LSTM", "GRU", "SimpleRNN", "CuDNNLSTM", "CuDNNGRU", "Dense", "Conv1D", "Conv2D", "MaxPooling1D",
    "AveragePooling1D", "GlobalMaxPooling1D", "GlobalAveragePooling1D", "WeightedAverage", "BatchNormalization", "LayerNormalization",
    "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "Dropout", "Masking", "Flatten", "Reshape", "Permute", "RepeatVector",
    "Concatenate", "Add", "Average", "Subtract", "Multiply", "Maximum", "Minimum", "Dot",
]
# fmt: on


class KerasLayer(Closed):
    """One layer of a Keras file in Keras's own words; what is not given is what the file says, or Keras's default."""

    name: str = Field(description="the layer's name in the file")
    kind: KerasKind | None = Field(
        None, description="its class; WeightedAverage is Σ softmax(x·w)ₜ xₜ, known as AttentionWeightedAverage (DeepMoji)"
    )
    inputs: list[str] | None = Field(None, description="the layers it reads; the one before, if not given")
    shape: list[Count | None] | None = Field(None, description="Input: of a sequence, null where any length may come: [null, 59]")
    one_hot: bool | None = Field(None, description="Input: floats are one-hot vectors; give tokens instead")
    activation: str | None = None
    recurrent_activation: Literal["sigmoid", "hard_sigmoid"] | None = Field(
        None, description="of gates; hard_sigmoid is clip(.2x+.5) in files of Keras 1 and 2, clip(x/6+.5) in those of Keras 3"
    )
    return_sequences: bool | None = Field(None, description="a recurrent layer gives every step, not the last only")
    bidirectional: Literal["concat", "sum", "mul", "ave"] | None = Field(None, description="both directions, and how they are merged")
    go_backwards: bool | None = None
    zero_output_for_mask: bool | None = None
    reset_after: bool | None = Field(None, description="GRU: the reset gate multiplies U h + b (Keras 2.x on TensorFlow 2, Keras 3), not h")
    mask_zero: bool | None = Field(None, description="Embedding: token 0 is padding, which recurrent layers skip")
    mask_value: float | None = None
    padding: Literal["valid", "same", "causal"] | None = None
    strides: Count | None = None
    dilation_rate: Count | None = None
    groups: Count | None = None
    pool_size: Count | None = None
    epsilon: Positive | None = None
    alpha: float | None = Field(None, description="LeakyReLU, ELU")
    axis: int | None = None
    axes: list[int] | None = Field(None, description="Dot: of each value, the batch counted")
    target_shape: list[int] | None = Field(None, description="Reshape: without the batch; -1 once")
    dims: list[int] | None = Field(None, description="Permute: the new order of the axes, from 1")
    n: Count | None = Field(None, description="RepeatVector")

    def config(self) -> dict[str, Any]:
        """What was given of Keras's own options."""
        own = {"name", "kind", "inputs", "shape", "one_hot", "bidirectional"}
        return self.model_dump(exclude_none=True, exclude=own)


class Source(Closed):
    """What a bare tensor file cannot say: how its tensors join to a network. `rnn2bin inspect` prints one to start from.

    Without `main` or `encoder` and `decoder` the network is recognised from the tensors' names and shapes; `decode`, `cell`,
    `readout` and `activations` then add what these do not tell.
    """

    main: SectionSource | None = None
    encoder: SectionSource | None = None
    decoder: SectionSource | None = None
    decode: DecodeSource | None = None
    ignore: list[str] = Field(default_factory=list, description="tensors that the network does not need: names or patterns (`head_*`)")
    cell: Literal["gru_reset_before"] | None = Field(None, description="recognised networks: the GRU's reset gate multiplies h before U_n")
    readout: Readout | None = Field(None, description="recognised networks: what the head reads")
    activations: list[Activation] | None = Field(None, description="recognised networks: what follows each linear layer, in order")
    keras: list[KerasLayer] | None = Field(
        None, description="Keras files: the layers of a file of weights alone, in order; else what differs from the file's own config"
    )
    output: str | None = Field(
        None,
        description="graph files: which output is the network's (Keras: the layer that gives it); default: the first behind a layer",
    )
    inputs: dict[str, int | float | list[int | float]] = Field(
        default_factory=dict, description="graph files: inputs that always have the same value (`{sr: 16000}`)"
    )
    input_shape: list[Count] | None = Field(
        None, description="graph files that leave it open, and `graph` sections of floats: sizes of one step of the input"
    )

    @property
    def given(self) -> set[str]:
        """The knobs that say something: those of a resolved recipe stand all in it, most with their defaults."""
        defaults = Source()
        return {name for name in type(self).model_fields if getattr(self, name) != getattr(defaults, name)}

    @property
    def has_graph(self) -> bool:
        """Whether the recipe says itself what stands around the layers."""
        return self.main is not None and self.main.graph is not None

    @property
    def automatic(self) -> bool:
        """Whether the network is to be recognised from names and shapes."""
        return self.main is None and self.encoder is None and self.decoder is None

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        pair = (self.encoder, self.decoder, self.decode)
        hints = [name for name in ("cell", "readout", "activations") if getattr(self, name) is not None]
        if self.automatic:
            return self
        if (self.main is not None and any(pair)) or (self.main is None and not all(pair)):
            raise ValueError("give either `main`, or `encoder`, `decoder` and `decode`")
        if any(section is not None and section.graph for section in (self.encoder, self.decoder)):
            raise ValueError("`graph` belongs to a network of one section, `main`")
        if hints:
            raise ValueError(f"`{hints[0]}` belongs to a network recognised automatically; here, write it into the section it is about")
        return self


class Sampling(Closed):
    """Data-free conversion of a token-in, token-out network: sequences sampled from the teacher itself."""

    sequences: Count = Field(2048, description="how many; more is closer to unlimited data")
    length: Count = Field(128, description="tokens in each")
    temperature: Positive = Field(1.0, description="above 1: more varied, less like the teacher's own text")


DATA_FILES = ("path", "train", "valid_path", "test_path", "vocabulary", "labels")


class Data(Closed):
    """Where the data is, when `--data` is not given, and how it is split."""

    path: str | None = Field(None, description="one file, split by `valid` and `test`")
    train: str | None = None
    valid_path: str | None = None
    test_path: str | None = None
    valid: Share = Field(0.1, description="share set apart to choose checkpoints by; its own file takes precedence")
    test: Share = Field(0.1, description="share held out for the report, used for nothing else")
    tokens: Literal["auto", "characters", "bytes", "words"] = Field("auto", description="for .txt: what a token is")
    vocabulary: str | None = Field(
        None, description="file with one token a line, in the network's order: numbers a .txt, names the tokens of other data in the report"
    )
    labels: str | None = Field(
        None, description="file with one class a line, in the order of the network's outputs: names them in the report"
    )
    sample: Sampling = Sampling()

    def files(self) -> dict[str, str]:
        """Which of the fields name files, and the files: all that a recipe says of somebody's disk."""
        return {name: file for name in DATA_FILES if (file := getattr(self, name)) is not None}

    def without_files(self) -> Data:
        return self.model_copy(update=dict.fromkeys(DATA_FILES))


class Reinforce(Closed):
    """What a sequence's loss becomes before it meets the bits that were drawn; for `estimator: reinforce` alone."""

    baseline: Literal["none", "mean", "unit", "conditional"] = Field(
        "mean", description="what is subtracted: past losses' mean, that of each unit, a guess from the input; all leave it unbiased"
    )
    reward: Literal["loss", "exponential"] = Field(
        "loss", description="exponential: the loss −e^(−loss/temperature), which no bad sequence dominates: another objective"
    )
    temperature: Positive = Field(1.0, description="in units of the loss. More: an exponential reward nearer to the loss itself")


class Gates(Closed):
    soft: list[str] = Field(
        default_factory=list, description="gates left as sigmoids: `o`, or one layer's `main.layers.0.o`; every other gate becomes binary"
    )
    levels: Literal["learned", "strict"] = Field(
        "learned", description="learned: each unit learns what its open gate lets through; strict: exactly 0 and 1"
    )
    copies: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = Field(
        "auto",
        description="decisions a unit takes for each gate, with a threshold, levels and a state each behind one row of weights: "
        "their mean tells more than two values apart; fewer rows are skipped. auto: 16, 4 with a density budget or a price; 1 with strict "
        "levels and in a module, whose states must keep their width",
    )
    share: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        "auto",
        description="units that read one row of a gate's weights together, each times a scale and against its own thresholds: gates read "
        "so many times fewer weights. auto: 8, fewer in layers of less than 128 units, for transduce with a density budget or a price "
        "where loss.hidden is 0; else 1",
    )
    output: bool | Literal["auto"] = Field(
        "auto",
        description="give every GRU (reset after the product) an output gate, as LSTMs have: a unit then keeps its memory and says "
        "when others read it. auto: with a density budget or a price, which a GRU without one pays with its memory",
    )
    estimator: Estimator = Field(
        "gumbel",
        description="how a gate is made discrete in training; docs/estimators.md has equation, bias and cost of each. With a density "
        "budget soft ones are used only if `straight_through_from` is given",
    )
    backward: Literal["sigmoid", "hard-sigmoid", "identity"] = Field(
        "sigmoid", description="gradient of the estimators whose forward is a bit"
    )
    noise: Share = Field(0.2, description="share of gates that are noisy at each step, the others are cut at 0; 0: none, 1: all")
    reinforce: Reinforce = Reinforce()
    temperature: Schedule = Schedule(start=1.0, end=0.1)
    slope: Schedule = Schedule(schedule="linear", start=2.0, end=3.0)
    straight_through_from: Share | Literal["auto"] = Field(
        "auto",
        description="progress from which the forward pass uses bits; 1: never. auto: 0.1; with a density budget or a price 0 where the "
        "estimator's gates are soft, which read everything",
    )
    closed_loop: bool = Field(False, description="anneal only while the hard metric keeps up with its best")

    def decisions(self, *, priced: bool) -> int:
        """`copies`, settled; `priced`: weights have a price. docs/decisions/006-copies.md, 034-sixteen-decisions.md."""
        if self.copies != "auto":
            return self.copies
        return 1 if self.levels == "strict" else 4 if priced else 16

    @model_validator(mode="wrap")
    @classmethod
    def _soft_are_gates(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        soft = data.get("soft") if isinstance(data, dict) else None
        given = enumerate(soft) if isinstance(soft, list) else ()
        return _check_gates(((("soft", index), gate) for index, gate in given), lambda: handler(data))


DENSITY_TOLERANCE = 0.01  # a checkpoint at most this much above the wanted density may be chosen


class Budget(Closed):
    """The density dial: the share of weights a step may read, or wanted open rates gate by gate (z: the share of updated units)."""

    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="wanted share of the layers' weights read at a step, about 0.01 is missed; a GRU without an output gate is counted "
        "by its changed units",
    )
    until: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of the run after which `density` is reached")
    price: NotNegative = Field(
        0.0,
        description="without `density`: what reading all of the layers' weights costs, in units of the loss. More: fewer are read, "
        "and at most so much more may be lost for it",
    )
    open: dict[str, Share] = Field(default_factory=dict, description="gate name -> wanted open rate, e.g. {i: 0.15, o: 0.1}")
    weight: NotNegative = Field(1.0, description="of `open`. More: these rates are kept at more cost in accuracy")

    @model_validator(mode="wrap")
    @classmethod
    def _open_are_gates(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        open_rates = data.get("open") if isinstance(data, dict) else None
        given = open_rates if isinstance(open_rates, dict) else ()
        return _check_gates(((("open", gate), gate) for gate in given), lambda: handler(data))

    @model_validator(mode="after")
    def _one_price(self) -> Budget:
        if self.density is not None and self.price:
            raise ValueError("give `density` or `price`: a density finds its price by itself")
        return self

    @property
    def counts(self) -> bool:
        """Whether training counts the weights read."""
        return self.density is not None or self.price > 0


class Loss(Closed):
    task: NotNegative = Field(0.1, description="weight of the loss against labels, where there are any")
    teacher: NotNegative = Field(0.9, description="weight of the loss against the teacher's outputs (KL for logits)")
    temperature: Positive = Field(1.0, description="softens the teacher's distribution")
    hidden: NotNegative | Literal["auto"] = Field(
        "auto",
        description="match of every layer's output with the teacher's (mean squared error); auto: 0 with a density budget, else 20 for "
        "match, 5 for transduce, 0 for other tasks",
    )
    gate: NotNegative = Field(0.0, description="match of gate values with the teacher's (mean squared error)")

    def hidden_weight(self, task: str | None = None, *, priced: bool = False) -> float:
        """`hidden` for a task; `priced`: weights have a price. Where nothing but the outputs would teach, or an encoder hears of its errors
        through its decoder alone, the layers below learn faster with it; layers that may read little have to find states of their own
        (docs/decisions/005-anneal.md, 033-hidden-match.md)."""
        if self.hidden != "auto":
            return self.hidden
        return 0.0 if priced else {"match": 20.0, "transduce": 5.0}.get(task or "", 0.0)


class Train(Closed):
    steps: Count = Field(4000, description="length of the anneal; time and accuracy grow with it")
    max_steps: Count | None = Field(None, description="hard stop when gates have not binarized; default 1.25 * steps")
    batch_size: Count = Field(64, description="sequences a step; more: a steadier gradient, more memory and time")
    window: Count = Field(64, description="steps of truncated backpropagation; longer inputs carry their state")
    accumulation: Count = Field(1, description="batches a weight update is averaged over")
    learning_rate: Positive | Literal["auto"] = Field(
        "auto",
        description="auto: the best of a few short runs; 0.001 in runs of less than 500 steps and for modules, with a density budget 0.016 "
        "in runs of less than 4,000",
    )
    final_learning_rate: Share = Field(0.02, description="share of the learning rate left at the end (cosine)")
    warmup: Share = Field(0.02, description="share of the steps over which the learning rate rises")
    clip: Positive = Field(1.0, description="largest norm of the gradient")
    weight_decay: NotNegative = Field(0.0, description="pull of weights towards 0 (AdamW)")
    averaging: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="decay of the weights' moving average, which is measured and shipped: 0.99 averages about the last 100 steps; "
        "0: none, the weights themselves",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of matrix products in training; bfloat16 only where the processor multiplies it natively, float32 elsewhere; "
        "auto: bfloat16",
    )
    evaluate_every: Count = Field(250, description="steps between measurements with hard gates")
    tolerance: NotNegative = Field(0.005, description="gates count as binarized when soft and hard metric differ by at most this share")


class Pack(Closed):
    weights: Literal["fp16", "int8"] = Field(
        "fp16",
        description="int8: each row of a recurrent layer's matrices is a power of two times whole numbers of eight bits, in training "
        "and in what is packed; the native runtime reads half the bytes",
    )


class Report(Closed):
    max_drop: NotNegative | None = Field(None, description="largest relative loss of the metric; more is exit code 5")
    max_density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="largest share of the layers' weights read at a step, counted as `budget.density`, which it sets; more is exit code 5. "
        "With `max_drop`: the fastest network that keeps both is searched for",
    )
    controls: bool = Field(True, description="also measure threshold-only, sharpened sigmoid and random gates")
    float_same_compute: bool = Field(False, description="also fine-tune the float network with the same data and steps (doubles the time)")


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # True equals 1
        raise ValueError("must be the number 1")
    return value


class Recipe(Closed):
    version: Annotated[Literal[1], BeforeValidator(_number)] = 1
    task: Task = Field("auto", description="auto: from the data's targets")
    metric: Metric = Field("auto", description="what checkpoints are chosen by and the report compares; auto: the task's own")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of noise, order and split: the same seed, the same network")
    source: Source | None = None
    data: Data = Data()
    gates: Gates = Gates()
    budget: Budget = Budget()
    loss: Loss = Loss()
    train: Train = Train()
    pack: Pack = Pack()
    report: Report = Report()

    @property
    def learning_rate(self) -> float:
        """The highest rate of the run, where none is looked for; docs/decisions/014-density-rate.md, 018-default-rate.md, 028-rate.md."""
        if self.train.learning_rate != "auto":
            return self.train.learning_rate
        return 1e-3 if self.budget.density is None else 1.6e-2

    @property
    def straight_through_from(self) -> float:
        """`gates.straight_through_from`, settled. What weights cost is counted from bits: a soft gate would be priced for what it does not
        do; docs/decisions/042-bits-under-a-budget.md."""
        if self.gates.straight_through_from != "auto":
            return self.gates.straight_through_from
        return 0.0 if self.budget.counts and self.gates.estimator in SOFT_ESTIMATORS else 0.1

    @property
    def output_gate(self) -> bool:
        """Whether GRUs get an output gate; docs/decisions/027-output-gate.md."""
        return self.budget.counts if self.gates.output == "auto" else self.gates.output

    def share(self, task: str | None = None) -> int | Literal["auto"]:
        """How many units share a row of a gate's weights, "auto" as many as their layer bears. In long runs only an encoder–decoder gained
        by it, and not where its units are held to the teacher's states one by one. docs/decisions/032-shared-rows.md."""
        if self.gates.share != "auto":
            return self.gates.share
        matched = self.loss.hidden_weight(task, priced=True) > 0
        return "auto" if self.budget.counts and task == "transduce" and not matched else 1

    @property
    def max_steps(self) -> int:
        return self.train.max_steps or int(1.25 * self.train.steps)

    @property
    def searched(self) -> bool:
        """Whether a conversion looks for the fastest network that keeps both limits."""
        return self.report.max_drop is not None and self.report.max_density is not None

    def settled(self) -> Self:
        """With the budget that `report.max_density` asks for: lower by what a checkpoint may exceed it. A lower one stays."""
        limit, given = self.report.max_density, self.budget.density
        if limit is None:
            return self
        density = max(limit - DENSITY_TOLERANCE, limit / 2)
        if given is not None and given <= density:
            return self
        return self.model_copy(update={"budget": self.budget.model_copy(update={"density": density})})


def parse(data: Any) -> Recipe:
    """A recipe from plain data; raises pydantic's ValidationError (see recipe_yaml for the reading with positions)."""
    return Recipe.model_validate(data)
