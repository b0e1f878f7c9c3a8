#include "state.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { MOST_ROWS = 64, MOST_CHUNK = 32, MOST_STEPS = 1 << 28 };

/* Two passes over the same carving: the first adds up, the second hands out. */
typedef struct {
  char *base;
  size_t used;
} arena;

static void *carve(arena *a, size_t count, size_t size) {
  void *here = a->base ? a->base + a->used : NULL;
  a->used += (count * size + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; /* vectors may read a little beyond the end */
  return here;
}

static float *carve_floats(arena *a, size_t count) { return carve(a, count, sizeof(float)); }

static void carve_cell(arena *a, cell_state *to, const layer_config *y, size_t batch, bool screened) {
  bool lstm = y->has_cell;
  to->h_size = y->state[0];
  to->c_size = y->state[1];
  to->r_size = y->state[2];
  to->read_size = y->recurrent;
  to->product_size = padded(y->gates * y->hidden, 128); /* screening writes whole tiles */
  to->h = carve_floats(a, batch * (size_t)to->h_size);
  to->c = carve_floats(a, batch * (size_t)to->c_size);
  to->r = carve_floats(a, batch * (size_t)to->r_size);
  to->read = to->h_size == to->read_size ? to->h : carve_floats(a, batch * (size_t)to->read_size);
  to->products = carve_floats(a, batch * (size_t)to->product_size);
  to->pre = y->wide_pre ? carve_floats(a, batch * (size_t)(y->gates * y->width)) : NULL;
  to->sum_size = 4 * padded(y->gates * y->hidden, 128);
  to->before_size = padded(y->input + y->recurrent, STRIP);
  to->of = NULL;
  if (lstm || !screened) return;
  to->sums = carve(a, batch * (size_t)to->sum_size, sizeof(int32_t));
  to->before = carve(a, batch * (size_t)to->before_size, sizeof(int32_t));
}

static void carve_columns(arena *a, columns *to, const r2b_model *model) {
  size_t most = (size_t)model->most_columns + SLACK;
  int32_t *index = carve(a, most, sizeof *index);
  float *value = carve_floats(a, most);
  if (a->base) *to = (columns){.index = index, .value = value};
}

static void carve_scratch(arena *a, scratch *to, const r2b_model *model) {
  size_t hidden = (size_t)model->most_hidden, longest = (size_t)model->longest;
  to->gates = carve_floats(a, (size_t)model->most_values + SLACK);
  to->candidate = carve_floats(a, hidden);
  to->recurrent = carve_floats(a, hidden);
  to->spare = carve_floats(a, longest > hidden ? longest : hidden);
  to->wide = carve_floats(a, (size_t)model->most_width);
  to->open = carve(a, 2 * hidden / GROUP, sizeof(uint16_t));
  to->groups = carve(a, hidden, sizeof(int32_t));
  to->wanted = carve(a, (size_t)model->most_gates + SLACK, sizeof(int32_t));
  to->dense = carve_floats(a, (size_t)padded(model->most_columns, STRIP));
  carve_columns(a, &to->active, model);
  to->zeros = model->zeros;
}

static void carve_screen(arena *a, screen_row *to, const r2b_model *model) {
  size_t cols = (size_t)model->most_columns + SLACK, gates = (size_t)model->most_gates;
  to->index = carve(a, cols + AHEAD, sizeof(int32_t));
  to->high = carve(a, cols, sizeof(int8_t));
  to->low = carve(a, cols, sizeof(int8_t));
  to->word = carve(a, cols, sizeof(int16_t));
  to->sums = carve(a, 4 * gates, sizeof(int32_t));
}

static void carve_all(arena *a, r2b_state *s) {
  const r2b_model *model = s->model;
  const section_config *entry = model->sections[0].config;
  size_t batch = (size_t)s->batch, rows = batch * (size_t)s->chunk;
  for (int k = s->first; k < s->end; k++)
    for (int d = 0; d < entry->layer[k].directions; d++) carve_cell(a, &s->cells[k][d], &entry->layer[k], batch, model->compute != R2B_FP16);
  for (int k = 0; k < 2; k++) s->values[k] = carve_floats(a, rows * (size_t)model->widest);
  s->products = carve_floats(a, rows * (size_t)model->longest);
  s->pooled = carve_floats(a, batch * (size_t)model->widest);
  s->token_row = carve_floats(a, (size_t)model->widest);
  s->active = carve(a, rows, sizeof(columns));
  s->rows = carve(a, batch, sizeof(step_row));
  s->outs = carve(a, batch, sizeof(float *));
  s->product_rows = carve(a, rows, sizeof(product_row));
  s->tokens = carve(a, batch, sizeof(int64_t));
  for (size_t k = 0; k < rows; k++) carve_columns(a, a->base ? &s->active[k] : NULL, model);
  carve_scratch(a, &s->work, model);
  if (model->compute != R2B_FP16) carve_screen(a, &s->screen, model);
}

/* A bidirectional network reads a sequence from both ends: the whole of it goes through a layer before the next begins. */
static int chunk_of(const r2b_state *s, int64_t batch, int64_t steps) {
  const r2b_model *model = s->model;
  for (int k = 0; k < model->config.sections; k++)
    for (int j = s->first; j < s->end; j++)
      if (model->sections[k].config->layer[j].directions == 2) return (int)steps;
  int64_t chunk = MOST_ROWS / batch;
  return chunk < 1 ? 1 : chunk > MOST_CHUNK ? MOST_CHUNK : (int)chunk;
}

static r2b_state *new_state(const r2b_model *model, int first, int end, int64_t batch, int64_t steps) {
  if (batch < 1 || batch > MOST_SIZE || steps < 1 || steps > MOST_SIZE)
    return fail("a state needs a batch and steps from 1 to %d", MOST_SIZE), NULL;
  if (batch * steps > MOST_STEPS) return fail("a state of %lld sequences of %lld steps is too large", (long long)batch, (long long)steps), NULL;
  r2b_state *s = calloc(1, sizeof *s);
  if (!s) return fail("out of memory"), NULL;
  s->model = model;
  s->batch = (int)batch;
  s->first = first;
  s->end = end;
  s->chunk = chunk_of(s, batch, steps);
  arena a = {0};
  carve_all(&a, s);
  s->arena = a.base = aligned_alloc(ALIGNMENT, a.used);
  if (!a.base) return fail("out of memory: a state of %zu bytes", a.used), free(s), NULL;
  memset(a.base, 0, a.used);
  a.used = 0;
  carve_all(&a, s);
  s->work.counters = &s->counters;
  return s;
}

r2b_state *r2b_new_state(const r2b_model *model, int64_t batch, int64_t steps) {
  const section_config *entry = model->sections[0].config;
  if (entry->graph) return fail("the network is a graph: its layers run one by one, r2b_new_layer_state"), NULL;
  return new_state(model, 0, entry->layers, batch, steps);
}

r2b_state *r2b_new_layer_state(const r2b_model *model, int64_t layer, int64_t batch, int64_t steps) {
  const section_config *entry = model->sections[0].config;
  if (!entry->graph || layer < 0 || layer >= entry->layers) return fail("there is no such layer of a graph"), NULL;
  return new_state(model, (int)layer, (int)layer + 1, batch, steps);
}

void r2b_free_state(r2b_state *state) {
  if (!state) return;
  free(state->arena);
  free(state);
}

void r2b_reset(r2b_state *state) {
  for (int k = state->first; k < state->end; k++)
    for (int d = 0; d < 2 && state->cells[k][d].h; d++) {
      cell_state *c = &state->cells[k][d];
      memset(c->h, 0, sizeof(float) * (size_t)state->batch * (size_t)c->h_size);
      memset(c->c, 0, sizeof(float) * (size_t)state->batch * (size_t)c->c_size);
      memset(c->r, 0, sizeof(float) * (size_t)state->batch * (size_t)c->r_size);
      memset(c->read, 0, sizeof(float) * (size_t)state->batch * (size_t)c->read_size);
    }
}

void r2b_leave_logits(r2b_state *state) { state->logits = true; }

void r2b_count(const r2b_state *state, r2b_counters *counters) { *counters = state->counters; }

static const layer_config *layer_at(const r2b_model *model, int64_t layer, int64_t direction) {
  const section_config *entry = model->sections[0].config;
  if (layer < 0 || layer >= entry->layers || direction < 0 || direction >= entry->layer[layer].directions) return NULL;
  return &entry->layer[layer];
}

int64_t r2b_state_size(const r2b_model *model, int64_t layer, int64_t direction, int64_t which) {
  const layer_config *y = layer_at(model, layer, direction);
  return !y || which < 0 || which > 2 ? 0 : y->state[which];
}

static int64_t size_here(const r2b_state *state, int64_t layer, int64_t direction, int64_t which) {
  return layer < state->first || layer >= state->end ? 0 : r2b_state_size(state->model, layer, direction, which);
}

static float *values_of(const cell_state *c, int64_t which) { return which == 2 ? c->r : which ? c->c : c->h; }

int r2b_get_state(const r2b_state *state, int64_t layer, int64_t direction, int64_t which, float *values) {
  int64_t size = size_here(state, layer, direction, which);
  if (!size) return fail("there is no such state");
  memcpy(values, values_of(&state->cells[layer][direction], which), sizeof(float) * (size_t)state->batch * (size_t)size);
  return 0;
}

/* What others read of h: of a stack its last layer's, of copies that have an h each their mean. */
static void read_of(const layer_config *y, const float *h, float *read) {
  const float *last = h + y->state[0] - (y->has_cell ? y->recurrent : y->width);
  for (int j = 0; j < y->recurrent; j++) {
    float sum = last[j];
    for (int k = y->hidden; !y->has_cell && k < y->width; k += y->hidden) sum += last[k + j];
    read[j] = y->has_cell ? sum : sum / (float)y->copies;
  }
}

int r2b_set_state(r2b_state *state, int64_t layer, int64_t direction, int64_t which, const float *values) {
  int64_t size = size_here(state, layer, direction, which);
  if (!size) return fail("there is no such state");
  cell_state *c = &state->cells[layer][direction];
  memcpy(values_of(c, which), values, sizeof(float) * (size_t)state->batch * (size_t)size);
  if (which || c->read == c->h) return 0;
  for (int b = 0; b < state->batch; b++)
    read_of(layer_at(state->model, layer, direction), c->h + (size_t)b * (size_t)c->h_size, c->read + (size_t)b * (size_t)c->read_size);
  return 0;
}

int r2b_get_gates(const r2b_state *state, int64_t layer, int64_t direction, float *pre) {
  const layer_config *y = layer_at(state->model, layer, direction);
  if (!y || layer < state->first || layer >= state->end) return fail("there is no such cell");
  const cell_state *c = &state->cells[layer][direction];
  const cell *cell = c->ran;
  if (!cell) return fail("no step has run");
  if (writes_pre(cell->layer)) return memcpy(pre, c->pre, sizeof(float) * (size_t)state->batch * (size_t)(y->gates * y->width)), 0;
  for (int b = 0; b < state->batch; b++)
    for (int g = 0; g < y->gates; g++)
      for (int j = 0; j < y->width; j++)
        *pre++ = c->products[b * c->product_size + g * y->hidden + j % y->hidden] + cell->gate_bias[g * y->width + j];
  return 0;
}
