/* Mutates the two files of a packed directory and opens them: whatever stands in them, r2b_open says what is wrong, or the model runs.
 *
 *     fuzz DIRECTORY SCRATCH COUNT SEED
 *
 * SCRATCH is a directory of its own (on a memory file system it is quickest). Built with ASan and UBSan, which turn a read outside of the
 * file into a failure. With -DLIBFUZZER and clang's -fsanitize=fuzzer an input is a length (4 bytes), config.json of that length, and
 * model.safetensors; the environment's SCRATCH names the directory (scripts/check_native.sh). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rnn2bin.h"

typedef struct {
  unsigned char *bytes;
  size_t size;
} blob;

static void write_file(const char *folder, const char *name, const blob *b) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "wb");
  if (!file || fwrite(b->bytes, 1, b->size, file) != b->size) exit(2);
  fclose(file);
}

static void run_state(const r2b_info *info, r2b_state *s) {
  float *y = calloc((size_t)(6 * info->output_size), 4);
  void *x = calloc((size_t)(6 * info->input_size), 8);
  if (s) r2b_run(s, x, 3, NULL, y);
  r2b_free_state(s), free(x), free(y);
}

static void try_run(const r2b_model *model) {
  r2b_info info, layer;
  r2b_describe(model, &info);
  if (info.input_size > 4096 || info.output_size > 4096) return;
  if (!info.graph) run_state(&info, r2b_new_state(model, 2, 3));
  for (int64_t k = 0; info.graph && k < info.layers; k++)
    if (!r2b_describe_layer(model, k, &layer) && layer.input_size <= 4096 && layer.output_size <= 4096)
      run_state(&layer, r2b_new_layer_state(model, k, 2, 3));
}

#if !defined(LIBFUZZER)
static unsigned long long seed;

static unsigned draw(unsigned below) {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return (unsigned)((seed >> 20) % below);
}

static blob read_file(const char *folder, const char *name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "rb");
  blob b = {0};
  if (!file) exit(2);
  fseek(file, 0, SEEK_END);
  b.size = (size_t)ftell(file);
  rewind(file);
  b.bytes = malloc(2 * b.size + 64);
  if (fread(b.bytes, 1, b.size, file) != b.size) exit(2);
  fclose(file);
  return b;
}

static const char *const WORDS[] = {"0",    "1",        "-1",    "4294967296", "9223372036854775807", "1e9",  "\"",     "{",      "}",
                                    "[",    "]",        ",",     "null",       "true",                "\\u0", "\"gru\"", "\"lstm\"", "\"F32\"",
                                    "1048576", "\"binary\"", "65536", "[]",         "{}",                  "9",    "1e38", "\"soft\"", "0.5",
                                    "\"gru_output\"", "\"lstm_peephole_full\"", "\"lstm_coupled\"", "\"rnn\"", "\"pseudo_123\"",
                                    "\"highway\"", "\"recurrent_highway\"", "\"gf_lstm\"", "\"gf_gru\"", "\"gf_tanh\""};

/* One change: a byte, a cut, a copied piece, or a word in place of bytes. Numbers are what most of a header's meaning is in. */
static void mutate(blob *b, size_t within) {
  size_t at = draw((unsigned)within), length = 1 + draw(8);
  const char *word = WORDS[draw(sizeof WORDS / sizeof *WORDS)];
  switch (draw(6)) {
    case 0: b->bytes[at] = (unsigned char)draw(256); break;
    case 1: b->bytes[at] ^= (unsigned char)(1u << draw(8)); break;
    case 2: b->size = draw(20) ? b->size : at; break;
    case 3:
      for (size_t k = at; k < within; k++)
        if (b->bytes[k] >= '0' && b->bytes[k] <= '9') {
          b->bytes[k] = (unsigned char)('0' + draw(10));
          break;
        }
      break;
    case 4: {
      size_t n = strlen(word);
      if (at + length > b->size) break;
      memmove(b->bytes + at + n, b->bytes + at + length, b->size - at - length);
      memcpy(b->bytes + at, word, n);
      b->size = b->size + n - length;
      break;
    }
    default:
      if (at + 2 * length < b->size) memcpy(b->bytes + at, b->bytes + at + length, length);
  }
}

#endif

#if defined(LIBFUZZER)
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
  const char *folder = getenv("SCRATCH");
  if (!folder || size < 4) return 0;
  size_t length = data[0] | (size_t)data[1] << 8 | (size_t)data[2] << 16;
  if (length > size - 4) length = size - 4;
  blob config = {(unsigned char *)data + 4, length}, weights = {(unsigned char *)data + 4 + length, size - 4 - length};
  write_file(folder, "config.json", &config);
  write_file(folder, "model.safetensors", &weights);
  r2b_model *model = r2b_open(folder, (int)(size % 3));
  if (model) try_run(model);
  r2b_close(model);
  return 0;
}
#else
int main(int count, char **words) {
  if (count < 5) return 2;
  blob config = read_file(words[1], "config.json"), weights = read_file(words[1], "model.safetensors");
  long total = atol(words[3]), opened = 0;
  seed = strtoull(words[4], NULL, 10) * 2654435769u + 1;
  unsigned header = 0;
  for (int k = 3; k >= 0; k--) header = header << 8 | weights.bytes[k];
  blob a = {malloc(2 * config.size + 64), 0}, b = {malloc(2 * weights.size + 64), 0};
  for (long k = 0; k < total; k++) {
    int which = draw(2), changes = 1 + (int)draw(3);
    memcpy(a.bytes, config.bytes, a.size = config.size);
    memcpy(b.bytes, weights.bytes, b.size = weights.size);
    for (int m = 0; m < changes; m++) {
      blob *target = which ? &a : &b;
      size_t within = which ? a.size : (draw(10) ? header + 8 : b.size);
      if (within > target->size) within = target->size;
      if (within) mutate(target, within);
    }
    if (which || k == 0) write_file(words[2], "config.json", &a);
    if (!which || k == 0) write_file(words[2], "model.safetensors", &b);
    r2b_model *model = r2b_open(words[2], (int)(k % 3));
    if (model) try_run(model), opened++;
    r2b_close(model);
    if (which) write_file(words[2], "config.json", &config);
    else write_file(words[2], "model.safetensors", &weights);
  }
  free(a.bytes), free(b.bytes), free(config.bytes), free(weights.bytes);
  printf("%ld inputs, %ld of them opened and ran\n", total, opened);
  return 0;
}
#endif
