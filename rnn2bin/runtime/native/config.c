#define _POSIX_C_SOURCE 200809L
#include "config.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "json.h"

enum { MOST_CONFIG = 64 << 20, MOST_VALUES = 1 << 28 };

/* A row a cell, as in rnn2bin/spec.py. */
static const cell_kind CELLS[] = {
    {"lstm", STEP_LSTM, "ifo", "hbh", "hc", .variant = 0},
    {"lstm_peephole", STEP_LSTM_KINDS, "ifo", "hbh", "hc", .peepholes = PEEPHOLES_DIAGONAL},
    {"lstm_peephole_full", STEP_LSTM_KINDS, "ifo", "hbh", "hc", .peepholes = PEEPHOLES_FULL},
    {"lstm_coupled", STEP_LSTM_KINDS, "io", "hh", "hc", .variant = 0},
    {"lstm_coupled_peephole", STEP_LSTM_KINDS, "io", "hh", "hc", .peepholes = PEEPHOLES_DIAGONAL},
    {"gru", STEP_GRU, "rz", "hl", "h", .reset_after = true},
    {"gru_reset_before", STEP_GRU, "rz", "hl", "h", .variant = 0},
    {"gru_output", STEP_GRU, "rzo", "hlh", "hc", .reset_after = true},
    {"rnn", STEP_RNN, "", "", "h", .variant = RNN_VANILLA},
    {"rnn_minimal", STEP_RNN, "f", "l", "h", .variant = RNN_MINIMAL},
    {"rnn_residual", STEP_RNN, "f", "h", "h", .variant = RNN_RESIDUAL},
    {"highway", STEP_HIGHWAY, "t", "h", "h", .memoryless = true},
    {"recurrent_highway", STEP_HIGHWAY, "t", "h", "h", .deep = INNER},
    {"prototype", STEP_MEMORY, "ifo", "hbh", "h", .variant = BARE},
    {"prototype_normalized", STEP_MEMORY, "ifo", "hbh", "h", .variant = BARE | NORMALIZED},
    {"pseudo", STEP_MEMORY, "ifo", "hbh", "hc", .variant = 0},
    {"pseudo_1", STEP_MEMORY, "ifo", "hbh", "hcr", .variant = READS_LATE},
    {"pseudo_2", STEP_MEMORY, "ifo", "hbh", "hc", .variant = GATES_READ},
    {"pseudo_3", STEP_MEMORY, "ifo", "hbh", "hc", .variant = OUTPUT_READ},
    {"pseudo_12", STEP_MEMORY, "ifo", "hbh", "hcr", .variant = READS_LATE | GATES_READ},
    {"pseudo_13", STEP_MEMORY, "ifo", "hbh", "hc", .variant = READS_LATE | OUTPUT_READ},
    {"pseudo_23", STEP_MEMORY, "ifo", "hbh", "hc", .variant = GATES_READ | OUTPUT_READ},
    {"pseudo_123", STEP_MEMORY, "ifo", "hbh", "hc", .variant = READS_LATE | GATES_READ | OUTPUT_READ},
    {"gf_tanh", STEP_FEEDBACK, "", "", "h", .variant = FEEDBACK_TANH, .deep = STACK, .link = 'g'},
    {"gf_gru", STEP_FEEDBACK, "rz", "hl", "h", .variant = FEEDBACK_GRU, .deep = STACK, .link = 'g'},
    {"gf_lstm", STEP_FEEDBACK, "ifo", "hbh", "hc", .variant = FEEDBACK_LSTM, .deep = STACK, .link = 'g'},
};
static const char *const READOUTS[] = {"all", "last", "final", "mean", "max"};
static const char *const ACTIVATIONS[] = {"none", "relu", "tanh", "sigmoid", "softmax", "log_softmax", "l2", "relu_l2"};
static const char *const DIRECTIONS[] = {"fwd", "bwd"};

#define COUNT(names) (int)(sizeof(names) / sizeof((names)[0]))

void gate_name(const layer_config *layer, int gate, char name[4]) {
  int each = (int)strlen(layer->kind->gates), link = gate - layer->unit_gates;
  memset(name, 0, 4);
  if (gate >= layer->unit_gates) {
    name[0] = layer->kind->link;
    name[1] = (char)('1' + link % layer->depth);
    name[2] = (char)('1' + link / layer->depth);
    return;
  }
  name[0] = layer->kind->gates[gate % each];
  if (layer->kind->deep != FLAT) name[1] = (char)('1' + gate / each);
}

/* Levels that a skip depends on are exactly 0 and 1 (kinds.GateSpec). */
bool gate_learns(const layer_config *layer, int gate, int side) {
  if (gate >= layer->unit_gates) return false;
  char which = layer->kind->levels[gate % (int)strlen(layer->kind->levels)];
  return which == 'b' || which == (side ? 'h' : 'l');
}

static int one_of(const json *value, const char *const *names, int count, int *found) {
  for (*found = 0; *found < count; ++*found)
    if (json_is(value, names[*found])) return 0;
  return -1;
}

/* A member that is a whole number within bounds. */
static int size_of(const json *object, const char *name, int64_t least, int64_t most, int *size, const char *where) {
  int64_t value;
  if (!json_integer(json_get(object, name), &value) || value < least || value > most)
    return fail("config.json: %s: %s must be a whole number from %lld to %lld", where, name, (long long)least, (long long)most);
  *size = (int)value;
  return 0;
}

static bool is_zero(const json *number) {
  for (size_t k = 0; k < number->length; k++)
    if (number->text[k] >= '1' && number->text[k] <= '9') return false;
  return true;
}

/* A bound of what is clipped; 0, or none in directories from before there were any, is no bound. */
static int read_bound(const json *layer, const char *name, float *bound, const char *where) {
  const json *found = json_get(layer, name);
  double value = 0.0;
  if (found && (!json_real(found, &value) || !(value >= 0.0 && value < 1e38)))
    return fail("config.json: %s: %s must be a number from 0 on", where, name);
  *bound = value > 0.0 ? (float)value : INFINITY;
  return 0;
}

/* Sizes that follow from the kind. */
static void measure_layer(layer_config *layer) {
  const cell_kind *kind = layer->kind;
  int layers = kind->deep == STACK ? layer->depth : 1;
  layer->recurrent = layer->projection ? layer->projection : layer->hidden;
  layer->width = layer->copies * layer->hidden;
  layer->has_cell = strchr(kind->states, 'c') != NULL;
  layer->unit_gates = (int)strlen(kind->gates) * layer->depth;
  layer->gates = layer->unit_gates + (kind->link ? layer->depth * layer->depth : 0);
  layer->coupled = layer->has_cell && layer->step <= STEP_LSTM_KINDS && layer->gates == 2;
  layer->state[0] = layers * (layer->has_cell ? layer->recurrent : layer->width);
  layer->state[1] = layer->has_cell ? layers * layer->width : 0;
  layer->state[2] = strchr(kind->states, 'r') ? layer->hidden : 0;
}

static int read_kind(const json *found, layer_config *layer, const char *where) {
  const cell_kind *kind = NULL;
  const json *name = json_get(found, "cell");
  for (int k = 0; k < COUNT(CELLS); k++)
    if (json_is(name, CELLS[k].name)) kind = &CELLS[k];
  if (!kind) return fail("config.json: %s: unknown cell; update rnn2bin", where);
  layer->kind = kind;
  if (read_bound(found, "clip", &layer->clip, where) || read_bound(found, "cell_clip", &layer->cell_clip, where) ||
      read_bound(found, "proj_clip", &layer->proj_clip, where))
    return -1;
  bool clips = isfinite(layer->clip) || isfinite(layer->cell_clip) || isfinite(layer->proj_clip);
  layer->step = kind->step == STEP_LSTM && clips ? STEP_LSTM_KINDS : kind->step;
  layer->wide_pre = writes_pre(layer);
  if (in_blocks(layer) && (clips || layer->projection)) return fail("config.json: %s: %s clips and projects nothing", where, kind->name);
  if (kind->memoryless && layer->input != layer->hidden)
    return fail("config.json: %s: %s has as many inputs as units", where, kind->name);
  if (layer->depth > 1 && kind->deep == FLAT) return fail("config.json: %s: %s has no depth", where, kind->name);
  if (layer->copies > 1 && !*kind->gates) return fail("config.json: %s: %s has no gate of which units could have copies", where, kind->name);
  return 0;
}

/* Whether the units of a layer may share rows of gates, as it says they do. */
static int check_sharing(const layer_config *layer, const char *where) {
  if (layer->shared == 1 && layer->shared_inputs == 1) return 0;
  if (in_blocks(layer) || layer->kind->peepholes == PEEPHOLES_FULL) return fail("config.json: %s: its units cannot share rows of gates", where);
  if ((layer->shared_inputs != 1 && layer->shared_inputs != layer->shared) || rows_of_gate(layer, layer->shared) > MOST_SHARED_ROWS)
    return fail("config.json: %s: shared_inputs must be 1 or as shared, and a gate has at most %d rows", where, MOST_SHARED_ROWS);
  return 0;
}

static int read_layer(const json *found, layer_config *layer, const char *where) {
  const json *phi = json_get(found, "activation"), *hard = json_get(found, "hard_sigmoid");
  layer->hard_sigmoid = hard && !(hard->kind == JSON_NUMBER && is_zero(hard));
  layer->copies = layer->depth = layer->shared = layer->shared_inputs = 1; /* directories from before there were any do not say so */
  if (size_of(found, "input_size", 1, MOST_SIZE, &layer->input, where) ||
      size_of(found, "hidden_size", 1, MOST_SIZE, &layer->hidden, where) ||
      size_of(found, "directions", 1, 2, &layer->directions, where) ||
      size_of(found, "proj_size", 0, MOST_SIZE, &layer->projection, where) ||
      (json_get(found, "copies") && size_of(found, "copies", 1, MOST_COPIES, &layer->copies, where)) ||
      (json_get(found, "shared") && size_of(found, "shared", 1, MOST_SIZE, &layer->shared, where)) ||
      (json_get(found, "shared_inputs") && size_of(found, "shared_inputs", 1, MOST_SIZE, &layer->shared_inputs, where)) ||
      (json_get(found, "depth") && size_of(found, "depth", 1, MOST_DEPTH, &layer->depth, where)))
    return -1;
  if (read_kind(found, layer, where) || check_sharing(layer, where)) return -1;
  layer->relu = phi && json_is(phi, "relu") && layer->step == STEP_RNN && layer->kind->variant == RNN_VANILLA;
  if (phi && !json_is(phi, "tanh") && !layer->relu)
    return fail("config.json: %s: cells with another activation than tanh run on the torch backend", where);
  measure_layer(layer);
  if ((int64_t)layer->gates * layer->width > MOST_VALUES || (int64_t)layer->depth * layer->hidden > MOST_SIZE)
    return fail("config.json: %s: too many units", where);
  if (layer->projection && (!layer->has_cell || layer->step == STEP_GRU)) return fail("config.json: %s: only an LSTM has a projection", where);
  return 0;
}

static int read_linear(const json *found, linear_config *linear, const char *where) {
  int kind;
  const json *bias = json_get(found, "bias");
  if (size_of(found, "in_features", 1, MOST_SIZE, &linear->in, where) || size_of(found, "out_features", 1, MOST_SIZE, &linear->out, where))
    return -1;
  if (!bias || (bias->kind != JSON_TRUE && bias->kind != JSON_FALSE)) return fail("config.json: %s: bias must be true or false", where);
  linear->bias = bias->kind == JSON_TRUE;
  if (one_of(json_get(found, "activation"), ACTIVATIONS, COUNT(ACTIVATIONS), &kind))
    return fail("config.json: %s: unknown activation; update rnn2bin", where);
  linear->activation = (activation)kind;
  return 0;
}

static int read_embedding(const json *found, section_config *section) {
  const json *one_hot = json_get(found, "one_hot");
  if (found->kind == JSON_NULL) return 0;
  if (size_of(found, "num_embeddings", 1, MOST_SIZE, &section->vocabulary, section->name) ||
      size_of(found, "embedding_dim", 1, MOST_SIZE, &section->embedding, section->name))
    return -1;
  if (!one_hot || (one_hot->kind != JSON_TRUE && one_hot->kind != JSON_FALSE))
    return fail("config.json: %s: one_hot must be true or false", section->name);
  if (one_hot->kind == JSON_FALSE) return 0;
  if (section->embedding != section->vocabulary) return fail("config.json: %s: one-hot vectors are as wide as the vocabulary", section->name);
  section->embedding = 0;
  return 0;
}

/* Of tokens a table holds every unit's share. */
static int reads_tokens(section_config *section, int index) {
  layer_config *layer = &section->layer[index];
  if (layer->shared_inputs > 1) return fail("config.json: %s.layers.%d: shared_inputs must be 1 where tokens are read", section->name, index);
  layer->tokens = true;
  return 0;
}

/* What a token is looked up as. */
static int width_of_tokens(const section_config *section) { return section->embedding ? section->embedding : section->vocabulary; }

/* Parts must join: each reads what the one before it writes. */
static int check_widths(section_config *section) {
  if (section->vocabulary && reads_tokens(section, 0)) return -1;
  int width = section->vocabulary ? width_of_tokens(section) : section->layer[0].input;
  for (int k = 0; k < section->layers; k++) {
    const layer_config *layer = &section->layer[k];
    if (layer->input != width) return fail("config.json: %s.layers.%d reads %d values but receives %d", section->name, k, layer->input, width);
    width = layer->directions * layer->recurrent;
  }
  for (int k = 0; k < section->linears; k++) {
    const linear_config *linear = &section->linear[k];
    if (linear->in != width) return fail("config.json: %s.head.%d reads %d values but receives %d", section->name, k, linear->in, width);
    width = linear->out;
  }
  return 0;
}

static int read_gates(const json *gates, section_config *section) {
  char name[48], letter[4];
  for (int k = 0; k < section->layers; k++) {
    layer_config *layer = &section->layer[k];
    for (int d = 0; d < layer->directions; d++) {
      snprintf(name, sizeof name, "%s.layers.%d.%s", section->name, k, DIRECTIONS[d]);
      const json *cell = json_get(gates, name);
      for (int g = 0; g < layer->gates; g++) {
        gate_name(layer, g, letter);
        const json *gate = json_get(cell, letter);
        layer->binary[d][g] = json_is(gate, "binary");
        if (!layer->binary[d][g] && !json_is(gate, "soft")) return fail("config.json: gates of %s must be binary or soft", name);
        if (!layer->binary[d][g] && layer->hard_sigmoid)
          return fail("config.json: %s: soft gates that are hard sigmoids run on the torch backend", name);
      }
    }
  }
  return 0;
}

/* The layers of a graph that are handed tokens. */
static int read_token_layers(const json *found, section_config *section) {
  int64_t index;
  if (!found) return 0;
  if (found->kind != JSON_ARRAY) return fail("config.json: %s: token_layers must be a list", section->name);
  for (const json *at = found->child; at; at = at->next) {
    if (!json_integer(at, &index) || index < 0 || index >= section->layers || !section->vocabulary || section->layer[index].tokens)
      return fail("config.json: %s: token_layers names a layer that there is not, or one twice, or there is no embedding", section->name);
    if (section->layer[index].input != width_of_tokens(section))
      return fail("config.json: %s.layers.%d reads %d values but receives %d", section->name, (int)index, section->layer[index].input, width_of_tokens(section));
    if (reads_tokens(section, (int)index)) return -1;
  }
  return 0;
}

/* Nodes around the layers are not run here, so nothing in them is read: a layer takes what it is handed. */
static int read_graph(const json *graph, section_config *section) {
  if (!graph || graph->kind == JSON_NULL) return 0;
  if (graph->kind != JSON_OBJECT) return fail("config.json: %s: graph must be an object, or null", section->name);
  if (strcmp(section->name, "main")) return fail("config.json: %s: graphs of encoder–decoders run on the torch backend", section->name);
  if (section->linears) return fail("config.json: %s: a graph holds its linear layers itself; head must be empty", section->name);
  if (section->readout != READ_ALL) return fail("config.json: %s: a graph reads out itself; readout must be all", section->name);
  section->graph = true;
  return read_token_layers(json_get(graph, "token_layers"), section);
}

static int read_section(const json *found, section_config *section) {
  const json *layers = json_get(found, "layers"), *head = json_get(found, "head"), *embedding = json_get(found, "embedding");
  char where[32];
  int kind;
  if (!layers || layers->kind != JSON_ARRAY || layers->count < 1 || layers->count > MOST_LAYERS)
    return fail("config.json: %s: wanted 1 to %d layers", section->name, MOST_LAYERS);
  if (!head || head->kind != JSON_ARRAY || head->count > MOST_LINEAR)
    return fail("config.json: %s: wanted a head of at most %d linear layers", section->name, MOST_LINEAR);
  if (!embedding) return fail("config.json: %s: embedding is missing", section->name);
  for (const json *layer = layers->child; layer; layer = layer->next) {
    snprintf(where, sizeof where, "%s.layers.%d", section->name, section->layers);
    if (read_layer(layer, &section->layer[section->layers++], where)) return -1;
  }
  for (const json *linear = head->child; linear; linear = linear->next) {
    snprintf(where, sizeof where, "%s.head.%d", section->name, section->linears);
    if (read_linear(linear, &section->linear[section->linears++], where)) return -1;
  }
  if (read_embedding(embedding, section)) return -1;
  if (one_of(json_get(found, "readout"), READOUTS, COUNT(READOUTS), &kind))
    return fail("config.json: %s: unknown readout; update rnn2bin", section->name);
  section->readout = (readout)kind;
  if (read_graph(json_get(found, "graph"), section)) return -1;
  return section->graph ? 0 : check_widths(section);
}

/* The encoder's last states start the decoder; a decoder reads the tokens it writes. */
static int read_decoder(const json *decode, network_config *config) {
  section_config *encoder = &config->section[0];
  const section_config *decoder = &config->section[1];
  int start = 0, end = 0, longest = 0;
  if (!decoder->vocabulary) return fail("config.json: decoder: needs an embedding, or one-hot tokens");
  int outputs = decoder->linears ? decoder->linear[decoder->linears - 1].out
                                 : decoder->layer[decoder->layers - 1].directions * decoder->layer[decoder->layers - 1].recurrent;
  if (decoder->readout != READ_ALL || outputs > decoder->vocabulary)
    return fail("config.json: decoder: must give a score for each of its tokens, at every step");
  if (size_of(decode, "start", 0, decoder->vocabulary - 1, &start, "decode") ||
      size_of(decode, "end", 0, decoder->vocabulary - 1, &end, "decode") || size_of(decode, "max_length", 1, MOST_SIZE, &longest, "decode"))
    return -1;
  config->start = start;
  config->end = end;
  config->max_length = longest;
  bool same = encoder->layers == decoder->layers;
  for (int k = 0; same && k < encoder->layers; k++) {
    layer_config *a = &encoder->layer[k];
    const layer_config *b = &decoder->layer[k];
    a->wide_pre |= b->wide_pre; /* they share states */
    same = a->kind == b->kind && a->depth == b->depth && a->width == b->width && a->hidden == b->hidden && a->recurrent == b->recurrent && a->directions == b->directions;
  }
  return same ? 0 : fail("config.json: decoder: its layers must have the cells and sizes of the encoder's");
}

static int read_network(const json *root, network_config *config) {
  int64_t version;
  const json *spec = json_get(root, "spec"), *sections = json_get(spec, "sections"), *decode = json_get(spec, "decode");
  if (!json_is(json_get(root, "model_type"), "rnn2bin")) return fail("config.json: not an rnn2bin model");
  if (!json_integer(json_get(root, "format_version"), &version) || version < 1) return fail("config.json: format_version is missing");
  if (version > FORMAT_VERSION)
    return fail("config.json: format version %lld; this runtime reads up to %d: update it", (long long)version, FORMAT_VERSION);
  config->learned = json_is(json_get(root, "levels"), "learned");
  if (!config->learned && !json_is(json_get(root, "levels"), "strict")) return fail("config.json: levels must be learned or strict");
  const json *weights = json_get(root, "weights"); /* which is seen from the weights themselves */
  if (weights && !json_is(weights, "fp16") && !json_is(weights, "int8")) return fail("config.json: weights must be fp16 or int8");
  if (!decode) return fail("config.json: spec.decode is missing");
  config->sections = decode->kind == JSON_NULL ? 1 : 2;
  if (!sections || sections->count != config->sections) return fail("config.json: spec.sections does not fit spec.decode");
  for (int k = 0; k < config->sections; k++) {
    section_config *section = &config->section[k];
    strcpy(section->name, config->sections == 1 ? "main" : k ? "decoder" : "encoder");
    const json *found = json_get(sections, section->name);
    if (!found) return fail("config.json: section %s is missing", section->name);
    if (read_section(found, section) || read_gates(json_get(root, "gates"), section)) return -1;
  }
  return config->sections == 2 ? read_decoder(decode, config) : 0;
}

static char *read_text(const char *path, size_t *length) {
  FILE *stream = fopen(path, "rb");
  char *text = NULL;
  if (!stream) return fail("%s: not a packed directory: no such file", path), NULL;
  long size = fseek(stream, 0, SEEK_END) ? -1 : ftell(stream);
  if (size < 0 || size > MOST_CONFIG || fseek(stream, 0, SEEK_SET))
    fail("%s: not readable, or larger than %d bytes", path, MOST_CONFIG);
  else if (!(text = malloc((size_t)size + 1)))
    fail("out of memory");
  else
    *length = fread(text, 1, (size_t)size, stream);
  fclose(stream);
  return text;
}

int config_read(const char *path, network_config *config) {
  size_t length = 0;
  json_document document;
  char *text = read_text(path, &length);
  if (!text) return -1;
  *config = (network_config){0};
  int failed = json_parse(text, length, &document);
  if (failed) {
    fail("%s: not readable JSON: %s", path, document.error);
  } else {
    failed = read_network(document.root, config);
    json_free(&document);
  }
  free(text);
  return failed;
}
