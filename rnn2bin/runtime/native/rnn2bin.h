/* rnn2bin: runs a packed directory (config.json, model.safetensors) by touching only the weights whose gates are open.
 *
 * A model is opened once and never changes: any number of threads may share it. A state belongs to one thread at a time: make one for
 * each stream, or one for a whole batch. Nothing is allocated after r2b_new_state.
 *
 * Functions that return int give 0, or -1 with the reason in r2b_last_error() of the same thread. Shapes: T steps, B batch, I input,
 * O output, V vocabulary; arrays are contiguous, the last dimension fastest.
 */
#ifndef RNN2BIN_H
#define RNN2BIN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define R2B_ABI 3
#define R2B_API __attribute__((visibility("default")))

typedef struct r2b_model r2b_model;
typedef struct r2b_state r2b_state;

/* How products of gates are made. All give the same bits. */
enum {
  R2B_FP16 = 0, /* every active weight is read: in 16 bits, or in 8 where its row is on an eight-bit grid */
  R2B_INT8 = 1, /* signs of binary gates are screened in 8 bits; rows that are not certain are read in 16 */
  R2B_AUTO = 2  /* whichever is quicker: int8 for GRUs and for weights on eight-bit grids, else fp16 */
};

typedef struct {
  int32_t tokens;       /* 1: x is int64_t tokens, 0: floats */
  int32_t per_sequence; /* 1: one output a sequence, 0: one a step */
  int32_t streams;      /* 1: r2b_step works; else the network must see the whole sequence */
  int32_t decoder;      /* 1: an encoder–decoder: r2b_generate, or r2b_run then r2b_decode */
  int32_t graph;        /* 1: operations that are not run here stand around the layers: r2b_new_layer_state; sizes are r2b_describe_layer's */
  int64_t input_size;   /* I, or V for tokens */
  int64_t output_size;  /* O */
  int64_t max_length;   /* most tokens r2b_generate gives a sequence; 0 without a decoder */
  int64_t layers;       /* of the section that reads the input */
} r2b_info;

/* Sums since the state was made. */
typedef struct {
  uint64_t steps;   /* steps of sequences: B a step */
  uint64_t weights; /* weights that the open gates ask for: what evaluation/density.py counts */
  uint64_t bytes;   /* bytes of weights the kernels read: whole groups of candidate rows, screening planes and what they left open */
  uint64_t rows, uncertain; /* screened gate rows; those of them that had to be read in 16 bits */
} r2b_counters;

R2B_API int32_t r2b_abi(void);
R2B_API const char *r2b_isa(void); /* the instruction set in use: RNN2BIN_ISA=scalar|avx2|avx512|avx512vnni|neon forces a lower one */
R2B_API const char *r2b_last_error(void);

/* NULL where the directory is not a whole packed model. */
R2B_API r2b_model *r2b_open(const char *directory, int32_t compute);
R2B_API void r2b_close(r2b_model *model);
R2B_API void r2b_describe(const r2b_model *model, r2b_info *info);
R2B_API int32_t r2b_describe_layer(const r2b_model *model, int64_t layer, r2b_info *info); /* of a graph */

/* Zero states of `batch` sequences. `steps`: the longest sequence of one call of a bidirectional network; others take any length. */
R2B_API r2b_state *r2b_new_state(const r2b_model *model, int64_t batch, int64_t steps);
/* Of a graph each layer runs on its own: x (T,B,I) floats, or (T,B) tokens where r2b_describe_layer says so, -> y (T,B,O), both directions
 * beside each other, zeros behind a sequence's end. A layer's state works like any other, batch and steps are its own. */
R2B_API r2b_state *r2b_new_layer_state(const r2b_model *model, int64_t layer, int64_t batch, int64_t steps);
R2B_API void r2b_free_state(r2b_state *state);
R2B_API void r2b_reset(r2b_state *state);

/* One step: x (B,I) floats or (B) tokens -> y (B,O). */
R2B_API int r2b_step(r2b_state *state, const void *x, float *y);
/* Many: x (T,B,I) or (T,B) -> y (T,B,O), or (B,O) where the network gives one output a sequence; `lengths` (B) real steps, or NULL. Of an
 * encoder–decoder it runs the encoder; y is not written. The state goes on from where it was. */
R2B_API int r2b_run(r2b_state *state, const void *x, int64_t steps, const int64_t *lengths, float *y);
/* The decoder after r2b_run, on given tokens (U,B) -> y (U,B,O). */
R2B_API int r2b_decode(r2b_state *state, const int64_t *tokens, int64_t steps, const int64_t *lengths, float *y);
/* Greedy decoding after r2b_run: tokens (max_length,B); `steps` gets how many rows were written. What follows the end token is end tokens. */
R2B_API int r2b_generate(r2b_state *state, int64_t *tokens, int64_t *steps);
/* From here on outputs come without a last activation that keeps their order (sigmoid, softmax, log-softmax). */
R2B_API void r2b_leave_logits(r2b_state *state);

/* States of a layer and direction (0 forward, 1 backward), `which` 0: h, 1: c, 2: r, of cells that have them; (B, size). */
R2B_API int64_t r2b_state_size(const r2b_model *model, int64_t layer, int64_t direction, int64_t which); /* 0: there is none */
R2B_API int r2b_get_state(const r2b_state *state, int64_t layer, int64_t direction, int64_t which, float *values);
R2B_API int r2b_set_state(r2b_state *state, int64_t layer, int64_t direction, int64_t which, const float *values);
/* Gate pre-activations (B, G * copies * H) of the last step of a cell, for comparisons; of a cell that is screened only their signs
 * count. */
R2B_API int r2b_get_gates(const r2b_state *state, int64_t layer, int64_t direction, float *pre);

R2B_API void r2b_count(const r2b_state *state, r2b_counters *counters);
/* Reads memory `times` times, as fast as this processor does: what bytes / time of a step is to be held against. Gives a sum, so that it is
 * not left out. */
R2B_API uint64_t r2b_read(const void *memory, uint64_t bytes, uint64_t times);

#ifdef __cplusplus
}
#endif
#endif
