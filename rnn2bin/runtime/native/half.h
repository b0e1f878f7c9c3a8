/* fp16 as bytes of a file -> float. */
#ifndef RNN2BIN_HALF_H
#define RNN2BIN_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint16_t half_at(const uint8_t *data, size_t index) {
  uint16_t half;
  memcpy(&half, data + 2 * index, sizeof half);
  return half;
}

/* Three places to the right fp16's bits are float's of the same number times 2^-112, subnormals included. */
static inline float half_to_float(uint16_t half) {
  uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  return half & 0x8000 ? -value : value;
}

#endif
