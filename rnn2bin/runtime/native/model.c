/* Opens a packed directory: reads and checks it, and lays the weights out as the kernels read them. */
#define _DEFAULT_SOURCE
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"
#include "half.h"
#include "kernels.h"
#include "safetensors.h"

/* Products of embedding and weights are made once a token where that takes milliseconds, or where tokens are so few that it takes no longer
 * than the rest of opening; else once a step. */
enum { HUGE_PAGE = 2 << 20, MOST_SCREENED = 1 << 15, MOST_ADDED = 1 << 11, MOST_BLOCKS = 160, FEW_TOKENS = 256, TOKENS_AT_ONCE = 8 }; /* MOST_SCREENED: columns whose products of bytes fit 32 bits; MOST_ADDED: of a byte and a word */
static const uint64_t MOST_FOLDED_PRODUCTS = 1u << 28, MOST_TABLE_BYTES = 1u << 28;

typedef struct {
  r2b_model *model;
  tensor_file file;
} loader;

/* A piece of memory that is freed with the model. */
static void *own(r2b_model *model, size_t alignment, size_t bytes) {
  if (model->owned_count == model->owned_room) {
    size_t room = model->owned_room ? 2 * model->owned_room : 64;
    void **grown = realloc(model->owned, room * sizeof *grown);
    if (!grown) return fail("out of memory"), NULL;
    model->owned = grown;
    model->owned_room = room;
  }
  void *memory = aligned_alloc(alignment, bytes);
  if (!memory) return fail("out of memory: %zu bytes", bytes), NULL;
#if defined(MADV_HUGEPAGE)
  if (alignment == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE); /* columns lie apart: fewer pages to look up */
#endif
  model->owned[model->owned_count++] = memory;
  return memory;
}

static void *zeroed(void *memory, size_t bytes) { return memory ? memset(memory, 0, bytes) : NULL; }

/* What is smaller than a huge page shares one with others, but in small models, of which a program may open many. */
void *model_allocate(r2b_model *model, size_t bytes) {
  size_t whole = (bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; /* at least one byte, and vectors may read beyond the end */
  if (!model->large) return zeroed(own(model, ALIGNMENT, whole), whole);
  if (whole >= HUGE_PAGE) return zeroed(own(model, HUGE_PAGE, (whole + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE), whole);
  if (whole > model->room_left) {
    if (!(model->room = own(model, HUGE_PAGE, HUGE_PAGE))) return NULL;
    model->room_left = HUGE_PAGE;
  }
  char *memory = model->room;
  model->room += whole, model->room_left -= whole;
  return zeroed(memory, whole);
}

/* A tensor by its name, of exactly these sizes (columns 0: a vector). NULL with the reason where it is not there. */
__attribute__((format(printf, 4, 5))) static const uint8_t *find(loader *l, int64_t rows, int64_t cols, const char *format, ...) {
  char name[96];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(name, sizeof name, format, arguments);
  va_end(arguments);
  tensor *t = tensors_find(&l->file, name);
  if (!t) return fail("model.safetensors: tensor %s is missing", name), NULL;
  if (t->dimensions != (cols ? 2 : 1) || t->shape[0] != rows || (cols && t->shape[1] != cols))
    return fail("model.safetensors: %s does not have the shape that config.json says", name), NULL;
  t->used = 1;
  return l->file.data + t->begin;
}

static float *floats(loader *l, const uint8_t *data, size_t count, size_t room) {
  float *values = data ? model_allocate(l->model, room * sizeof(float)) : NULL;
  for (size_t k = 0; values && k < count; k++) values[k] = half_to_float(half_at(data, k));
  return values;
}

/* Columns of a matrix in a row-major one (rows, cols): fp16, or `bytes` of a grid. */
typedef struct {
  const uint8_t *data;
  int cols;
  int8_t *bytes;
} part;

static int largest_half(const part *of, int row) {
  const uint8_t *from = of->data + 2 * (size_t)row * (size_t)of->cols;
  int most = 0;
  for (int j = 0; j < of->cols; j++) most = (half_at(from, (size_t)j) & 0x7fff) > most ? half_at(from, (size_t)j) & 0x7fff : most;
  return most;
}

/* Whether all of a row's weights are whole multiples of 1 / inverse. */
static bool is_whole(const part *of, int row, float inverse) {
  const uint8_t *from = of->data + 2 * (size_t)row * (size_t)of->cols;
  int broken = 0;
  for (int j = 0; j < of->cols; j++) {
    float units = half_to_float(half_at(from, (size_t)j)) * inverse;
    broken |= (float)(int)units != units;
  }
  return !broken;
}

/* The smallest power of two that a row's largest weight is at most 127 times of, where all are whole multiples of it; else 0. */
static float step_of(const part *parts, int count, int row) {
  int most = 0, exponent;
  for (int k = 0; k < count; k++) {
    int largest = largest_half(&parts[k], row);
    most = largest > most ? largest : most;
  }
  if (!most) return 1.0f;
  float mantissa = frexpf(half_to_float((uint16_t)most) / 127.0f, &exponent), step = ldexpf(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
  for (int k = 0; k < count; k++)
    if (!is_whole(&parts[k], row, 1.0f / step)) return 0.0f;
  return step;
}

/* Whether all rows are on grids, which are then `found`; 0, or -1 where memory is out. */
static int find_grid(r2b_model *model, const part *parts, int count, int rows, grid *found) {
  *found = (grid){0};
  if (rows && !step_of(parts, count, 0)) return 0; /* nearly all that are on none are told by their first row */
  size_t bytes = (size_t)padded(rows, LINE) * sizeof(float);
  float *scale = model_allocate(model, bytes), *inverse = scale ? model_allocate(model, bytes) : NULL;
  if (!inverse) return -1;
  for (int r = 0; r < rows; r++) {
    scale[r] = step_of(parts, count, r);
    if (!scale[r]) return 0;
    inverse[r] = 1.0f / scale[r];
  }
  *found = (grid){scale, inverse};
  return 0;
}

/* A part in whole numbers of its rows' grids, where there are grids; the caller frees `bytes`. */
static int to_bytes(part *of, int rows, const grid *grid) {
  if (!grid->scale) return 0;
  int8_t *bytes = of->bytes = malloc((size_t)rows * (size_t)of->cols + 1);
  if (!bytes) return fail("out of memory");
  for (int r = 0; r < rows; r++) {
    const uint8_t *from = of->data + 2 * (size_t)r * (size_t)of->cols;
    int8_t *restrict to = bytes + (size_t)r * (size_t)of->cols;
    float inverse = grid->inverse[r];
    for (int j = 0; j < of->cols; j++) to[j] = (int8_t)(half_to_float(half_at(from, (size_t)j)) * inverse);
  }
  return 0;
}

static int new_matrix(r2b_model *model, matrix *m, int rows, int cols, const grid *grid) {
  *m = (matrix){.wanted = rows, .rows = padded(rows, LINE), .cols = cols, .grid = *grid};
  m->weights = model_allocate(model, (size_t)m->rows * (size_t)m->cols * (size_t)weight_size(grid));
  return m->weights ? 0 : -1;
}

/* A block of 32 by 32 of a tile that begins at the matrix' row `top`, transposed: lines of both are in the first cache while it lasts. */
static void lay_out_block(void *tile, int height, const part *from, int top, int row, int rows, int col, int wide) {
  uint16_t *halves = tile;
  int8_t *bytes = tile;
  for (int k = row; k < row + rows; k++) {
    size_t at = (size_t)(top + k) * (size_t)from->cols;
    for (int j = col; from->bytes && j < col + wide; j++) bytes[(size_t)j * (size_t)height + (size_t)k] = from->bytes[at + (size_t)j];
    for (int j = col; !from->bytes && j < col + wide; j++) halves[(size_t)j * (size_t)height + (size_t)k] = half_at(from->data, at + (size_t)j);
  }
}

/* A part into the columns from `first` on. */
static void lay_out(matrix *m, const part *from, int first) {
  enum { BLOCK = 32 };
  size_t size = (size_t)weight_size(&m->grid);
  int cols = from->cols;
  for (int row = 0; row < m->rows;) {
    int height = tile_rows(m->rows - row), real = m->wanted - row < height ? m->wanted - row : height;
    uint8_t *tile = (uint8_t *)m->weights + size * ((size_t)row * (size_t)m->cols + (size_t)first * (size_t)height);
    for (int col = 0; col < cols; col += BLOCK)
      for (int k = 0; k < real; k += BLOCK)
        lay_out_block(tile, height, from, row, k, real - k < BLOCK ? real - k : BLOCK, col, cols - col < BLOCK ? cols - col : BLOCK);
    row += height;
  }
}

static int new_row_matrix(r2b_model *model, row_matrix *m, int rows, int cols, const grid *grid) {
  *m = (row_matrix){.cols = cols, .stride = padded(cols, STRIP), .grid = *grid};
  m->weights = model_allocate(model, (size_t)rows * (size_t)m->stride * (size_t)weight_size(grid));
  return m->weights ? 0 : -1;
}

static void lay_out_rows(row_matrix *m, int rows, const part *from, int first) {
  for (int k = 0; k < rows; k++) {
    size_t to = (size_t)k * (size_t)m->stride + (size_t)first, at = (size_t)k * (size_t)from->cols;
    if (from->bytes)
      memcpy((int8_t *)m->weights + to, from->bytes + at, (size_t)from->cols);
    else
      memcpy((uint16_t *)m->weights + to, from->data + 2 * at, 2 * (size_t)from->cols);
  }
}

/* The widths of what a thread of this model needs at most. */
static void at_least(int *most, int n) {
  if (*most < n) *most = n;
}

typedef struct {
  part gates[2], candidate[2]; /* the input's columns, the recurrent ones */
  part projection;
} sources;

static int find_weights(loader *l, const layer_config *y, const char *prefix, sources *found) {
  int of_input = y->gates * rows_of_gate(y, y->shared_inputs), of_state = y->gates * rows_of_gate(y, y->shared);
  *found = (sources){
      .gates = {{find(l, of_input, y->input, "%s.gates.weight_ih", prefix), y->input, NULL},
                {find(l, of_state, y->recurrent, "%s.gates.weight_hh", prefix), y->recurrent, NULL}},
      .candidate = {{find(l, y->hidden, y->input, "%s.candidate.weight_ih", prefix), y->input, NULL},
                    {find(l, y->hidden, y->recurrent, "%s.candidate.weight_hh", prefix), y->recurrent, NULL}},
      .projection = {y->projection ? find(l, y->projection, y->hidden, "%s.projection.weight", prefix) : NULL, y->hidden, NULL},
  };
  bool all = found->gates[0].data && found->gates[1].data && found->candidate[0].data && found->candidate[1].data;
  return all && (!y->projection || found->projection.data) ? 0 : -1;
}

/* Which rows of gates units share: whole numbers, each gate's own from 0. */
static int load_sharing(loader *l, cell *c, const char *prefix) {
  const layer_config *y = c->layer;
  int count = y->gates * y->hidden, rows = rows_of_gate(y, y->shared);
  size_t wide = (size_t)count, room = (size_t)(padded(count, LINE) + SLACK);
  if (y->shared == 1) return 0;
  const uint8_t *chosen = find(l, count, 0, "%s.gates.row", prefix);
  if (!chosen || !(c->row_scale = floats(l, find(l, count, 0, "%s.gates.scale", prefix), wide, room))) return -1;
  if (!(c->row = model_allocate(l->model, room * sizeof *c->row))) return -1;
  for (int k = 0; k < count; k++) {
    float row = half_to_float(half_at(chosen, (size_t)k));
    if (!(row >= 0.0f && row < (float)rows && row == (float)(int)row)) return fail("model.safetensors: %s.gates.row: a unit reads no row of %d", prefix, rows);
    c->row[k] = (int)row;
  }
  return 0;
}

static int load_vectors(loader *l, cell *c, const char *prefix) {
  const layer_config *y = c->layer;
  size_t units = (size_t)(y->depth * y->hidden), wide = (size_t)y->unit_gates * (size_t)y->width, room = (size_t)c->candidate_rows;
  size_t links = (size_t)(y->gates - y->unit_gates);
  /* the last unit's group is read whole */
  if (wide && !(c->gate_bias = floats(l, find(l, (int64_t)wide, 0, "%s.gates.bias", prefix), wide, wide + room))) return -1;
  if (!(c->bias = floats(l, find(l, (int64_t)units, 0, "%s.candidate.bias", prefix), units, units + room))) return -1;
  if (links && !(c->link_bias = floats(l, find(l, (int64_t)links, 0, "%s.global.bias", prefix), links, links))) return -1;
  size_t eyes = (size_t)y->gates * (size_t)y->hidden;
  if (y->kind->peepholes == PEEPHOLES_DIAGONAL && !(c->peephole = floats(l, find(l, (int64_t)eyes, 0, "%s.gates.peephole", prefix), eyes, eyes)))
    return -1;
  if (!y->kind->reset_after) return 0;
  c->bias_hh = floats(l, find(l, y->hidden, 0, "%s.candidate.bias_hh", prefix), (size_t)y->hidden, room);
  return c->bias_hh ? 0 : -1;
}

/* Levels that were not learned are exactly 0 and 1. */
static int load_levels(loader *l, cell *c, const char *prefix) {
  const layer_config *y = c->layer;
  const char *const names[] = {"lo", "hi"};
  float **levels[] = {&c->lo, &c->hi};
  size_t wide = (size_t)y->gates * (size_t)y->width;
  bool any = false;
  for (int g = 0; g < y->gates; g++) any |= c->binary[g];
  for (int side = 0; any && side < 2; side++) {
    float *values = *levels[side] = floats(l, find(l, y->gates, y->width, "%s.levels.%s", prefix, names[side]), wide, wide);
    if (!values) return -1;
    for (int g = 0; g < y->gates; g++)
      for (int j = 0; j < y->width && !(l->model->config.learned && c->binary[g] && gate_learns(y, g, side)); j++)
        values[g * y->width + j] = (float)side;
  }
  return 0;
}

/* The input's share of some rows, and where in a table's row it goes. */
typedef struct {
  const part *from;
  int rows, at;
} share;

/* The columns of one token's embedding, `values` (wide). */
static void embed(const section *s, int token, int wide, float *values) {
  for (int j = 0; j < wide; j++) values[j] = s->embedding ? half_to_float(s->embedding[(size_t)token * (size_t)wide + (size_t)j]) : j == token;
}

/* A table's rows: the input's share of each token, made by the kernels themselves, so that no bit differs from a product at the step. With
 * `carried_at` >= 0 what the token is goes there too, for a cell that hands its input on. */
static int fold_table(loader *l, const section *s, cell *c, const share *shares, int count, int carried_at) {
  r2b_model *model = l->model;
  int wide = c->layer->input, vocabulary = s->config->vocabulary;
  const grid halves = {0};
  columns active[TOKENS_AT_ONCE] = {0};
  r2b_counters counters = {0};
  c->table = model_allocate(model, ((size_t)vocabulary * (size_t)c->table_stride + 128) * sizeof(float)); /* whole tiles can be read */
  if (!c->table) return -1;
  size_t kept = model->owned_count, kept_left = model->room_left;
  char *kept_room = model->room;
  matrix *with = model_allocate(model, (size_t)count * sizeof *with);
  float *values = with ? model_allocate(model, (size_t)wide * sizeof(float)) : NULL;
  int failed = values ? 0 : -1;
  for (int k = 0; !failed && k < TOKENS_AT_ONCE; k++) {
    active[k].index = model_allocate(model, (size_t)(wide + SLACK) * sizeof(int32_t));
    active[k].value = active[k].index ? model_allocate(model, (size_t)(wide + SLACK) * sizeof(float)) : NULL;
    failed = active[k].value ? 0 : -1;
  }
  for (int k = 0; !failed && k < count; k++)
    if (!(failed = new_matrix(model, &with[k], shares[k].rows, wide, &halves))) lay_out(&with[k], shares[k].from, 0);
  for (int v = 0; !failed && v < vocabulary; v += TOKENS_AT_ONCE) {
    int tokens = vocabulary - v < TOKENS_AT_ONCE ? vocabulary - v : TOKENS_AT_ONCE;
    product_row rows[TOKENS_AT_ONCE];
    float *row = c->table + (size_t)v * (size_t)c->table_stride;
    for (int t = 0; t < tokens; t++) {
      embed(s, v + t, wide, values);
      active[t].total = active[t].inputs = model->kernels->list(values, wide, 0, active[t].index, active[t].value);
      if (carried_at >= 0) memcpy(row + (size_t)t * (size_t)c->table_stride + carried_at, values, (size_t)wide * sizeof *values);
    }
    for (int k = 0; k < count; k++) {
      for (int t = 0; t < tokens; t++)
        rows[t] = (product_row){&active[t], 0, active[t].total, model->zeros, row + (size_t)t * (size_t)c->table_stride + shares[k].at};
      model->kernels->product(&with[k], rows, tokens, &counters);
    }
  }
  while (model->owned_count > kept) free(model->owned[--model->owned_count]);
  model->room = kept_room, model->room_left = kept_left;
  return failed;
}

static bool folds(const section *s, const cell *c) {
  if (!c->layer->tokens) return false;
  uint64_t rows = (uint64_t)c->table_stride, vocabulary = (uint64_t)s->config->vocabulary;
  uint64_t products = rows * vocabulary * (uint64_t)(s->embedding ? c->layer->input : 1);
  return (products <= MOST_FOLDED_PRODUCTS || vocabulary <= FEW_TOKENS) && rows * vocabulary * sizeof(float) <= MOST_TABLE_BYTES;
}

static int lay_out_whole(r2b_model *model, matrix *m, int rows, const part *from) {
  part whole = *from;
  grid grid;
  if (find_grid(model, &whole, 1, rows, &grid) || new_matrix(model, m, rows, whole.cols, &grid) || to_bytes(&whole, rows, &grid)) return -1;
  lay_out(m, &whole, 0);
  free(whole.bytes);
  return 0;
}

/* All matrices of a cell but the projection: the input's columns, where there are any, then the recurrent ones. */
static int lay_out_cell(r2b_model *model, cell *c, sources *from) {
  const layer_config *y = c->layer;
  int rows = y->gates * rows_of_gate(y, y->shared), cols = c->inputs + y->recurrent, skipped = c->inputs ? 0 : 1;
  bool apart = c->inputs && y->shared_inputs != y->shared; /* columns of the input in `gates` are then never read */
  int first_gates = apart ? 1 : skipped;
  grid gates, candidate;
  if ((apart && lay_out_whole(model, &c->gates_in, y->gates * y->hidden, &from->gates[0])) ||
      find_grid(model, from->gates + first_gates, 2 - first_gates, rows, &gates) ||
      find_grid(model, from->candidate + skipped, 2 - skipped, y->hidden, &candidate) || new_matrix(model, &c->gates, rows, cols, &gates) ||
      new_matrix(model, &c->candidate, y->hidden, cols, &candidate) ||
      new_row_matrix(model, &c->candidate_by_row, y->hidden, cols, &candidate))
    return -1;
  for (int k = skipped; k < 2; k++) {
    int first = k ? c->inputs : 0;
    if ((k >= first_gates && to_bytes(&from->gates[k], rows, &gates)) || to_bytes(&from->candidate[k], y->hidden, &candidate)) return -1;
    if (k >= first_gates) lay_out(&c->gates, &from->gates[k], first);
    lay_out(&c->candidate, &from->candidate[k], first);
    lay_out_rows(&c->candidate_by_row, y->hidden, &from->candidate[k], first);
  }
  return 0;
}

/* Where in a block of 64 bytes row `r` lies, so that the kernel's interleaving of four columns gives rows in their order. */
static int place_in_block(int r) { return 16 * (r / 4 % 4) + 4 * (r / 16) + r % 4; }

static uint8_t *byte_in(const byte_matrix *m, int block, int row, int col) {
  return m->bytes + byte_tile(m, block / 2) + (size_t)col * byte_stride(m, block / 2) + 64 * (size_t)(block % 2) + place_in_block(row % 64);
}

static int nearest(float x) { return (int)(x < 0.0f ? x - 0.5f : x + 0.5f); }

/* A row on a grid is its high plane, without error. Where the screen reads `gates` itself it has no bytes. */
static void screen_bytes(screen *s, int row, const int8_t *weights, float scale) {
  int64_t norm = 0;
  if (s->bytes.bytes) {
    uint8_t *at = byte_in(&s->bytes, row / 64, row, 0);
    size_t stride = byte_stride(&s->bytes, row / 64 / 2);
    for (int j = 0; j < s->bytes.cols; j++) at[stride * (size_t)j] = (uint8_t)(weights[j] + 128);
  }
  for (int j = 0; j < s->bytes.cols; j++) norm += weights[j] * weights[j];
  s->scale[row] = scale / 256;
  s->norm[row] = 1.0001f * scale * (float)sqrt((double)norm);
  s->norm_in_all += s->norm[row];
}

/* One row into planes; the norms are rounded up. */
static void screen_one(screen *s, int row, const uint16_t *weights) {
  int block = s->planes * (row / 64);
  uint8_t *high_at = byte_in(&s->bytes, block, row, 0), *low_at = byte_in(&s->bytes, block + s->planes - 1, row, 0);
  size_t stride = byte_stride(&s->bytes, s->planes * (row / 64) / 2);
  float most = 0.0f;
  double error = 0.0, norm = 0.0, worst = 0.0;
  for (int j = 0; j < s->bytes.cols; j++) {
    float size = fabsf(half_to_float(weights[j]));
    most = size > most ? size : most;
  }
  float scale = most > 0.0f ? most / (127 * 256) : 1.0f;
  for (int j = 0; j < s->bytes.cols; j++) {
    float w = half_to_float(weights[j]);
    int units = nearest(w / scale), high = (units + 32896) / 256 - 128, low = s->planes == 2 ? units - 256 * high : 0;
    double left = (double)w - (double)scale * (256.0 * high + low);
    low_at[stride * (size_t)j] = (uint8_t)(low + 128);
    high_at[stride * (size_t)j] = (uint8_t)(high + 128);
    error += left * left;
    norm += (double)w * (double)w;
    worst = fabs(left) > worst ? fabs(left) : worst;
  }
  s->scale[row] = scale;
  s->half[row] = 1.0001f * (float)worst;
  s->error[row] = 1.0001f * (float)sqrt(error);
  s->norm[row] = 1.0001f * (float)sqrt(norm);
  s->half_in_all += s->half[row];
  s->error_in_all += s->error[row];
  s->norm_in_all += s->norm[row];
}

/* Behind an output gate columns come and go, a GRU's stay: that one needs the finer sums that it can keep. */
static int make_screen(r2b_model *model, cell *c) {
  screen *s = &c->screen;
  const layer_config *y = c->layer;
  int rows = y->gates * y->hidden, cols = c->gates_by_row.cols;
  s->keeps = !y->has_cell;
  s->planes = s->keeps && !c->gates_by_row.grid.scale ? 2 : 1;
  s->blocks = padded(rows, 128) / 64; /* whole tiles */
  s->room = 64 * s->blocks;
  s->bytes = (byte_matrix){.cols = cols, .tiles = s->planes * s->blocks / 2};
  if (model->kernels->screens == SCREENS_ALL && !(s->bytes.bytes = model_allocate(model, (size_t)s->bytes.tiles * (size_t)cols * 128))) return -1;
  float **vectors[] = {&s->scale, &s->half, &s->error, &s->norm};
  for (int k = 0; k < 4; k++)
    if (!(*vectors[k] = model_allocate(model, (size_t)s->room * sizeof(float)))) return -1;
  const row_matrix *by_row = &c->gates_by_row;
  for (int r = 0; r < rows; r++) {
    size_t at = (size_t)r * (size_t)by_row->stride;
    if (by_row->grid.scale)
      screen_bytes(s, r, (const int8_t *)by_row->weights + at, by_row->grid.scale[r]);
    else
      screen_one(s, r, (const uint16_t *)by_row->weights + at);
  }
  return 0;
}

/* A GRU reads what has changed only where it is screened. An LSTM's fp16 weights are screened in as long or longer (docs/decisions/008). */
static bool is_wanted(const r2b_model *model, const cell *c) {
  return model->compute == R2B_AUTO ? !c->layer->has_cell || c->gates.grid.scale : model->compute == R2B_INT8;
}

static bool can_screen(screened how, const matrix *gates) {
  return how == SCREENS_ALL ? gates->cols <= MOST_SCREENED : how == SCREENS_GRIDS && gates->grid.scale && gates->cols <= MOST_ADDED;
}

static bool screens(const r2b_model *model, const cell *c) {
  bool all = is_wanted(model, c) && !c->row && !c->layer->kind->peepholes && !in_blocks(c->layer) && can_screen(model->kernels->screens, &c->gates);
  for (int g = 0; g < c->layer->gates; g++) all &= c->binary[g];
  return all;
}

static int load_screen(loader *l, cell *c, const sources *from) {
  int rows = c->layer->gates * c->layer->hidden;
  if (new_row_matrix(l->model, &c->gates_by_row, rows, c->inputs + c->layer->recurrent, &c->gates.grid)) return -1;
  if (c->inputs) lay_out_rows(&c->gates_by_row, rows, &from->gates[0], 0);
  lay_out_rows(&c->gates_by_row, rows, &from->gates[1], c->inputs);
  return make_screen(l->model, c);
}

/* Where a block's columns come from: `rows` rows of a tensor from `row` on for the input, and of another for the state. */
typedef struct {
  const char *input, *state; /* "gates.weight_ih"; NULL: none */
  int input_row, state_row, rows;
  int state_col, state_cols; /* of the state's tensor */
} block_source;

/* Rows and columns of a tensor of a layer. */
static void shape_of(const layer_config *y, const char *name, int64_t *rows, int64_t *cols) {
  int units = y->unit_gates / y->depth * y->hidden, layers = y->depth, stack = y->kind->deep == STACK;
  bool gates = name[0] == 'g' && name[1] == 'a', links = name[0] == 'g' && !gates;
  int first = links ? layers : gates ? units : y->hidden;
  *rows = first * layers;
  *cols = y->hidden;
  if (strstr(name, ".weight_ih")) *rows = first, *cols = y->input;
  if (strstr(name, ".weight_below")) *rows = first * (layers - 1);
  if (stack && strstr(name, ".weight_hh") && !gates) *cols = layers * y->hidden;
  if (strstr(name, ".peephole")) *rows = units;
}

/* A block for every gate, then for every candidate. */
static int plan_parts(const layer_config *y, block_source *to) {
  int count = 0, each = y->unit_gates / y->depth;
  for (int k = 0; k < y->unit_gates + y->depth; k++) {
    bool candidate = k >= y->unit_gates;
    int at = candidate ? k - y->unit_gates : k;
    to[count++] = (block_source){
        .input = at >= (candidate ? 1 : each) ? NULL : candidate ? "candidate.weight_ih" : "gates.weight_ih",
        .state = y->kind->memoryless ? NULL : candidate ? "candidate.weight_hh" : "gates.weight_hh",
        .input_row = at * y->hidden,
        .state_row = at * y->hidden,
        .rows = y->hidden,
        .state_cols = y->hidden,
    };
  }
  return count;
}

/* Full peepholes: what the gates before the cell's update see of it, and the one behind. */
static int plan_peepholes(const layer_config *y, block_source *to) {
  int before = (y->gates - 1) * y->hidden;
  to[0] = (block_source){.state = "gates.peephole", .rows = before, .state_cols = y->hidden};
  to[1] = (block_source){.state = "gates.peephole", .state_row = before, .rows = y->hidden, .state_cols = y->hidden};
  return 2;
}

/* A stack: of each layer what is below it and its own state for its gates; the same and every layer's for the global gates; what is below it
 * for its candidate, then a block for every layer (kernels/feedback.h). */
static int plan_stack(const layer_config *y, block_source *to) {
  int count = 0, layers = y->depth, units = y->unit_gates / layers * y->hidden;
  for (int j = 0; j < layers; j++) {
    const struct {
      const char *input, *below;
      int rows;
    } under[] = {{"gates.weight_ih", "gates.weight_below", units},
                 {"global.weight_ih", "global.weight_below", layers},
                 {"candidate.weight_ih", "candidate.weight_below", y->hidden}};
    for (int k = 0; k < 3; k++) {
      int rows = under[k].rows;
      if (!rows) continue;
      to[count++] = j ? (block_source){.state = under[k].below, .state_row = (j - 1) * rows, .rows = rows, .state_cols = y->hidden}
                      : (block_source){.input = under[k].input, .rows = rows};
      if (k == 0) to[count++] = (block_source){.state = "gates.weight_hh", .state_row = j * rows, .rows = rows, .state_cols = y->hidden};
      if (k == 1) to[count++] = (block_source){.state = "global.weight_hh", .state_row = j * rows, .rows = rows, .state_cols = layers * y->hidden};
    }
    for (int i = 0; i < layers; i++)
      to[count++] = (block_source){.state = "candidate.weight_hh", .state_row = j * y->hidden, .rows = y->hidden,
                                   .state_col = i * y->hidden, .state_cols = y->hidden};
  }
  return count;
}

static int plan_blocks(const layer_config *y, block_source *to) {
  if (y->kind->deep == STACK) return plan_stack(y, to);
  if (y->kind->peepholes == PEEPHOLES_FULL) return plan_peepholes(y, to);
  return in_blocks(y) ? plan_parts(y, to) : 0;
}

/* Some rows and columns of a tensor, copied where they do not lie together; the caller frees `copy`. */
static int cut(loader *l, const layer_config *y, const char *prefix, const char *name, int row, int rows, int col, int cols, part *found,
               uint8_t **copy) {
  int64_t all, wide;
  shape_of(y, name, &all, &wide);
  const uint8_t *data = find(l, all, wide, "%s.%s", prefix, name);
  *copy = NULL;
  if (!data) return -1;
  *found = (part){data + 2 * (size_t)row * (size_t)wide, cols, NULL};
  if (cols == wide) return 0;
  *copy = malloc(2 * (size_t)rows * (size_t)cols);
  if (!*copy) return fail("out of memory");
  for (int r = 0; r < rows; r++)
    memcpy(*copy + 2 * (size_t)r * (size_t)cols, found->data + 2 * ((size_t)r * (size_t)wide + (size_t)col), 2 * (size_t)cols);
  found->data = *copy;
  return 0;
}

static int lay_out_block_of(r2b_model *model, block *b, part *parts, int count, int inputs) {
  grid grid = {0};
  int cols = 0, first = 0;
  for (int k = 0; k < count; k++) cols += parts[k].cols;
  if ((cols && find_grid(model, parts, count, b->rows, &grid)) || new_matrix(model, &b->all, b->rows, cols, &grid) ||
      new_row_matrix(model, &b->by_row, b->rows, cols, &grid))
    return -1;
  b->inputs = inputs;
  for (int k = 0; k < count; first += parts[k++].cols) {
    if (to_bytes(&parts[k], b->rows, &grid)) return -1;
    lay_out(&b->all, &parts[k], first);
    lay_out_rows(&b->by_row, b->rows, &parts[k], first);
    free(parts[k].bytes);
    parts[k].bytes = NULL;
  }
  return 0;
}

static int load_block(loader *l, cell *c, block *b, const block_source *from, const char *prefix) {
  part parts[2] = {{0}, {0}};
  uint8_t *copy = NULL;
  int count = 0, inputs = from->input && c->inputs ? c->layer->input : 0, failed = 0;
  b->rows = from->rows;
  if (inputs) failed = cut(l, c->layer, prefix, from->input, from->input_row, from->rows, 0, inputs, &parts[count++], &copy);
  if (!failed && from->state)
    failed = cut(l, c->layer, prefix, from->state, from->state_row, from->rows, from->state_col, from->state_cols, &parts[count++], &copy);
  failed = failed || lay_out_block_of(l->model, b, parts, count, inputs);
  for (int k = 0; k < 2; k++) free(parts[k].bytes);
  free(copy);
  return failed ? -1 : 0;
}

/* The input's shares of a cell in blocks for every token. */
static int fold_blocks(loader *l, const section *s, cell *c, const block_source *from, const char *prefix) {
  share shares[MOST_BLOCKS];
  part parts[MOST_BLOCKS];
  uint8_t *copy;
  int count = 0;
  for (int k = 0; k < c->block_count; k++) {
    if (!from[k].input) continue;
    if (cut(l, c->layer, prefix, from[k].input, from[k].input_row, from[k].rows, 0, c->layer->input, &parts[count], &copy)) return -1;
    shares[count] = (share){&parts[count], from[k].rows, c->blocks[k].table_at};
    count++;
  }
  return fold_table(l, s, c, shares, count, c->layer->kind->memoryless ? c->table_stride - padded(c->layer->input, LINE) : -1);
}

static int load_blocks(loader *l, section *s, cell *c, const char *prefix) {
  block_source from[MOST_BLOCKS];
  const layer_config *y = c->layer;
  c->block_count = plan_blocks(y, from);
  if (!(c->blocks = model_allocate(l->model, (size_t)c->block_count * sizeof *c->blocks))) return -1;
  int stride = 0;
  for (int k = 0; k < c->block_count; k++) {
    c->blocks[k].table_at = from[k].input ? stride : -1;
    stride += from[k].input ? padded(from[k].rows, LINE) : 0;
  }
  if (in_blocks(y)) {
    c->table_stride = stride + (y->kind->memoryless ? padded(y->input, LINE) : 0);
    bool folded = folds(s, c);
    c->inputs = folded ? 0 : y->input;
    if (folded && fold_blocks(l, s, c, from, prefix)) return -1;
  }
  for (int k = 0; k < c->block_count; k++)
    if (load_block(l, c, &c->blocks[k], &from[k], prefix)) return -1;
  return 0;
}

/* A cell of gates and a candidate: all rows of gates together, and a candidate to choose rows of. */
static int load_whole(loader *l, section *s, cell *c, const char *prefix) {
  const layer_config *y = c->layer;
  sources from;
  if (find_weights(l, y, prefix, &from)) return -1;
  c->table_stride = c->gate_rows + c->candidate_rows;
  bool folded = folds(s, c);
  c->inputs = folded ? 0 : y->input;
  const share shares[] = {{&from.gates[0], y->gates * y->hidden, 0}, {&from.candidate[0], y->hidden, c->gate_rows}};
  int failed = (folded && fold_table(l, s, c, shares, 2, -1)) || lay_out_cell(l->model, c, &from) ||
               (screens(l->model, c) && load_screen(l, c, &from)) ||
               (y->projection && lay_out_whole(l->model, &c->projection, y->projection, &from.projection));
  for (int k = 0; k < 2; k++) free(from.gates[k].bytes), free(from.candidate[k].bytes);
  return failed ? -1 : 0;
}

static int load_cell(loader *l, section *s, int index, int direction) {
  cell *c = &s->cells[index][direction];
  const layer_config *y = c->layer = &s->config->layer[index];
  char prefix[48];
  snprintf(prefix, sizeof prefix, "%s.layers.%d.%s", s->config->name, index, direction ? "bwd" : "fwd");
  c->binary = y->binary[direction];
  c->gate_rows = padded(y->gates * y->hidden, LINE);
  c->candidate_rows = padded(y->hidden, LINE);
  if (load_vectors(l, c, prefix) || load_sharing(l, c, prefix) || load_levels(l, c, prefix)) return -1;
  if (!in_blocks(y) && load_whole(l, s, c, prefix)) return -1;
  return load_blocks(l, s, c, prefix);
}

static int load_linear(loader *l, section *s, int index) {
  const linear_config *found = &s->config->linear[index];
  linear *to = &s->linears[index];
  const uint8_t *weight = find(l, found->out, found->in, "%s.head.%d.weight", s->config->name, index);
  part whole = {.data = weight, .cols = found->in};
  if (!weight || lay_out_whole(l->model, &to->weight, found->out, &whole)) return -1;
  size_t room = (size_t)to->weight.rows;
  to->bias = found->bias ? floats(l, find(l, found->out, 0, "%s.head.%d.bias", s->config->name, index), (size_t)found->out, room)
                         : model_allocate(l->model, room * sizeof(float));
  return to->bias ? 0 : -1;
}

static int load_embedding(loader *l, section *s) {
  size_t count = (size_t)s->config->vocabulary * (size_t)s->config->embedding;
  bool read = false;
  if (!count) return 0;
  for (int k = 0; k < s->config->layers; k++) read |= s->config->layer[k].tokens;
  const uint8_t *data = find(l, s->config->vocabulary, s->config->embedding, "%s.embedding.weight", s->config->name);
  if (data && !read) return 0; /* what stands around a graph's layers reads it */
  uint16_t *copy = data ? model_allocate(l->model, count * sizeof *copy) : NULL;
  if (!copy) return -1;
  memcpy(copy, data, count * sizeof *copy);
  s->embedding = copy;
  return 0;
}

static int load_section(loader *l, section *s) {
  const section_config *found = s->config;
  if (load_embedding(l, s)) return -1;
  for (int k = 0; k < found->layers; k++)
    for (int d = 0; d < found->layer[k].directions; d++)
      if (load_cell(l, s, k, d)) return -1;
  for (int k = 0; k < found->linears; k++)
    if (load_linear(l, s, k)) return -1;
  return 0;
}

/* The largest sizes of all parts, and a section's output. */
static void measure(r2b_model *model, section *s) {
  const section_config *found = s->config;
  for (int k = 0; k < found->layers; k++) {
    const layer_config *y = &found->layer[k];
    at_least(&model->longest, padded(y->gates * y->hidden, 128) + padded(y->hidden, LINE)); /* as much as screening looks at */
    at_least(&model->longest, padded(y->projection, LINE));
    at_least(&model->most_columns, y->input + (y->recurrent > y->hidden ? y->recurrent : y->hidden));
    at_least(&model->most_columns, y->depth * y->hidden);
    at_least(&model->most_width, y->width > y->depth * y->hidden ? y->width : y->depth * y->hidden);
    at_least(&model->most_values, (y->gates + y->coupled) * y->width); /* a coupled f is made beside i */
    at_least(&model->most_gates, padded(y->gates * y->hidden, 128));
    at_least(&model->most_hidden, padded(y->hidden, LINE));
    at_least(&model->widest, y->input);
    s->output = y->directions * y->recurrent;
    at_least(&model->widest, s->output);
  }
  for (int k = 0; k < found->linears; k++) {
    at_least(&model->longest, padded(found->linear[k].out, LINE));
    at_least(&model->most_columns, found->linear[k].in);
    s->output = found->linear[k].out;
  }
  at_least(&model->widest, s->output);
}

/* Weights of a graph's nodes are for whoever runs those. */
static int check_all_used(const tensor_file *file, bool graph) {
  static const char around[] = "main.graph.";
  for (size_t k = 0; k < file->count; k++) {
    const tensor *t = &file->tensors[k];
    if (graph && t->name_length >= sizeof around && !memcmp(t->name, around, sizeof around - 1)) continue;
    if (!t->used) return fail("model.safetensors: unknown tensor %.*s", (int)(t->name_length < 80 ? t->name_length : 80), t->name);
  }
  return 0;
}

static int load(r2b_model *model, const char *directory) {
  char path[4096];
  loader l = {.model = model};
  if (strlen(directory) > sizeof path - 32) return fail("the path is too long");
  snprintf(path, sizeof path, "%s/config.json", directory);
  if (config_read(path, &model->config)) return -1;
  for (int k = 0; k < model->config.sections; k++) {
    model->sections[k].config = &model->config.section[k];
    measure(model, &model->sections[k]);
  }
  snprintf(path, sizeof path, "%s/model.safetensors", directory);
  if (tensors_open(path, &l.file)) return -1;
  model->large = l.file.size >= HUGE_PAGE / 4;
  model->zeros = model_allocate(model, (size_t)model->longest * sizeof(float));
  int failed = model->zeros ? 0 : -1;
  for (int k = 0; !failed && k < model->config.sections; k++) failed = load_section(&l, &model->sections[k]);
  if (!failed) failed = check_all_used(&l.file, model->config.section[0].graph);
  tensors_close(&l.file);
  return failed;
}

r2b_model *r2b_open(const char *directory, int32_t compute) {
  if (compute < R2B_FP16 || compute > R2B_AUTO) return fail("unknown compute type %d", compute), NULL;
  r2b_model *model = calloc(1, sizeof *model);
  if (!model) return fail("out of memory"), NULL;
  model->kernels = kernels_choose();
  model->compute = compute;
  if (!load(model, directory)) return model;
  r2b_close(model);
  return NULL;
}

void r2b_close(r2b_model *model) {
  if (!model) return;
  for (size_t k = 0; k < model->owned_count; k++) free(model->owned[k]);
  free(model->owned);
  free(model);
}

int32_t r2b_abi(void) { return R2B_ABI; }

void r2b_describe(const r2b_model *model, r2b_info *info) {
  const section *entry = &model->sections[0], *last = &model->sections[model->config.sections - 1];
  bool both = false;
  if (entry->config->graph) {
    *info = (r2b_info){.graph = 1, .layers = entry->config->layers};
    return;
  }
  for (int k = 0; k < entry->config->layers; k++) both |= entry->config->layer[k].directions == 2;
  readout read = last->config->readout;
  *info = (r2b_info){
      .tokens = entry->config->layer[0].tokens,
      .per_sequence = read != READ_ALL,
      .streams = model->config.sections == 1 && !both && read != READ_MEAN && read != READ_MAX,
      .decoder = model->config.sections == 2,
      .input_size = entry->config->vocabulary ? entry->config->vocabulary : entry->config->layer[0].input,
      .output_size = last->output,
      .max_length = model->config.max_length,
      .layers = entry->config->layers,
  };
}

int32_t r2b_describe_layer(const r2b_model *model, int64_t layer, r2b_info *info) {
  const section_config *found = &model->config.section[0];
  if (!found->graph || layer < 0 || layer >= found->layers) return fail("there is no such layer of a graph");
  const layer_config *y = &found->layer[layer];
  *info = (r2b_info){
      .tokens = y->tokens,
      .streams = y->directions == 1,
      .input_size = y->tokens ? found->vocabulary : y->input,
      .output_size = y->directions * y->recurrent,
      .layers = found->layers,
  };
  return 0;
}
