// Scale and zero of a group from its smallest and largest element, and the codes of its elements: what naive.py computes, bit
// for bit where multiply-adds are not contracted.
#pragma once
#include <cmath>

#include "../runtime/native/simd.h"

namespace KVMIX_ISA {

constexpr float TINY_SCALE = 0x1p-24f;  // as in naive.py

// The smallest and largest so far. NaN compares false and would be lost: it is kept in `poison`, as is infinity.
struct Range {
  vf low = splat(INFINITY), high = splat(-INFINITY), poison = {};

  void add(vf x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    poison += x * splat(0.0f);
  }
};

static inline vf raw_scale(vf low, vf high, vf poison, float levels) {
  vf scale = (high - low) / splat(levels);
  return (scale < splat(TINY_SCALE) ? vf{} : scale) + poison;
}

static inline vh to_stored(int64_t dtype, vf x) {
  return dtype == FLOAT16 ? float_to_half(x) : float_to_bfloat(x);
}

static inline vf from_stored(int64_t dtype, const void* x) {
  return dtype == FLOAT16 ? half_to_float(x) : bfloat_to_float(x);
}

static inline vf reciprocal(vf scale) { return scale > vf{} ? splat(1.0f) / scale : vf{}; }

static inline vf whole_code(vf x, vf zero, vf inverse, float levels) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to nearest even
  vf scaled = (x - zero) * inverse;
  scaled = scaled > vf{} ? scaled : vf{};
  scaled = scaled < splat(levels) ? scaled : splat(levels);
  return (scaled + magic) - magic;
}

static inline vi code(vf x, vf zero, vf inverse, float levels) {
  return __builtin_convertvector(whole_code(x, zero, inverse, levels), vi);
}

}  // namespace KVMIX_ISA
