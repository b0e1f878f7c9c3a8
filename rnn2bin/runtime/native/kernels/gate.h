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

/* Not those of padded rows: reading them would go beyond the last copy of the last gate by more than there is room. */
static inline int groups_in(const cell *cell) { return padded(cell->layer->hidden, GROUP) / GROUP; }

/* The units of group `i` that there are. */
static inline unsigned real_units(int hidden, int i) {
  int left = hidden - GROUP * i;
  return left >= GROUP ? 0xffffu : left > 0 ? (1u << left) - 1 : 0;
}

/* Bits of group `i` of one copy of gate `g`, `k` its place among copies: 1[pre > 0]; those of a soft gate are all `other`. */
INLINE unsigned group_bits(const cell *cell, int g, int k, const float *products, int i, unsigned other) {
  const layer_config *layer = cell->layer;
  if (!cell->binary[g]) return other;
  return positive(products + g * layer->hidden + GROUP * i, cell->gate_bias + g * layer->width + k + GROUP * i);
}

/* open (H / GROUP): whether gate `g` is 1 in any copy of a unit. A soft gate is open everywhere. */
static void any_open(const cell *cell, int g, const float *products, uint16_t *open) {
  const layer_config *layer = cell->layer;
  for (int i = 0; i < groups_in(cell); i++) {
    unsigned bits = 0;
    for (int k = 0; k < layer->width; k += layer->hidden) bits |= group_bits(cell, g, k, products, i, 0xffffu);
    open[i] = (uint16_t)(bits & real_units(layer->hidden, i));
  }
}

/* The groups that hold an open unit -> how many. */
static int open_groups(const uint16_t *open, int all, int32_t *groups) {
  int count = 0;
  for (int i = 0; i < all; i++) {
    groups[count] = i;
    count += open[i] != 0;
  }
  return count;
}

/* The open units -> how many. */
static int open_units(const uint16_t *open, int all, int32_t *units) {
  int count = 0;
  for (int i = 0; i < all; i++) {
    put_units(units + count, GROUP * i, open[i]);
    count += __builtin_popcount(open[i]);
  }
  return count;
}
