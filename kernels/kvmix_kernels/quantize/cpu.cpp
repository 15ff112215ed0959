// Quantize and pack whole pages on a CPU: bit for bit what naive.py makes. Compiled once per instruction set, without
// contracted multiply-adds, which would round elsewhere.
#include "cpu.h"

#include <cmath>
#include <vector>

#include "../runtime/native/simd.h"

namespace KVMIX_ISA {

constexpr float TINY_SCALE = 0x1p-24f;  // as in naive.py

struct Scratch {
  std::vector<float> page, scales;   // [page][dim]; scale, zero and 1 / scale, each [groups][rows]
  std::vector<int32_t> codes, packed; // of one token
};

static void read_page(const Quantization& q, const void* from, float* page) {
  for (int64_t t = 0; t < q.page; t++)
    for (int64_t d = 0; d < q.dim; d += W) {
      const int64_t at = t * q.pages_strides[3] + d;
      vf x = q.dtype == FLOAT32 ? read<FLOAT32>(from, at) : q.dtype == FLOAT16 ? read<FLOAT16>(from, at) : read<BFLOAT16>(from, at);
      store(page + t * q.dim + d, x);
    }
}

// The smallest and largest so far. NaN compares false and would be lost: it is kept in `poison`, as is infinity.
struct Range {
  vf low = splat(INFINITY), high = splat(-INFINITY), poison = {};

  void add(vf x) {
    low = x < low ? x : low;
    high = x > high ? x : high;
    poison += x * splat(0.0f);
  }
};

static vf raw_scale(vf low, vf high, vf poison, float levels) {
  vf scale = (high - low) / splat(levels);
  return (scale < splat(TINY_SCALE) ? vf{} : scale) + poison;
}

// Round scale and zero to how they are stored, and read them back for the codes.
static void finish_scales(const Quantization& q, int64_t count, float* scales, uint16_t* out) {
  float *scale = scales, *zero = scales + count, *inverse = scales + 2 * count;
  for (int64_t i = 0; i < count; i += W)
    for (float* x : {scale, zero}) {
      uint16_t* stored = out + (x - scales) + i;
      const vf wide = load<vf>(x + i);
      store(stored, q.scale_dtype == FLOAT16 ? float_to_half(wide) : float_to_bfloat(wide));
      store(x + i, q.scale_dtype == FLOAT16 ? read<FLOAT16>(stored, 0) : read<BFLOAT16>(stored, 0));
    }
  for (int64_t i = 0; i < count; i += W) {
    const vf s = load<vf>(scale + i);
    store(inverse + i, s > vf{} ? splat(1.0f) / s : vf{});
  }
}

static vi code(vf x, vf zero, vf inverse, float levels) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to nearest even
  vf scaled = (x - zero) * inverse;
  scaled = scaled > vf{} ? scaled : vf{};
  scaled = scaled < splat(levels) ? scaled : splat(levels);
  return __builtin_convertvector((scaled + magic) - magic, vi);
}

// The widths of the bit planes, lowest bits first, as layout.py has them.
static int planes(int64_t bits, int (&widths)[2]) {
  widths[0] = bits == 3 ? 2 : bits;
  widths[1] = 1;
  return bits == 3 ? 2 : 1;
}

// Keys: a row is a channel and a group runs along tokens, so lanes are channels.
static void key_page(const Quantization& q, int16_t* words, uint16_t* scales_out, Scratch& scratch) {
  const int64_t dim = q.dim, count = q.groups * dim;
  const float levels = (1 << q.bits) - 1;
  float* scales = scratch.scales.data();
  for (int64_t g = 0; g < q.groups; g++)
    for (int64_t d = 0; d < dim; d += W) {
      Range range;
      for (int64_t t = g * q.group; t < (g + 1) * q.group && t < q.page; t++)
        range.add(load<vf>(scratch.page.data() + t * dim + d));
      store(scales + g * dim + d, raw_scale(range.low, range.high, range.poison, levels));
      store(scales + count + g * dim + d, range.low + splat(0.0f));  // -0 becomes 0, as in naive.py
    }
  finish_scales(q, count, scales, scales_out);
  int32_t *codes = scratch.codes.data(), *packed = scratch.packed.data();
  for (int64_t t = 0; t < q.page; t++) {
    const float* of_group = scales + t / q.group * dim;
    for (int64_t d = 0; d < dim; d += W)
      store(codes + d, code(load<vf>(scratch.page.data() + t * dim + d), load<vf>(of_group + count + d),
                            load<vf>(of_group + 2 * count + d), levels));
    int widths[2], shift = 0;
    int16_t* row = words + t;
    for (int p = 0, n = planes(q.bits, widths); p < n; shift += widths[p], p++) {
      const int64_t rows = dim * widths[p] / 16;
      for (int64_t c = 0; c < rows; c++) packed[c] = 0;
      for (int field = 0; field < 16 / widths[p]; field++)
        for (int64_t c = 0; c < rows; c++)
          packed[c] |= ((codes[field * rows + c] >> shift) & ((1 << widths[p]) - 1)) << (field * widths[p]);
      for (int64_t c = 0; c < rows; c++, row += q.page) *row = static_cast<int16_t>(packed[c]);
    }
  }
}

// Values: a row is a token and a group runs along channels, so lanes are the elements of a group.
static void value_page(const Quantization& q, int16_t* words, uint16_t* scales_out, Scratch& scratch) {
  const int64_t dim = q.dim, count = q.groups * q.page;
  const float levels = (1 << q.bits) - 1;
  float* scales = scratch.scales.data();
  for (int64_t t = 0; t < q.page; t++)
    for (int64_t g = 0; g < q.groups; g++) {
      Range range;
      for (int64_t d = g * q.group; d < (g + 1) * q.group && d < dim; d += W)
        range.add(load<vf>(scratch.page.data() + t * dim + d));
      const float low = -largest(-range.low), high = largest(range.high), poison = sum(range.poison);
      scales[g * q.page + t] = raw_scale(splat(low), splat(high), splat(poison), levels)[0];
      scales[count + g * q.page + t] = low + 0.0f;
    }
  finish_scales(q, count, scales, scales_out);
  std::memset(words, 0, q.page * q.bits / 16 * dim * sizeof(int16_t));
  int32_t* codes = scratch.codes.data();
  for (int64_t t = 0; t < q.page; t++) {
    for (int64_t d = 0; d < dim; d += W) {
      const float* of_group = scales + d / q.group * q.page + t;
      store(codes + d, code(load<vf>(scratch.page.data() + t * dim + d), splat(of_group[count]),
                            splat(of_group[2 * count]), levels));
    }
    int widths[2], shift = 0;
    int16_t* plane = words;
    for (int p = 0, n = planes(q.bits, widths); p < n; shift += widths[p], p++) {
      const int64_t rows = q.page * widths[p] / 16;
      int16_t* row = plane + t % rows * dim;
      const int mask = (1 << widths[p]) - 1, field = t / rows * widths[p];
      for (int64_t d = 0; d < dim; d++) row[d] |= static_cast<int16_t>(((codes[d] >> shift) & mask) << field);
      plane += rows * dim;
    }
  }
}

void quantize(const Quantization& q) {
  const int64_t rows = q.is_key ? q.dim : q.page;
#pragma omp parallel num_threads(q.threads)
  {
    Scratch scratch;
    scratch.page.resize(q.page * q.dim);
    scratch.scales.resize(3 * q.groups * rows);
    scratch.codes.resize(q.dim);
    scratch.packed.resize(q.dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < q.batch * q.heads * q.count; i++) {
      const int64_t page = i % q.count, h = i / q.count % q.heads, b = i / q.count / q.heads;
      const int64_t* from = q.pages_strides;
      const int64_t size = q.dtype == FLOAT32 ? 4 : 2;
      read_page(q, static_cast<const char*>(q.pages) + size * (b * from[0] + h * from[1] + page * from[2]),
                scratch.page.data());
      int16_t* words = q.words + b * q.words_strides[0] + h * q.words_strides[1] + page * q.words_strides[2];
      uint16_t* scales = static_cast<uint16_t*>(q.scales) + b * q.scales_strides[0] + h * q.scales_strides[1] +
                         page * q.scales_strides[2];
      q.is_key ? key_page(q, words, scales, scratch) : value_page(q, words, scales, scratch);
    }
  }
}

}  // namespace KVMIX_ISA
