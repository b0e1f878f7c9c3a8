/* What config.json says: the network as plain sizes. Mirrors rnn2bin/spec.py; every value is checked. */
#ifndef RNN2BIN_CONFIG_H
#define RNN2BIN_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

enum { FORMAT_VERSION = 1, MOST_LAYERS = 64, MOST_LINEAR = 16, MOST_DEPTH = 9, MOST_GATES = 112, MOST_SIZE = 1 << 20, MOST_COPIES = 64,
       MOST_SHARED_ROWS = 2048 /* that a unit may choose from: whole numbers up to there are exact in fp16 */ };

typedef enum { STEP_LSTM, STEP_GRU, STEP_LSTM_KINDS, STEP_RNN, STEP_MEMORY, STEP_HIGHWAY, STEP_FEEDBACK, STEPS } step_kind; /* which of the kernels takes a layer's steps */
enum { RNN_VANILLA, RNN_MINIMAL, RNN_RESIDUAL }; /* variants of STEP_RNN */
enum { READS_LATE = 1, GATES_READ = 2, OUTPUT_READ = 4, BARE = 8, NORMALIZED = 16 }; /* bits of STEP_MEMORY's */
enum { FEEDBACK_TANH, FEEDBACK_GRU, FEEDBACK_LSTM }; /* variants of STEP_FEEDBACK */
typedef enum { PEEPHOLES_NONE, PEEPHOLES_DIAGONAL, PEEPHOLES_FULL } peephole_kind;
typedef enum { FLAT, INNER, STACK } deep_kind; /* a step goes through one layer; several that hand a state on; several with a state each */

/* A cell, as a row of rnn2bin/spec.py: config.c has them all. */
typedef struct {
  const char *name;
  step_kind step;
  const char *gates;  /* a letter each */
  const char *levels; /* which of a gate's are learned: l lo, h hi, b both, - none */
  const char *states; /* of h, c, r */
  peephole_kind peepholes;
  bool reset_after; /* of a GRU: its candidate has a recurrent bias */
  int variant;      /* what its family tells its cells apart by */
  bool memoryless;  /* a step does not read the one before it */
  deep_kind deep;
  char link; /* of a stack: the letter of the gates from layer to layer */
} cell_kind;

typedef enum { READ_ALL, READ_LAST, READ_FINAL, READ_MEAN, READ_MAX } readout;
typedef enum { ACT_NONE, ACT_RELU, ACT_TANH, ACT_SIGMOID, ACT_SOFTMAX, ACT_LOG_SOFTMAX, ACT_L2, ACT_RELU_L2 } activation;

typedef struct {
  const cell_kind *kind;
  step_kind step;
  bool has_cell, coupled;           /* coupled, of an LSTM: f = 1 - i */
  bool wide_pre;                    /* states have room for pre-activations of every copy: of this layer, or the decoder's */
  float clip, cell_clip, proj_clip; /* INFINITY: nothing is clipped */
  int input, hidden, directions, projection, copies, depth; /* projection 0: none */
  int shared, shared_inputs; /* units that read one row of a gate's weights, of the state and of the input */
  int gates, unit_gates, recurrent, width; /* unit_gates: they stand before those that decide for all units; recurrent: what others read of one
                                              direction; width = copies * hidden */
  int state[3];                            /* sizes of h, c, r; 0: there is none */
  bool tokens;                             /* its input is looked up in the section's embedding */
  bool relu;                               /* the activation of a vanilla RNN; all others' is tanh */
  bool hard_sigmoid;                       /* float gates are; a bit is the same */
  bool binary[2][MOST_GATES];              /* [direction][gate] */
} layer_config;

typedef struct {
  int in, out;
  bool bias;
  activation activation;
} linear_config;

typedef struct {
  char name[8];
  bool graph;                /* others run what stands around the layers: here each layer runs on its own, on floats or on tokens */
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

/* 0, or -1 with the reason in r2b_last_error(). */
int config_read(const char *path, network_config *config);
/* The name of a gate into `name`, of a deep cell with the numbers of its layers. */
void gate_name(const layer_config *layer, int gate, char name[4]);
/* Whether the level `side` (0 lo, 1 hi) of a gate may be learned. */
bool gate_learns(const layer_config *layer, int gate, int side);
/* Whether its kernel writes the pre-activations of every copy. */
static inline bool writes_pre(const layer_config *layer) { return layer->step >= STEP_LSTM_KINDS; }
/* Whether its matrices are blocks of their own, each of as many rows as there are units: kernels/blocks.h. */
static inline bool in_blocks(const layer_config *layer) { return layer->step >= STEP_RNN; }

/* Rows of a gate's weights where so many units share one. */
static inline int rows_of_gate(const layer_config *layer, int shared) { return (layer->hidden + shared - 1) / shared; }

#endif
