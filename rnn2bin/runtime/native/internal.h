/* A model in memory: weights in the kernels' layouts. Nothing here changes after r2b_open. */
#ifndef RNN2BIN_INTERNAL_H
#define RNN2BIN_INTERNAL_H

#include <stddef.h>
#include <stdint.h>

#include "config.h"
#include "rnn2bin.h"

enum {
  TALL = 512,     /* rows of a tile: of each active column that much lies together */
  SHARED = 128,   /* rows of a tile that several sequences go through together */
  LINE = 32,      /* fp16 weights of a cache line: matrices are padded to whole lines, tiles shrink by halves down to them */
  GROUP = 16,     /* units that elementwise work takes together */
  BYTE_TILES = 2, /* tiles of bytes side by side */
  AHEAD = 16,     /* places of a list that are read in advance */
  STRIP = 16,     /* columns that a row is padded to */
  SLACK = 16,     /* places of a list beyond its end that may be read and written */
  ALIGNMENT = 64,
};

/* Rows whose weights are whole multiples, of -127 to 127, of a power of two: (padded rows), and 1 / scale. Both NULL: fp16. */
typedef struct {
  float *scale, *inverse;
} grid;

/* Weights (wanted, cols) in tiles [rows / height][cols][height]: all rows of a choice of columns. fp16, or bytes where the rows are on a grid. */
typedef struct {
  int rows, wanted, cols; /* rows padded; those that there are */
  grid grid;
  void *weights;
} matrix;

/* The same weights row by row (rows, stride): all columns of a choice of rows. */
typedef struct {
  int cols, stride; /* stride: padded columns */
  grid grid;
  void *weights;
} row_matrix;

/* Bytes of one weight. */
static inline int weight_size(const grid *g) { return g->scale ? 1 : 2; }

/* Bytes of weights, 128 added. A tile is 128 bytes of a column, [2 blocks][64 rows]; of up to BYTE_TILES tiles a column lies together. */
typedef struct {
  int cols, tiles;
  uint8_t *bytes;
} byte_matrix;

/* Bytes from column to column, and where tile `t` begins. */
static inline size_t byte_stride(const byte_matrix *m, int t) {
  int left = m->tiles - t / BYTE_TILES * BYTE_TILES;
  return 128 * (size_t)(left < BYTE_TILES ? left : BYTE_TILES);
}
static inline size_t byte_tile(const byte_matrix *m, int t) {
  return (size_t)(t / BYTE_TILES * BYTE_TILES) * (size_t)m->cols * 128 + 128 * (size_t)(t % BYTE_TILES);
}

/* What says the signs of gate rows: kernels/screen.h. Row r's weights are scale[r] * (256 high + low); a block is 64 rows of one plane. */
typedef struct {
  int planes;              /* 0: gates are not screened; 1: high; 2: high and low, one block of rows after the other */
  bool keeps;              /* sums are kept from step to step */
  int blocks, room;        /* blocks of rows; 64 * blocks */
  byte_matrix bytes;
  float *scale;            /* (room) */
  float *half, *error;     /* largest error of a weight, 2-norm of a row's errors */
  float *norm;             /* 2-norm of a row */
  float half_in_all, error_in_all, norm_in_all; /* sums over rows */
} screen;

/* A matrix of `rows` units, its columns those of the input, where it reads it and no table stands for them, then those of a state. */
typedef struct {
  matrix all;
  row_matrix by_row;
  int rows, inputs; /* inputs: columns of the input */
  int table_at;     /* where in a table's row its share of the input is; -1: it does not read the input */
} block;

/* One direction of one layer. Vectors over copies are `width` long, unit j of copy k at k * hidden + j. */
typedef struct {
  const layer_config *layer;
  const bool *binary;
  int inputs;                   /* input columns of the matrices: 0 where the table stands for them */
  int gate_rows, candidate_rows; /* padded */
  matrix gates, candidate, projection;
  matrix gates_in;              /* of the input, a row for every unit, where `gates` has rows that units share and this has not; else empty */
  int32_t *row;                 /* (G, H): which of its gate's rows a unit reads, and what times; NULL where each has its own */
  float *row_scale;
  row_matrix candidate_by_row, gates_by_row; /* gates_by_row where they are screened */
  screen screen;
  float *gate_bias, *lo, *hi; /* (G, width) */
  float *peephole;            /* (G, H), or NULL: none, or full ones, which are blocks */
  float *bias, *bias_hh;      /* (depth * H), (H); bias_hh NULL but for a reset-after GRU */
  float *link_bias;           /* (depth * depth), or NULL */
  float *table;               /* (V, table_stride): W * embedding, or NULL; of blocks one behind the other, else gates and candidate */
  int table_stride;
  block *blocks; /* what a cell in blocks has for `gates` and `candidate`, and an LSTM with full peepholes beside them */
  int block_count;
} cell;

typedef struct {
  matrix weight;
  float *bias; /* padded rows */
} linear;

typedef struct {
  const section_config *config;
  const uint16_t *embedding; /* (V, E), or NULL; owned */
  cell cells[MOST_LAYERS][2];
  linear linears[MOST_LINEAR];
  int output;
} section;

struct kernels;

struct r2b_model {
  network_config config;
  section sections[2];
  const struct kernels *kernels;
  int compute;
  float *zeros; /* as long as the longest row of products */
  int longest;  /* of products: gate_rows + candidate_rows, padded rows of linear layers */
  int widest;   /* of what one part hands to the next */
  int most_columns, most_hidden, most_width, most_gates, most_values; /* most_values: of all gates, width each */
  void **owned; /* all allocations */
  size_t owned_count, owned_room;
  bool large;       /* its memory is in huge pages */
  char *room;       /* of the last of those that small pieces share */
  size_t room_left;
};

/* 64-byte aligned, zeroed, freed with the model; NULL when memory is out. */
void *model_allocate(r2b_model *model, size_t bytes);

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

/* Height of a tile with so many rows left. */
static inline int tile_rows(int left) {
  int height = TALL;
  while (height > left) height /= 2;
  return height;
}

#endif
