// Quantize and pack whole pages on a CPU: bit for bit what naive.py makes. Compiled once per instruction set, without
// contracted multiply-adds, which would round elsewhere.
#include "cpu.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "grids.h"

namespace KVMIX_ISA {

struct Scratch {
  std::vector<float> page, scales;    // [page][dim]; scale, zero and 1 / scale, each [groups][rows]
  std::vector<int32_t> codes, packed; // of one token
  std::vector<float> turned;          // a page of values as [dim][page]; only for fitting
  std::vector<vf> tree;               // two trees of sums; only for fitting
};

static void read_page(const Quantization& q, const void* from, float* page) {
  for (int64_t t = 0; t < q.page; t++)
    for (int64_t d = 0; d < q.dim; d += W) {
      const int64_t at = t * q.pages_strides[3] + d;
      vf x = q.dtype == FLOAT32 ? read<FLOAT32>(from, at) : q.dtype == FLOAT16 ? read<FLOAT16>(from, at) : read<BFLOAT16>(from, at);
      store(page + t * q.dim + d, x);
    }
}

// Round scale and zero to how they are stored, and read them back for the codes.
static void finish_scales(const Quantization& q, int64_t count, float* scales, uint16_t* out) {
  float *scale = scales, *zero = scales + count, *inverse = scales + 2 * count;
  for (int64_t i = 0; i < count; i += W)
    for (float* x : {scale, zero}) {
      uint16_t* stored = out + (x - scales) + i;
      store(stored, to_stored(q.scale_dtype, load<vf>(x + i)));
      store(x + i, from_stored(q.scale_dtype, stored));
    }
  for (int64_t i = 0; i < count; i += W) store(inverse + i, reciprocal(load<vf>(scale + i)));
}

// Where a search starts (share of the range, share below it), and how often each start is refitted: as in grids.py.
constexpr float CLIPS[4][2] = {{1.0f, 0.0f}, {0.85f, 0.075f}, {0.7f, 0.15f}, {0.55f, 0.225f}};
constexpr int SEARCH_STEPS = 2;

// W groups of at least two elements, one a lane: element i of each is at `x + i * stride`. Defined in grids.py.
struct Groups {
  struct Grid {
    vf scale, zero;

    // `half_to_float` makes finite numbers above the largest float16 of infinity and NaN.
    vi is_finite(int64_t dtype) const {
      const vf most = splat(dtype == FLOAT16 ? 65504.0f : FLT_MAX);
      return (magnitude(scale) <= most) & (magnitude(zero) <= most);
    }
    Grid where(vi condition, const Grid& other) const {
      return {condition ? scale : other.scale, condition ? zero : other.zero};
    }
  };

  // Sums over the codes of a grid: of codes and their squares, of code times element, and of squared errors.
  struct Sums {
    vi q = {}, qq = {};
    vf qx = {}, error = {};
  };

  const Quantization& q;
  const float* x;
  const int64_t stride, n;
  vf* const tree;  // 2 * half() vectors
  const float levels;
  vf low = splat(INFINITY), high = splat(-INFINITY), sum_x = {};

  Groups(const Quantization& q, const float* x, int64_t stride, int64_t n, vf* tree)
      : q(q), x(x), stride(stride), n(n), tree(tree), levels((1 << q.bits) - 1) {
    for (int64_t i = 0; i < n; i++) {
      low = at(i) < low ? at(i) : low;
      high = at(i) > high ? at(i) : high;
    }
    low += splat(0.0f);
    vf nothing = {};
    add_up(sum_x, nothing, [&](int64_t i, vf& first, vf&) { first = at(i) - low; });
  }

  vf at(int64_t i) const { return load<vf>(x + i * stride); }

  // Half of n rounded up to a power of two.
  static int64_t half(int64_t n) {
    int64_t length = 1;
    while (2 * length < n) length *= 2;
    return length;
  }

  // Two sums of n terms in the order of `tree_sum`: `terms(i, first, second)` sets the i-th of both.
  template <class Terms> void add_up(vf& first, vf& second, Terms terms) const {
    int64_t length = half(n);
    vf* others = tree + length;
    for (int64_t i = 0; i < length; i++) {
      vf a = {}, b = {}, c = {}, d = {};
      terms(i, a, b);
      if (i + length < n) terms(i + length, c, d);
      tree[i] = a + c, others[i] = b + d;
    }
    while (length > 1) {
      length /= 2;
      for (int64_t i = 0; i < length; i++) tree[i] += tree[i + length], others[i] += others[i + length];
    }
    first = tree[0], second = others[0];
  }

  Grid grid(vf scale, vf zero) const {
    const vh stored[] = {to_stored(q.scale_dtype, scale < splat(TINY_SCALE) ? vf{} : scale), to_stored(q.scale_dtype, zero + splat(0.0f))};
    return {from_stored(q.scale_dtype, &stored[0]), from_stored(q.scale_dtype, &stored[1])};
  }

  Sums sums(const Grid& grid) const {
    const vf inverse = reciprocal(grid.scale);
    vi sum_q = {}, sum_qq = {};
    Sums s;
    add_up(s.qx, s.error, [&](int64_t i, vf& product, vf& square) {
      const vf element = at(i), code = whole_code(element, grid.zero, inverse, levels);
      sum_q += __builtin_convertvector(code, vi);
      sum_qq += __builtin_convertvector(code * code, vi);
      product = code * (element - low);
      const vf error = code * grid.scale + grid.zero - element;
      square = error * error;
    });
    s.q = sum_q, s.qq = sum_qq;
    return s;
  }

  // The least-squares grid for the codes of a grid, or that grid where there is none.
  Grid step(const Grid& from, const Sums& s) const {
    vf spread;
    for (int i = 0; i < W; i++) {
      const int64_t sum_q = s.q[i], sum_qq = s.qq[i];
      spread[i] = static_cast<float>(n * sum_qq - sum_q * sum_q);
    }
    const vf count = splat(n), sum_q = __builtin_convertvector(s.q, vf);
    const vf scale = grid((count * s.qx - sum_q * sum_x) / spread, low).scale;
    const Grid refitted = grid(scale, low + (sum_x - scale * sum_q) / count);
    return refitted.where((spread > vf{}) & (scale > vf{}) & refitted.is_finite(q.scale_dtype), from);
  }

  Grid search(const Grid& minmax) const {
    Grid best = minmax;
    vf least = splat(INFINITY);
    for (const auto& clip : CLIPS) {
      Grid now = grid((high - low) * splat(clip[0]) / splat(levels), low + (high - low) * splat(clip[1]));
      Sums s;
      for (int i = 0; i <= SEARCH_STEPS; i++) {
        if (i) now = step(now, s);
        s = sums(now);
        best = now.where(s.error < least, best);
        least = s.error < least ? s.error : least;
      }
    }
    return best;
  }
};

// Replace the scales of min and max, as they are stored, by those of another encoder. `matrix` is [columns][rows].
static void fit_scales(const Quantization& q, const float* matrix, int64_t columns, int64_t rows, Scratch& scratch,
                       uint16_t* out) {
  const int64_t count = q.groups * rows;
  float *scale = scratch.scales.data(), *zero = scale + count, *inverse = zero + count;
  for (int64_t i = 0; i < count; i += W) {
    const int64_t first = i / rows * q.group, n = std::min(q.group, columns - first);
    const Groups groups(q, matrix + first * rows + i % rows, rows, n, scratch.tree.data());
    const Groups::Grid minmax = {load<vf>(scale + i), load<vf>(zero + i)};
    const Groups::Grid fitted = q.encoder == REFIT ? groups.step(minmax, groups.sums(minmax)) : groups.search(minmax);
    const vi is_finite = minmax.is_finite(q.scale_dtype);
    const Groups::Grid kept = fitted.where(is_finite, minmax);
    store(scale + i, kept.scale), store(zero + i, kept.zero), store(inverse + i, reciprocal(kept.scale));
    const vh change = __builtin_convertvector(is_finite, vh);  // NaN stays as it is: `from_stored` may lose it
    for (uint16_t* at : {out + i, out + count + i}) {
      const vh fit = to_stored(q.scale_dtype, at == out + i ? kept.scale : kept.zero);
      store(at, (fit & change) | (load<vh>(at) & ~change));
    }
  }
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
  if (q.encoder != MINMAX) fit_scales(q, scratch.page.data(), q.page, dim, scratch, scales_out);
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
  if (q.encoder != MINMAX) {
    for (int64_t first = 0; first < dim; first += 16)  // 16 channels at a time stay in the first cache
      for (int64_t t = 0; t < q.page; t++)
        for (int64_t d = first; d < first + 16; d++) scratch.turned[d * q.page + t] = scratch.page[t * dim + d];
    fit_scales(q, scratch.turned.data(), dim, q.page, scratch, scales_out);
  }
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
    if (q.encoder != MINMAX) {
      scratch.turned.resize(q.is_key ? 0 : q.page * q.dim);
      scratch.tree.resize(2 * Groups::half(q.group));
    }
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
