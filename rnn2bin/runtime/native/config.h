/* What config.json says: the network as plain sizes. Mirrors rnn2bin/spec.py; every value is checked. */
#ifndef RNN2BIN_CONFIG_H
#define RNN2BIN_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

enum { FORMAT_VERSION = 1, MOST_LAYERS = 64, MOST_LINEAR = 16, MOST_GATES = 3, MOST_SIZE = 1 << 20, MOST_COPIES = 64 };

typedef enum {
  CELL_LSTM,
  CELL_GRU,
  CELL_GRU_RESET_BEFORE,
  CELL_LSTM_PEEPHOLE,
  CELL_LSTM_COUPLED,
  CELL_LSTM_COUPLED_PEEPHOLE,
  CELL_GRU_OUTPUT
} cell_kind;
typedef enum { STEP_LSTM, STEP_GRU, STEP_LSTM_KINDS, STEPS } step_kind; /* which of the kernels takes a layer's steps */
typedef enum { READ_ALL, READ_LAST, READ_FINAL, READ_MEAN, READ_MAX } readout;
typedef enum { ACT_NONE, ACT_RELU, ACT_TANH, ACT_SIGMOID, ACT_SOFTMAX, ACT_LOG_SOFTMAX, ACT_L2, ACT_RELU_L2 } activation;

typedef struct {
  cell_kind cell;
  step_kind step;
  bool has_cell;                     /* h is what an output gate shows of c: LSTMs, a GRU with one */
  bool coupled, peepholes;           /* of LSTMs; coupled: f = 1 - i */
  bool wide_pre;                     /* states have room for pre-activations of every copy: of this layer, or the decoder's */
  float clip, cell_clip, proj_clip;  /* INFINITY: nothing is clipped */
  int input, hidden, directions, projection, copies; /* projection 0: none */
  int gates, recurrent, width;                       /* recurrent: what others read of one direction; width = copies * hidden */
  bool hard_sigmoid; /* float gates are; a bit is the same */
  bool binary[2][MOST_GATES];                        /* [direction][gate] */
} layer_config;

typedef struct {
  int in, out;
  bool bias;
  activation activation;
} linear_config;

typedef struct {
  char name[8];
  bool graph;                /* others run what stands around the layers, its embedding too: here each layer reads floats on its own */
  int vocabulary, embedding; /* vocabulary 0: floats; embedding 0: one-hot tokens */
  readout readout;
  int layers, linears;
  layer_config layer[MOST_LAYERS];
  linear_config linear[MOST_LINEAR];
} section_config;

typedef struct {
  int sections; /* 1: main; 2: encoder, decoder */
  section_config section[2];
  bool learned; /* levels: learned, or strict */
  int64_t start, end, max_length;
} network_config;

/* Whether the first layer looks tokens up. */
static inline bool reads_tokens(const section_config *section) { return section->vocabulary && !section->graph; }

/* 0, or -1 with the reason in r2b_last_error(). */
int config_read(const char *path, network_config *config);
const char *gate_name(cell_kind cell, int gate);

#endif
