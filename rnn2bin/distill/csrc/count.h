/* Units that close one gate and open another in one of their copies, counted for the density budget; and the gradient of the count, for which
 * a bit's derivative is that of its sigmoid. */

/* The copy of each unit whose larger one of z and least - r is the smallest: at most 0 where it closes the one gate and opens the other. */
static void find_best(const r2b_count *q, const float *restrict z, const float *restrict r, float *restrict low, int32_t *restrict best) {
  size_t H = (size_t)q->hidden;
  float least = q->least;
  memset(best, 0, H * sizeof *best);
  for (size_t j = 0; j < H; j++) low[j] = INFINITY;
  for (int k = 0; k < q->copies; k++) {
    const float *restrict closed = q->closed + (size_t)k * H, *restrict open = q->open + (size_t)k * H;
    for (size_t j = 0; j < H; j++) {
      float x = z[j] + closed[j], y = least - (r[j] + open[j]), larger = x > y ? x : y, before = low[j];
      int32_t copy = best[j];
      best[j] = larger < before ? k : copy;
      low[j] = larger < before ? larger : before;
    }
  }
}

/* Pre-activations (n) of that copy: product and threshold; `hidden` from one copy's thresholds to the next one's. */
static void of_best(const float *restrict product, const float *bias, const int32_t *restrict best, int copies, size_t hidden, size_t n,
                    float *restrict to) {
  memset(to, 0, n * sizeof *to);
  for (int k = 0; k < copies; k++) {
    const float *restrict of_copy = bias + (size_t)k * hidden;
    for (size_t j = 0; j < n; j++) {
      float pre = product[j] + of_copy[j], other = to[j];
      to[j] = best[j] == k ? pre : other;
    }
  }
}

/* Gradients (n) of that copy on to its product and its threshold. */
static void to_best(const float *restrict grad, const int32_t *restrict best, int copies, size_t hidden, size_t n, float *restrict product, float *bias) {
  for (size_t j = 0; j < n; j++) product[j] += grad[j];
  for (int k = 0; k < copies; k++) {
    float *restrict of_copy = bias + (size_t)k * hidden;
    for (size_t j = 0; j < n; j++) of_copy[j] += best[j] == k ? grad[j] : 0.0f;
  }
}

int NAME(count)(const r2b_count *q, int first, int rows) {
  size_t H = (size_t)q->hidden;
  float *z = malloc(3 * H * sizeof *z), *r = z + H, *low = r + H;
  if (!z) return -1;
  for (size_t row = (size_t)first; row < (size_t)(first + rows); row++) {
    const float *at = q->products + row * (size_t)q->gates * H, *of_z = at + (size_t)q->closed_gate * H, *of_r = at + (size_t)q->open_gate * H;
    int32_t *best = q->best + row * H;
    find_best(q, of_z, of_r, low, best);
    of_best(of_z, q->closed, best, q->copies, H, H, z);
    of_best(of_r, q->open, best, q->copies, H, H, r);
    int found = 0;
    for (size_t j = 0; j < H; j++) found += z[j] <= 0.0f && r[j] > 0.0f;
    q->count[row] = (float)found;
  }
  free(z);
  return 0;
}

/* `n` units from `first` on: every sum has one order, however many threads there are. */
int NAME(count_back)(const r2b_count *q, int first, int n) {
  size_t H = (size_t)q->hidden, from = (size_t)first, wide = (size_t)n;
  float *z = malloc(2 * wide * sizeof *z), *r = z + wide;
  if (!z) return -1;
  for (size_t row = 0; row < (size_t)q->rows; row++) {
    size_t of_z = (row * (size_t)q->gates + (size_t)q->closed_gate) * H + from, of_r = (row * (size_t)q->gates + (size_t)q->open_gate) * H + from;
    const int32_t *best = q->best + row * H + from;
    of_best(q->products + of_z, q->closed + from, best, q->copies, H, wide, z);
    of_best(q->products + of_r, q->open + from, best, q->copies, H, wide, r);
    float g = q->grad[row];
    for (size_t j = 0; j < wide; j++) {
      float in_z = sigmoid_(z[j]), in_r = sigmoid_(r[j]), closed = z[j] <= 0.0f ? g : 0.0f, open = r[j] > 0.0f ? g : 0.0f;
      z[j] = in_z * (in_z - 1.0f) * open;
      r[j] = in_r * (1.0f - in_r) * closed;
    }
    to_best(z, best, q->copies, H, wide, q->grad_products + of_z, q->grad_closed + from);
    to_best(r, best, q->copies, H, wide, q->grad_products + of_r, q->grad_open + from);
  }
  free(z);
  return 0;
}
