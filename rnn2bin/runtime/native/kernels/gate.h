/* From pre-activations to multipliers, and which units are open. */

/* Multipliers (width) of gate `g`: 1[pre > 0] selects a level; a soft gate is the sigmoid. */
static void gate(const cell *cell, int g, const float *products, float *out) {
  int hidden = cell->layer->hidden, width = cell->layer->width;
  const float *product = products + g * hidden;
  for (int k = 0; k < width; k += hidden) {
    const float *bias = cell->gate_bias + g * width + k, *lo = cell->lo + g * width + k, *hi = cell->hi + g * width + k;
    float *to = out + k;
    if (cell->binary[g])
      for (int j = 0; j < hidden; j++) to[j] = product[j] + bias[j] > 0.0f ? hi[j] : lo[j];
    else
      for (int j = 0; j < hidden; j++) to[j] = sigmoid_of(bounded(product[j] + bias[j], cell->layer->clip));
  }
}

/* open (H): whether the bit of any copy of a unit is `bit`. A soft gate is open everywhere. */
static void any_copy(const cell *cell, int g, int bit, const float *products, int32_t *open) {
  int hidden = cell->layer->hidden, width = cell->layer->width;
  const float *product = products + g * hidden;
  for (int j = 0; j < hidden; j++) open[j] = !cell->binary[g];
  if (!cell->binary[g]) return;
  for (int k = 0; k < width; k += hidden) {
    const float *bias = cell->gate_bias + g * width + k;
    for (int j = 0; j < hidden; j++) open[j] |= (product[j] + bias[j] > 0.0f) == bit;
  }
}

/* The groups that hold an open unit -> how many. `open` is padded with zeros to whole groups. */
static int open_groups(const int32_t *open, int rows, int32_t *groups) {
  int count = 0;
  for (int g = 0; g < rows / GROUP; g++) {
    int any = 0;
    for (int j = 0; j < GROUP; j++) any |= open[GROUP * g + j];
    groups[count] = g;
    count += any != 0;
  }
  return count;
}

/* The open units -> how many. */
static int open_units(const int32_t *open, int hidden, int32_t *wanted) {
  int count = 0;
  for (int j = 0; j < hidden; j++) {
    wanted[count] = j;
    count += open[j];
  }
  return count;
}
