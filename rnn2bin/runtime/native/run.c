/* Sequences through sections: layers, directions, lengths, readout, head, greedy decoding. */
#include <math.h>
#include <string.h>

#include "error.h"
#include "half.h"
#include "state.h"

/* One call: x is tokens or values, (T, B) or (T, B, I). */
typedef struct {
  const section *section;
  const int64_t *tokens;
  const float *values;
  int steps;
  const int64_t *lengths;
  int first, count; /* the steps of the chunk at hand */
} call;

static int length_of(const call *c, int b) { return c->lengths ? (int)c->lengths[b] : c->steps; }

static bool is_real(const call *c, int t, int b) { return c->first + t < length_of(c, b); }

/* The active input columns of one row of the chunk's first layer, where no table stands for them. */
static int list_token(const r2b_state *s, const section *from, int64_t token, columns *to) {
  int wide = from->config->embedding;
  if (!from->embedding) {
    to->index[0] = (int32_t)token;
    to->value[0] = 1.0f;
    return 1;
  }
  for (int j = 0; j < wide; j++) s->token_row[j] = half_to_float(from->embedding[token * wide + j]);
  return s->model->kernels->list(s->token_row, wide, 0, to->index, to->value);
}

/* Lists what each row of the chunk reads: the layer below's output `below` (chunk, B, I), or tokens. */
static void list_inputs(r2b_state *s, const call *c, int index, const float *below) {
  const cell *cell = &c->section->cells[index][0];
  int wide = cell->layer->input;
  for (int t = 0; t < c->count; t++)
    for (int b = 0; b < s->batch; b++) {
      int at = t * s->batch + b;
      columns *to = &s->active[at];
      to->inputs = to->total = 0;
      if (!cell->inputs || !is_real(c, t, b)) continue;
      to->inputs = below ? s->model->kernels->list(below + (size_t)at * (size_t)wide, wide, 0, to->index, to->value)
                         : list_token(s, c->section, c->tokens[at], to);
      to->total = to->inputs;
    }
}

/* Gate rows are all wanted at every step: the inputs' share of a chunk's steps is one product, which reads each weight once. Candidate rows
 * wait for their gates; screening reads half as much at a step. */
static bool in_advance(const call *c, const cell *cell) { return cell->inputs && c->count > 1 && !cell->screen.planes && !in_blocks(cell->layer); }

static void make_in_advance(r2b_state *s, const call *c, const cell *cell) {
  int rows = 0;
  for (int k = 0; k < c->count * s->batch; k++)
    if (is_real(c, k / s->batch, k % s->batch))
      s->product_rows[rows++] =
          (product_row){&s->active[k], 0, s->active[k].inputs, s->model->zeros, s->products + (size_t)k * (size_t)s->model->longest};
  s->model->kernels->product(cell->gates_in.weights ? &cell->gates_in : &cell->gates, s->product_rows, rows, &s->counters);
}

/* The rows of the batch that take step `step` of the chunk, with where in the chunk each is: a backward direction begins at its end. */
static int fill_rows(r2b_state *s, const call *c, int index, int direction, int step, float *out) {
  const cell *cell = &c->section->cells[index][direction];
  const cell_state *state = &s->cells[index][direction];
  int count = 0, wide = cell->layer->directions * cell->layer->recurrent;
  for (int b = 0; b < s->batch; b++) {
    if (!is_real(c, step, b)) continue;
    int at = (direction ? length_of(c, b) - 1 - step : step) * s->batch + b;
    bool advanced = in_advance(c, cell);
    const float *folded = cell->table ? cell->table + c->tokens[at] * cell->table_stride : s->model->zeros;
    s->outs[count] = out + (size_t)at * (size_t)wide + direction * cell->layer->recurrent;
    s->rows[count] = (step_row){
        .active = s->active[at],
        .gates_from = advanced ? s->active[at].inputs : 0,
        .gates_base = advanced ? s->products + (size_t)at * (size_t)s->model->longest : folded,
        .candidate_base = cell->table ? folded + cell->gate_rows : s->model->zeros, /* not of blocks */
        .h = state->h + (size_t)b * (size_t)state->h_size,
        .c = state->c + (size_t)b * (size_t)state->c_size,
        .r = state->r + (size_t)b * (size_t)state->r_size,
        .read = state->read + (size_t)b * (size_t)state->read_size,
        .products = state->products + (size_t)b * (size_t)state->product_size,
        .pre = state->pre ? state->pre + (size_t)b * (size_t)(cell->layer->gates * cell->layer->width) : NULL,
        .screen = s->screen,
    };
    if (cell->screen.keeps) {
      s->rows[count].screen.sums = state->sums + (size_t)b * (size_t)state->sum_size;
      s->rows[count].screen.before = state->before + (size_t)b * (size_t)state->before_size;
    }
    count++;
  }
  return count;
}

/* Sums of another cell's weights are of no use. */
static void own_sums(r2b_state *s, const call *c, int index) {
  for (int d = 0; d < c->section->config->layer[index].directions; d++) {
    cell_state *state = &s->cells[index][d];
    const cell *cell = &c->section->cells[index][d];
    if (!cell->screen.keeps || state->of == cell) continue;
    memset(state->sums, 0, sizeof *state->sums * (size_t)s->batch * (size_t)state->sum_size);
    memset(state->before, 0, sizeof *state->before * (size_t)s->batch * (size_t)state->before_size);
    state->of = cell;
  }
}

static void run_layer(r2b_state *s, const call *c, int index, const float *below, float *out) {
  const layer_config *y = &c->section->config->layer[index];
  if (c->lengths) memset(out, 0, sizeof(float) * (size_t)c->count * (size_t)s->batch * (size_t)(y->directions * y->recurrent));
  list_inputs(s, c, index, below);
  own_sums(s, c, index);
  for (int d = 0; d < y->directions; d++) {
    const cell *cell = &c->section->cells[index][d];
    s->cells[index][d].ran = cell;
    if (in_advance(c, cell)) make_in_advance(s, c, cell);
    for (int t = 0; t < c->count; t++) {
      int rows = fill_rows(s, c, index, d, t, out);
      s->model->kernels->step[y->step](cell, s->rows, s->product_rows, rows, &s->work);
      for (int k = 0; k < rows; k++) memcpy(s->outs[k], s->rows[k].read, sizeof(float) * (size_t)y->recurrent);
    }
  }
}

/* `values` (rows, in) through the linear layers -> y (rows, O); `scores`: without a last activation that keeps the order. */
static void run_head(r2b_state *s, const section *from, const float *values, int in, int rows, float *y, bool scores) {
  const section_config *config = from->config;
  size_t stride = (size_t)s->model->longest, wide = (size_t)in;
  if (!config->linears) memcpy(y, values, sizeof(float) * (size_t)rows * wide);
  for (int k = 0; k < config->linears; k++) {
    const linear *with = &from->linears[k];
    const linear_config *one = &config->linear[k];
    bool last = k + 1 == config->linears;
    for (int r = 0; r < rows; r++) {
      columns *to = &s->active[r];
      to->total = s->model->kernels->list(values + (size_t)r * wide, one->in, 0, to->index, to->value);
    }
    for (int r = 0; r < rows; r++)
      s->product_rows[r] = (product_row){&s->active[r], 0, s->active[r].total, s->model->zeros, s->products + (size_t)r * stride};
    s->model->kernels->product(&with->weight, s->product_rows, rows, &s->counters);
    activation kind = scores && last && one->activation >= ACT_SIGMOID && one->activation <= ACT_LOG_SOFTMAX ? ACT_NONE : one->activation;
    for (int r = 0; r < rows; r++) {
      float *row = s->products + (size_t)r * stride;
      for (int j = 0; j < one->out; j++) row[j] += with->bias[j];
      s->model->kernels->activate(kind, row, one->out);
      if (last) memcpy(y + (size_t)r * (size_t)one->out, row, sizeof(float) * (size_t)one->out);
    }
    values = s->products;
    wide = stride;
  }
}

/* What a head over the whole sequence reads, chunk by chunk, from the last layer's output `values` (chunk, B, W). */
static void pool(r2b_state *s, const call *c, const float *values, int wide) {
  readout how = c->section->config->readout;
  for (int t = 0; t < c->count; t++)
    for (int b = 0; b < s->batch; b++) {
      const float *from = values + ((size_t)t * (size_t)s->batch + (size_t)b) * (size_t)wide;
      float *to = s->pooled + (size_t)b * (size_t)wide;
      if (!is_real(c, t, b)) continue;
      if (how == READ_LAST && c->first + t + 1 == length_of(c, b)) memcpy(to, from, sizeof(float) * (size_t)wide);
      for (int j = 0; how == READ_MEAN && j < wide; j++) to[j] += from[j];
      for (int j = 0; how == READ_MAX && j < wide; j++) to[j] = from[j] > to[j] ? from[j] : to[j];
    }
}

static void finish_pool(r2b_state *s, const call *c, int wide) {
  const section_config *config = c->section->config;
  const layer_config *y = &config->layer[config->layers - 1];
  for (int b = 0; b < s->batch; b++) {
    float *to = s->pooled + (size_t)b * (size_t)wide;
    int length = length_of(c, b) > 1 ? length_of(c, b) : 1;
    for (int j = 0; config->readout == READ_MEAN && j < wide; j++) to[j] /= (float)length;
    for (int d = 0; config->readout == READ_FINAL && d < y->directions; d++)
      memcpy(to + d * y->recurrent, s->cells[config->layers - 1][d].read + (size_t)b * (size_t)y->recurrent,
             sizeof(float) * (size_t)y->recurrent);
  }
}

static void run_section(r2b_state *s, call *c, float *y, bool scores) {
  const section_config *config = c->section->config;
  const layer_config *top = &config->layer[s->end - 1];
  int wide = top->directions * top->recurrent;
  size_t outputs = (size_t)(config->linears ? c->section->output : wide);
  bool every_step = config->readout == READ_ALL;
  for (size_t k = 0; k < (size_t)s->batch * (size_t)wide; k++) s->pooled[k] = config->readout == READ_MAX ? -INFINITY : 0.0f;
  for (c->first = 0; c->first < c->steps; c->first += c->count) {
    size_t before = (size_t)c->first * (size_t)s->batch;
    call now = *c;
    now.count = c->count = c->steps - c->first < s->chunk ? c->steps - c->first : s->chunk;
    if (c->tokens) now.tokens = c->tokens + before;
    const float *below = c->tokens ? NULL : c->values + before * (size_t)config->layer[s->first].input;
    for (int k = s->first; k < s->end; k++) {
      run_layer(s, &now, k, below, s->values[k % 2]);
      below = s->values[k % 2];
    }
    for (int b = 0; b < s->batch; b++)
      for (int t = 0; t < now.count; t++) s->counters.steps += is_real(&now, t, b);
    if (y && every_step) run_head(s, c->section, below, wide, now.count * s->batch, y + before * outputs, scores);
    if (y && !every_step) pool(s, &now, below, wide);
  }
  if (!y || every_step) return;
  finish_pool(s, c, wide);
  run_head(s, c->section, s->pooled, wide, s->batch, y, scores);
}

/* C trusts nothing it is handed but the arrays' sizes. */
static int check(const r2b_state *s, const section *section, const void *x, int64_t steps, const int64_t *lengths, call *c) {
  *c = (call){.section = section, .lengths = lengths};
  if (steps < 1 || steps > INT32_MAX / s->batch) return fail("a call needs from 1 to %d steps", INT32_MAX / s->batch);
  for (int k = s->first; k < s->end; k++)
    if (section->config->layer[k].directions == 2 && steps > s->chunk)
      return fail("the state was made for %d steps; these are %lld", s->chunk, (long long)steps);
  for (int b = 0; lengths && b < s->batch; b++)
    if (lengths[b] < 0 || lengths[b] > steps) return fail("lengths must lie in 0 to %lld; found %lld", (long long)steps, (long long)lengths[b]);
  c->steps = (int)steps;
  if (!section->config->layer[s->first].tokens) return c->values = x, 0;
  c->tokens = x;
  for (int64_t k = 0; k < steps * s->batch; k++)
    if (c->tokens[k] < 0 || c->tokens[k] >= section->config->vocabulary)
      return fail("tokens must lie in 0 to %d; found %lld", section->config->vocabulary - 1, (long long)c->tokens[k]);
  return 0;
}

int r2b_run(r2b_state *state, const void *x, int64_t steps, const int64_t *lengths, float *y) {
  call c;
  const r2b_model *model = state->model;
  if (check(state, &model->sections[0], x, steps, lengths, &c)) return -1;
  run_section(state, &c, model->config.sections == 1 ? y : NULL, state->logits);
  return 0;
}

int r2b_step(r2b_state *state, const void *x, float *y) { return r2b_run(state, x, 1, NULL, y); }

int r2b_decode(r2b_state *state, const int64_t *tokens, int64_t steps, const int64_t *lengths, float *y) {
  call c;
  if (state->model->config.sections != 2) return fail("there is no decoder");
  if (check(state, &state->model->sections[1], tokens, steps, lengths, &c)) return -1;
  run_section(state, &c, y, state->logits);
  return 0;
}

static int64_t best_of(const float *scores, int count) {
  int best = 0;
  for (int j = 1; j < count; j++)
    if (scores[j] > scores[best]) best = j;
  return best;
}

int r2b_generate(r2b_state *state, int64_t *tokens, int64_t *steps) {
  const network_config *config = &state->model->config;
  const section *decoder = &state->model->sections[1];
  if (config->sections != 2) return fail("there is no decoder");
  for (int b = 0; b < state->batch; b++) state->tokens[b] = config->start;
  float *scores = state->pooled; /* a decoder gives scores at every step: nothing is pooled */
  for (*steps = 0; *steps < config->max_length;) {
    call c = {.section = decoder, .tokens = state->tokens, .steps = 1};
    run_section(state, &c, scores, true);
    int running = 0;
    for (int b = 0; b < state->batch; b++) {
      bool done = *steps > 0 && tokens[(*steps - 1) * state->batch + b] == config->end;
      int64_t token = done ? config->end : best_of(scores + (size_t)b * (size_t)decoder->output, decoder->output);
      state->tokens[b] = tokens[*steps * state->batch + b] = token;
      running += token != config->end;
    }
    ++*steps;
    if (!running) break;
  }
  return 0;
}
