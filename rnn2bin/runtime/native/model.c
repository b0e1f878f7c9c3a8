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

/* Products of embedding and weights are made once a token where that takes milliseconds; else once a step. */
enum { HUGE_PAGE = 2 << 20, MOST_SCREENED = 1 << 15 }; /* columns whose products of bytes fit 32 bits */
static const uint64_t MOST_FOLDED_PRODUCTS = 1u << 28, MOST_TABLE_BYTES = 1u << 28;

typedef struct {
  r2b_model *model;
  tensor_file file;
} loader;

void *model_allocate(r2b_model *model, size_t bytes) {
  if (model->owned_count == model->owned_room) {
    size_t room = model->owned_room ? 2 * model->owned_room : 64;
    void **grown = realloc(model->owned, room * sizeof *grown);
    if (!grown) return fail("out of memory"), NULL;
    model->owned = grown;
    model->owned_room = room;
  }
  size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
  size_t whole = (bytes + ALIGNMENT + alignment - 1) / alignment * alignment; /* at least one byte, and vectors may read beyond the end */
  void *memory = aligned_alloc(alignment, whole);
  if (!memory) return fail("out of memory: %zu bytes", bytes), NULL;
#if defined(MADV_HUGEPAGE)
  if (alignment == HUGE_PAGE) madvise(memory, whole, MADV_HUGEPAGE); /* columns lie apart: fewer pages to look up */
#endif
  memset(memory, 0, whole);
  model->owned[model->owned_count++] = memory;
  return memory;
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

static int new_matrix(r2b_model *model, matrix *m, int rows, int cols) {
  *m = (matrix){.wanted = rows, .rows = padded(rows, LINE), .cols = cols};
  m->weights = model_allocate(model, (size_t)m->rows * (size_t)m->cols * sizeof *m->weights);
  return m->weights ? 0 : -1;
}

/* A block of 32 by 32 of a tile, transposed: lines of both are in the first cache while it lasts. */
static void lay_out_block(uint16_t *tile, int height, const uint8_t *source, int cols, int row, int rows, int col, int wide) {
  for (int k = 0; k < rows; k++)
    for (int j = 0; j < wide; j++)
      tile[(size_t)(col + j) * (size_t)height + (size_t)(row + k)] = half_at(source, (size_t)(row + k) * (size_t)cols + (size_t)(col + j));
}

/* Columns `first` to `first + cols` of a matrix from a row-major one (wanted, cols). */
static void lay_out(matrix *m, const uint8_t *source, int first, int cols) {
  enum { BLOCK = 32 };
  for (int row = 0; row < m->rows;) {
    int height = tile_rows(m->rows - row), real = m->wanted - row < height ? m->wanted - row : height;
    uint16_t *tile = m->weights + (size_t)row * (size_t)m->cols + (size_t)first * (size_t)height;
    const uint8_t *from = source + 2 * (size_t)row * (size_t)cols;
    for (int col = 0; col < cols; col += BLOCK)
      for (int k = 0; k < real; k += BLOCK)
        lay_out_block(tile, height, from, cols, k, real - k < BLOCK ? real - k : BLOCK, col, cols - col < BLOCK ? cols - col : BLOCK);
    row += height;
  }
}

static int new_row_matrix(r2b_model *model, row_matrix *m, int rows, int cols) {
  *m = (row_matrix){.cols = cols, .stride = padded(cols, STRIP)};
  m->weights = model_allocate(model, (size_t)rows * (size_t)m->stride * sizeof *m->weights);
  return m->weights ? 0 : -1;
}

static void lay_out_rows(row_matrix *m, int rows, const uint8_t *source, int first, int cols) {
  for (int k = 0; k < rows; k++)
    memcpy(m->weights + (size_t)k * (size_t)m->stride + first, source + 2 * (size_t)k * (size_t)cols, 2 * (size_t)cols);
}

/* The widths of what a thread of this model needs at most. */
static void at_least(int *most, int n) {
  if (*most < n) *most = n;
}

typedef struct {
  const uint8_t *gates_ih, *gates_hh, *candidate_ih, *candidate_hh, *projection;
} sources;

static int find_weights(loader *l, const layer_config *y, const char *prefix, sources *found) {
  int rows = y->gates * y->hidden;
  found->projection = NULL;
  return !(found->gates_ih = find(l, rows, y->input, "%s.gates.weight_ih", prefix)) ||
                 !(found->gates_hh = find(l, rows, y->recurrent, "%s.gates.weight_hh", prefix)) ||
                 !(found->candidate_ih = find(l, y->hidden, y->input, "%s.candidate.weight_ih", prefix)) ||
                 !(found->candidate_hh = find(l, y->hidden, y->recurrent, "%s.candidate.weight_hh", prefix)) ||
                 (y->projection && !(found->projection = find(l, y->projection, y->hidden, "%s.projection.weight", prefix)))
             ? -1
             : 0;
}

static int load_vectors(loader *l, cell *c, const char *prefix) {
  const layer_config *y = c->layer;
  size_t hidden = (size_t)y->hidden, wide = (size_t)y->gates * (size_t)y->width, room = (size_t)c->candidate_rows;
  c->gate_bias = floats(l, find(l, (int64_t)wide, 0, "%s.gates.bias", prefix), wide, wide + room); /* the last unit's group is read whole */
  c->bias = floats(l, find(l, y->hidden, 0, "%s.candidate.bias", prefix), hidden, room);
  if (!c->gate_bias || !c->bias) return -1;
  if (y->peepholes && !(c->peephole = floats(l, find(l, y->gates * y->hidden, 0, "%s.gates.peephole", prefix), y->gates * hidden, y->gates * hidden)))
    return -1;
  if (y->cell != CELL_GRU) return 0;
  c->bias_hh = floats(l, find(l, y->hidden, 0, "%s.candidate.bias_hh", prefix), hidden, room);
  return c->bias_hh ? 0 : -1;
}

/* Levels that a skip depends on are exactly 0 and 1, and so are all where they were not learned (spec.GateSpec). */
static bool learns(const layer_config *y, int gate, int side) {
  static const bool lstm[MOST_GATES][2] = {{false, true}, {true, true}, {false, true}}, gru[MOST_GATES][2] = {{false, true}, {true, false}};
  if (y->coupled) return side == 1;
  return y->has_cell ? lstm[gate][side] : gru[gate][side];
}

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
      for (int j = 0; j < y->width && !(l->model->config.learned && c->binary[g] && learns(y, g, side)); j++)
        values[g * y->width + j] = (float)side;
  }
  return 0;
}

/* A table's row: the input's share of one token, made by the kernels themselves, so that no bit differs from a product at the step. */
static void fold_token(loader *l, const cell *with, columns *active, float *row) {
  r2b_counters counters = {0};
  product_row gates = {active, 0, active->total, l->model->zeros, row}, candidate = gates;
  candidate.out = row + with->gate_rows;
  l->model->kernels->product(&with->gates, &gates, 1, &counters);
  l->model->kernels->product(&with->candidate, &candidate, 1, &counters);
}

static int fold_table(loader *l, const section *s, cell *c, const sources *from) {
  r2b_model *model = l->model;
  int wide = c->layer->input, rows = c->gate_rows + c->candidate_rows, failed = 0;
  cell with = *c;
  size_t kept = model->owned_count;
  columns active = {0};
  float *values;
  c->table = model_allocate(model, ((size_t)s->config->vocabulary * (size_t)rows + 128) * sizeof(float)); /* whole tiles can be read */
  if (!c->table) return -1;
  kept = model->owned_count;
  failed = new_matrix(model, &with.gates, c->layer->gates * c->layer->hidden, wide) ||
           new_matrix(model, &with.candidate, c->layer->hidden, wide);
  values = failed ? NULL : model_allocate(model, (size_t)wide * sizeof(float));
  active.index = values ? model_allocate(model, (size_t)(wide + SLACK) * sizeof(int32_t)) : NULL;
  active.value = active.index ? model_allocate(model, (size_t)(wide + SLACK) * sizeof(float)) : NULL;
  if (active.value) {
    lay_out(&with.gates, from->gates_ih, 0, wide);
    lay_out(&with.candidate, from->candidate_ih, 0, wide);
    for (int v = 0; v < s->config->vocabulary; v++) {
      for (int j = 0; j < wide; j++) values[j] = s->embedding ? half_to_float(s->embedding[(size_t)v * (size_t)wide + (size_t)j]) : j == v;
      active.total = active.inputs = model->kernels->list(values, wide, 0, active.index, active.value);
      fold_token(l, &with, &active, c->table + (size_t)v * (size_t)rows);
    }
  }
  while (model->owned_count > kept) free(model->owned[--model->owned_count]);
  return active.value ? 0 : -1;
}

static bool folds(const section *s, const cell *c) {
  if (!reads_tokens(s->config)) return false;
  uint64_t rows = (uint64_t)(c->gate_rows + c->candidate_rows), vocabulary = (uint64_t)s->config->vocabulary;
  uint64_t products = rows * vocabulary * (uint64_t)(s->embedding ? c->layer->input : 1);
  return products <= MOST_FOLDED_PRODUCTS && rows * vocabulary * sizeof(float) <= MOST_TABLE_BYTES;
}

static void lay_out_cell(cell *c, int first, const uint8_t *gates, const uint8_t *candidate, int cols) {
  lay_out(&c->gates, gates, first, cols);
  lay_out(&c->candidate, candidate, first, cols);
  lay_out_rows(&c->candidate_by_row, c->layer->hidden, candidate, first, cols);
}

/* Where in a block of 64 bytes row `r` lies, so that the kernel's interleaving of four columns gives rows in their order. */
static int place_in_block(int r) { return 16 * (r / 4 % 4) + 4 * (r / 16) + r % 4; }

static uint8_t *byte_at(const screen *s, int row, int plane, int col) {
  int block = s->planes * (row / 64) + plane;
  return s->bytes.bytes + byte_tile(&s->bytes, block / 2) + (size_t)col * byte_stride(&s->bytes, block / 2) + 64 * (size_t)(block % 2) +
         place_in_block(row % 64);
}

static int nearest(float x) { return (int)(x < 0.0f ? x - 0.5f : x + 0.5f); }

/* One row into planes; the norms are rounded up. */
static void screen_one(screen *s, int row, const uint16_t *weights) {
  uint8_t *high_at = byte_at(s, row, 0, 0), *low_at = byte_at(s, row, s->planes - 1, 0);
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

/* Of an LSTM columns come and go, a GRU's stay: that one needs the finer sums that it can keep. */
static int make_screen(r2b_model *model, cell *c) {
  screen *s = &c->screen;
  const layer_config *y = c->layer;
  int rows = y->gates * y->hidden, cols = c->gates_by_row.cols;
  s->keeps = !y->has_cell;
  s->planes = s->keeps ? 2 : 1;
  s->blocks = padded(rows, 128) / 64; /* whole tiles */
  s->room = 64 * s->blocks;
  s->bytes = (byte_matrix){.cols = cols, .tiles = s->planes * s->blocks / 2};
  s->bytes.bytes = model_allocate(model, (size_t)s->bytes.tiles * (size_t)cols * 128);
  float **vectors[] = {&s->scale, &s->half, &s->error, &s->norm};
  for (int k = 0; k < 4; k++)
    if (!(*vectors[k] = model_allocate(model, (size_t)s->room * sizeof(float)))) return -1;
  if (!s->bytes.bytes) return -1;
  for (int r = 0; r < rows; r++) screen_one(s, r, c->gates_by_row.weights + (size_t)r * (size_t)c->gates_by_row.stride);
  return 0;
}

/* A GRU reads what has changed only where it is screened. An LSTM reads less, and takes as long or longer (docs/decisions/008). */
static bool is_wanted(const r2b_model *model, const cell *c) {
  return model->compute == R2B_AUTO ? !c->layer->has_cell : model->compute == R2B_INT8;
}

static bool screens(const r2b_model *model, const cell *c) {
  bool all = is_wanted(model, c) && !c->layer->peepholes && model->kernels->screens && c->gates.cols <= MOST_SCREENED;
  for (int g = 0; g < c->layer->gates; g++) all &= c->binary[g];
  return all;
}

static int load_screen(loader *l, cell *c, const sources *from) {
  int rows = c->layer->gates * c->layer->hidden;
  if (new_row_matrix(l->model, &c->gates_by_row, rows, c->inputs + c->layer->recurrent)) return -1;
  if (c->inputs) lay_out_rows(&c->gates_by_row, rows, from->gates_ih, 0, c->inputs);
  lay_out_rows(&c->gates_by_row, rows, from->gates_hh, c->inputs, c->layer->recurrent);
  return make_screen(l->model, c);
}

static int load_cell(loader *l, section *s, int index, int direction) {
  r2b_model *model = l->model;
  cell *c = &s->cells[index][direction];
  const layer_config *y = c->layer = &s->config->layer[index];
  char prefix[48];
  sources from;
  snprintf(prefix, sizeof prefix, "%s.layers.%d.%s", s->config->name, index, direction ? "bwd" : "fwd");
  c->binary = y->binary[direction];
  c->gate_rows = padded(y->gates * y->hidden, LINE);
  c->candidate_rows = padded(y->hidden, LINE);
  if (find_weights(l, y, prefix, &from) || load_vectors(l, c, prefix) || load_levels(l, c, prefix)) return -1;
  bool folded = index == 0 && folds(s, c);
  c->inputs = folded ? 0 : y->input;
  if ((folded && fold_table(l, s, c, &from)) || new_matrix(model, &c->gates, y->gates * y->hidden, c->inputs + y->recurrent) ||
      new_matrix(model, &c->candidate, y->hidden, c->inputs + y->recurrent) ||
      new_row_matrix(model, &c->candidate_by_row, y->hidden, c->inputs + y->recurrent))
    return -1;
  if (!folded) lay_out_cell(c, 0, from.gates_ih, from.candidate_ih, y->input);
  lay_out_cell(c, c->inputs, from.gates_hh, from.candidate_hh, y->recurrent);
  if (screens(model, c) && load_screen(l, c, &from)) return -1;
  if (!from.projection) return 0;
  if (new_matrix(model, &c->projection, y->projection, y->hidden)) return -1;
  lay_out(&c->projection, from.projection, 0, y->hidden);
  return 0;
}

static int load_linear(loader *l, section *s, int index) {
  const linear_config *found = &s->config->linear[index];
  linear *to = &s->linears[index];
  const uint8_t *weight = find(l, found->out, found->in, "%s.head.%d.weight", s->config->name, index);
  if (!weight || new_matrix(l->model, &to->weight, found->out, found->in)) return -1;
  lay_out(&to->weight, weight, 0, found->in);
  size_t room = (size_t)to->weight.rows;
  to->bias = found->bias ? floats(l, find(l, found->out, 0, "%s.head.%d.bias", s->config->name, index), (size_t)found->out, room)
                         : model_allocate(l->model, room * sizeof(float));
  return to->bias ? 0 : -1;
}

static int load_embedding(loader *l, section *s) {
  size_t count = (size_t)s->config->vocabulary * (size_t)s->config->embedding;
  if (!count) return 0;
  const uint8_t *data = find(l, s->config->vocabulary, s->config->embedding, "%s.embedding.weight", s->config->name);
  if (data && s->config->graph) return 0;
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
    at_least(&model->most_width, y->width);
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
      .tokens = entry->config->vocabulary > 0,
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
  *info = (r2b_info){.streams = y->directions == 1, .input_size = y->input, .output_size = y->directions * y->recurrent, .layers = found->layers};
  return 0;
}
