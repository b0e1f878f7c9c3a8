"""Writes tests/goldens/tensorflow1.zip: frozen TensorFlow 1 graphs of random weights, each with an input and TensorFlow's own output.

Run with an interpreter that has tensorflow-cpu and tf_keras (written with 2.21.0 of both): python scripts/write_tensorflow1_goldens.py
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
v1.disable_v2_behavior()
cells = v1.nn.rnn_cell

TOKENS, EMBEDDED, WIDTH, HIDDEN, OUT, STEPS = 11, 6, 5, 7, 4, 12
LENGTHS = np.array([STEPS, 7, 1])


def dense(x, size, name="out"):
    kernel = v1.get_variable(name + "/kernel", [int(x.shape[-1]), size])
    bias = v1.get_variable(name + "/bias", [size])
    return tf.tensordot(x, kernel, 1) + bias if x.shape.ndims == 3 else tf.matmul(x, kernel) + bias


def embed(ids):
    return tf.nn.embedding_lookup(v1.get_variable("embedding", [TOKENS, EMBEDDED]), ids)


def loop(cell, **options):
    """dynamic_rnn, then a dense layer at every step."""
    return lambda x, n: dense(v1.nn.dynamic_rnn(cell(), x, dtype=tf.float32, sequence_length=n, **options)[0], OUT)


def unrolled(cell, *, every=False):
    def build(x, n):
        outputs, _ = v1.nn.static_rnn(cell(), tf.unstack(x, STEPS, 1), dtype=tf.float32)
        return dense(tf.stack(outputs, 1) if every else outputs[-1], OUT)

    return build


def both_ways(cell, *, layers=1):
    def build(x, n):
        for k in range(layers):
            with v1.variable_scope(f"layer{k}"):
                outputs, _ = v1.nn.bidirectional_dynamic_rnn(cell(), cell(), x, dtype=tf.float32, sequence_length=n)
            x = tf.concat(outputs, 2)
        return dense(x, OUT)

    return build


def final_states(x, n):
    _, (forward, backward) = v1.nn.bidirectional_dynamic_rnn(
        cells.LSTMCell(HIDDEN), cells.LSTMCell(HIDDEN), embed(x), dtype=tf.float32, sequence_length=n
    )
    return tf.nn.softmax(dense(tf.concat([forward.h, backward.h], 1), OUT))


def language_model(x, n):
    return tf.nn.softmax(dense(v1.nn.dynamic_rnn(cells.GRUCell(HIDDEN), embed(x), dtype=tf.float32)[0], TOKENS))


def last_state(x, n):
    state = v1.nn.dynamic_rnn(cells.BasicLSTMCell(HIDDEN), embed(x), dtype=tf.float32, sequence_length=n)[1]
    return tf.argmax(tf.nn.softmax(dense(state.h, OUT), name="answer"), 1)


def last_step(x, n):
    return dense(v1.nn.dynamic_rnn(cells.BasicLSTMCell(HIDDEN), embed(x), dtype=tf.float32)[0][:, -1, :], OUT)


def rows_of_an_image(x, n):
    y, _ = v1.nn.dynamic_rnn(cells.BasicLSTMCell(HIDDEN), tf.reshape(x, [-1, 4, 5]), dtype=tf.float32)
    return tf.nn.softmax(dense(y[:, -1, :], OUT))


def attention(x, n):
    keep = v1.placeholder_with_default(1.0, [], name="keep")
    y, _ = v1.nn.dynamic_rnn(cells.DropoutWrapper(cells.LSTMCell(HIDDEN), output_keep_prob=keep), embed(x), dtype=tf.float32)
    weight = tf.nn.softmax(dense(tf.tanh(y), 1, "attention"), 1)
    return dense(tf.reduce_sum(y * weight, 1), OUT)


def convolution(x, n):
    y = tf.nn.relu(tf.nn.conv1d(x, v1.get_variable("conv", [3, WIDTH, 6]), 2, "SAME"))
    return dense(v1.nn.dynamic_rnn(cells.GRUCell(HIDDEN), tf.nn.max_pool1d(y, 2, 2, "VALID"), dtype=tf.float32)[0], OUT)


def first_state(x, n):
    state = tf.tile(v1.get_variable("first", [1, HIDDEN]), [tf.shape(x)[0], 1])
    return dense(v1.nn.dynamic_rnn(cells.GRUCell(HIDDEN), x, initial_state=state)[0], OUT)


def diagonals(peepholes):
    return {w: v1.get_variable(w, [HIDDEN]) if peepholes else tf.zeros([HIDDEN]) for w in ("wci", "wcf", "wco")}


def block_lstm(x, n, *, peepholes=False, cell_clip=-1.0):
    zeros = tf.zeros([tf.shape(x)[0], HIDDEN])
    made = tf.raw_ops.BlockLSTM(
        seq_len_max=tf.cast(tf.shape(x)[1], tf.int64),
        x=tf.transpose(x, [1, 0, 2]),
        cs_prev=zeros,
        h_prev=zeros,
        w=v1.get_variable("kernel", [WIDTH + HIDDEN, 4 * HIDDEN]),
        b=v1.get_variable("bias", [4 * HIDDEN]),
        forget_bias=1.0,
        cell_clip=cell_clip,
        use_peephole=peepholes,
        **diagonals(peepholes),
    )
    return dense(tf.transpose(tf.ensure_shape(made.h, [None, None, HIDDEN]), [1, 0, 2]), OUT)


class LSTMBlock(cells.RNNCell):
    """tf.contrib.rnn.LSTMBlockCell, of which only the operation is left."""

    state_size, output_size, peepholes, cell_clip = (HIDDEN, HIDDEN), HIDDEN, False, -1.0

    def call(self, x, state):
        kernel, bias = v1.get_variable("kernel", [WIDTH + HIDDEN, 4 * HIDDEN]), v1.get_variable("bias", [4 * HIDDEN])
        made = tf.raw_ops.LSTMBlockCell(
            x=x,
            cs_prev=state[0],
            h_prev=state[1],
            w=kernel,
            b=bias,
            forget_bias=1.0,
            cell_clip=self.cell_clip,
            use_peephole=self.peepholes,
            **diagonals(self.peepholes),
        )
        c, h = (tf.ensure_shape(one, [None, HIDDEN]) for one in (made.cs, made.h))
        return h, (c, h)


class PeepholeBlock(LSTMBlock):
    peepholes, cell_clip = True, 0.4


class GRUBlock(cells.RNNCell):
    """tf.contrib.rnn.GRUBlockCellV2, of which only the operation is left."""

    state_size = output_size = HIDDEN

    def call(self, x, state):
        sizes = {"w_ru": [WIDTH + HIDDEN, 2 * HIDDEN], "w_c": [WIDTH + HIDDEN, HIDDEN], "b_ru": [2 * HIDDEN], "b_c": [HIDDEN]}
        made = tf.raw_ops.GRUBlockCell(x=x, h_prev=state, **{name: v1.get_variable(name, shape) for name, shape in sizes.items()})
        h = tf.ensure_shape(made.h, [None, HIDDEN])
        return h, h


IDS = (tf.int32, [None, None])
FLOATS = (tf.float32, [None, None, WIDTH])
FIXED = (tf.float32, [None, STEPS, WIDTH])
PEEPHOLES = lambda **more: lambda: cells.LSTMCell(HIDDEN, use_peepholes=True, **more)
LSTM, GRU = lambda: cells.LSTMCell(HIDDEN), lambda: cells.GRUCell(HIDDEN)
CASES = {
    "basic_lstm": (loop(lambda: cells.BasicLSTMCell(HIDDEN)), FLOATS),
    "basic_lstm_forget_0": (loop(lambda: cells.BasicLSTMCell(HIDDEN, forget_bias=0.0)), FLOATS),
    "basic_lstm_relu": (loop(lambda: cells.BasicLSTMCell(HIDDEN, activation=tf.nn.relu)), FLOATS),
    "lstm_lengths": (loop(LSTM), FLOATS),
    "lstm_projected": (loop(lambda: cells.LSTMCell(HIDDEN, num_proj=3)), FLOATS),
    "lstm_peepholes": (loop(lambda: cells.LSTMCell(HIDDEN, use_peepholes=True)), FLOATS),
    "lstm_clipped": (loop(lambda: cells.LSTMCell(HIDDEN, cell_clip=3.0)), FLOATS),
    "lstm_peepholes_clipped": (loop(PEEPHOLES(cell_clip=0.4, num_proj=3, proj_clip=0.2)), FLOATS),
    "lstm_peepholes_both_ways_lengths": (both_ways(PEEPHOLES()), FLOATS),
    "lstm_peepholes_unrolled": (unrolled(PEEPHOLES(cell_clip=0.4), every=True), FIXED),
    "lstm_other_activation": (loop(lambda: cells.LSTMCell(HIDDEN, activation=lambda t: tf.tanh(t / 2))), FLOATS),
    "gru": (loop(GRU), FLOATS),
    "gru_lengths": (loop(GRU), FLOATS),
    "gru_time_major": (loop(GRU, time_major=True), FLOATS),
    "two_layers": (loop(lambda: cells.MultiRNNCell([cells.LSTMCell(HIDDEN), cells.LSTMCell(6)])), FLOATS),
    "residual": (loop(lambda: cells.MultiRNNCell([cells.GRUCell(WIDTH), cells.ResidualWrapper(cells.GRUCell(WIDTH))])), FLOATS),
    "both_ways": (both_ways(LSTM), FLOATS),
    "both_ways_lengths": (both_ways(LSTM), FLOATS),
    "both_ways_stacked": (both_ways(GRU, layers=2), FLOATS),
    "two_layers_each_way": (both_ways(lambda: cells.MultiRNNCell([cells.GRUCell(HIDDEN), cells.GRUCell(HIDDEN)])), FLOATS),
    "final_states_lengths": (final_states, IDS),
    "language_model": (language_model, IDS),
    "last_state": (last_state, IDS),
    "last_state_lengths": (last_state, IDS),
    "last_step": (last_step, IDS),
    "unrolled_lstm": (unrolled(lambda: cells.BasicLSTMCell(HIDDEN)), FIXED),
    "unrolled_every_step": (unrolled(lambda: cells.BasicLSTMCell(HIDDEN), every=True), FIXED),
    "unrolled_two_layers": (unrolled(lambda: cells.MultiRNNCell([cells.GRUCell(HIDDEN), cells.GRUCell(6)])), FIXED),
    "rows_of_an_image": (rows_of_an_image, (tf.float32, [None, 20])),
    "attention": (attention, IDS),
    "convolution": (convolution, FLOATS),
    "first_state": (first_state, FLOATS),
    "block_lstm": (block_lstm, FLOATS),
    "block_lstm_peepholes": (functools.partial(block_lstm, peepholes=True, cell_clip=0.4), FLOATS),
    "lstm_block_cell": (loop(LSTMBlock), FLOATS),
    "lstm_block_cell_peepholes": (loop(PeepholeBlock), FLOATS),
    "gru_block_cell": (loop(GRUBlock), FLOATS),
}


def made(name, build, dtype, shape):
    """The frozen graph's bytes, and the arrays of an input with what TensorFlow gives for it."""
    random = np.random.RandomState(3)
    graph = tf.Graph()
    with graph.as_default(), v1.variable_scope("net", initializer=v1.random_normal_initializer(stddev=0.5), use_resource=False):
        v1.set_random_seed(1)
        x = v1.placeholder(dtype, shape, name="inputs")
        n = v1.placeholder(tf.int32, [None], name="lengths") if "lengths" in name else None
        y = build(x, n)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for variable in v1.global_variables():
                if "bias" in variable.name:
                    session.run(v1.assign(variable, random.randn(*variable.shape).astype(np.float32) * 0.5))
            frozen = v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [y.op.name])
            sizes = [3 if i == 0 else n or STEPS for i, n in enumerate(shape)]
            sizes = [STEPS, 3, WIDTH] if "time_major" in name else sizes
            inputs = random.randint(0, TOKENS, sizes) if dtype == tf.int32 else random.randn(*sizes).astype(np.float32)
            feed = {x: inputs} | ({n: LENGTHS} if n is not None else {})
            seen = graph.get_tensor_by_name("net/answer:0") if "last_state" in name else y
            arrays = {"inputs": inputs, "outputs": session.run(seen, feed)} | ({"lengths": LENGTHS} if n is not None else {})
    return frozen.SerializeToString(), arrays


def main() -> None:
    path = Path(__file__).parent.parent / "tests" / "goldens" / "tensorflow1.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, (build, (dtype, shape)) in CASES.items():
            content, arrays = made(name, build, dtype, shape)
            stream = io.BytesIO()
            np.savez(stream, **arrays)
            for suffix, data in ((".pb", content), (".npz", stream.getvalue())):
                archive.writestr(zipfile.ZipInfo(name + suffix), data, zipfile.ZIP_LZMA)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
