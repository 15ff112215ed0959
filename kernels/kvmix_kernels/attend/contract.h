// Codes times coefficients, for one packed page.
//
// A page is a matrix [rows, columns] whose rows are contracted: q·k sums over channels, p·v over tokens. With scales
// s and zeros z of a group of columns,
//
//     sum_n a_n (code_nm s_n + z_n)  =  sum_n (a_n s_n) code_nm  +  sum_n a_n z_n
//
// so scales fold into the coefficients once a group, and codes are multiplied as the small integers they are. Packed
// bytes are read once for R query rows, which share a KV head.
#pragma once
#include <cmath>
#include <new>
#include <vector>

#include "../runtime/native/simd.h"
#include "cpu.h"

namespace KVMIX_ISA {

// Memory in which no vector lies across two cache lines.
template <class T> struct Aligned {
  typedef T value_type;
  static constexpr std::align_val_t LINE{64};

  Aligned() = default;
  template <class U> Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T> using Array = std::vector<T, Aligned<T>>;

// One thread's working memory, kept from call to call.
struct Scratch {
  Array<float> query, scores, sorted, scales, folded, turned, sums, products;
  Array<int16_t> rounded;
  Array<int32_t> words;
  Array<uint8_t> run, codes;
};

static inline int64_t offset_of(const int64_t* strides, int64_t i, int64_t j, int64_t k) {
  return i * strides[0] + j * strides[1] + k * strides[2];
}

// The coefficients of a group, with its scales folded in: [R][rows], in float32 and rounded to 16 bits.
//
// One 16-bit multiply-add does the work of four float32 ones for two codes, so it is what the inner loop uses. Rounding
// a coefficient to 1/32767 of its row's largest moves the result by about 1.5e-4 of it (relative RMS).
template <int R> struct Coefficients {
  float* exact;
  int16_t* rounded;
  float unit[R];    // what 1 stands for in `rounded`
  float offset[R];  // to be added to every column
};

// Whether word rows come in pairs, of which a 16-bit multiply-add does both.
template <int BITS> static inline bool paired(int rows) {
  return BITS == 3 ? rows % 32 == 0 : rows * BITS / 16 % 2 == 0;
}

// folded[r][n] = a[r][n] * scale[n] and offset[r] = sum_n a[r][n] * zero[n].
template <int R>
static inline void fold(const float* const* a, const float* scale, const float* zero, int rows, int levels,
                        Coefficients<R>& out) {
  // The largest integer leaves room for the sum over all rows.
  const double room = 2147483647.0 / (double(rows) * levels);
  const float top = room < 32767.0 ? float(std::floor(room)) : 32767.0f;
  vf sums[R] = {}, most[R] = {}, inverse[R];
  for (int n = 0; n < rows; n += W) {
    const vf scales = load<vf>(scale + n), zeros = load<vf>(zero + n);
    for (int r = 0; r < R; r++) {
      const vf x = load<vf>(a[r] + n), y = x * scales;
      store(out.exact + r * rows + n, y);
      sums[r] += x * zeros;
      most[r] = larger(most[r], magnitude(y));
    }
  }
  for (int r = 0; r < R; r++) {
    const float peak = largest(most[r]);
    inverse[r] = splat(peak > 0 ? top / peak : 0.0f);
    out.offset[r] = sum(sums[r]);
    out.unit[r] = peak / top;
  }
  for (int n = 0; n < rows; n += W)
    for (int r = 0; r < R; r++) {
      const vf scaled = load<vf>(out.exact + r * rows + n) * inverse[r];
      store(out.rounded + r * rows + n, __builtin_convertvector(nearest(scaled), vs));
    }
}

// Code `j` of a word, and for three bits with its high bit from the second plane.
template <int BITS> static inline vi field(vi word, vi high, int j, int half) {
  if (BITS != 3) return (word >> (j * BITS)) & ((1 << BITS) - 1);
  return ((word >> (2 * j)) & 3) | (((high >> (2 * j + half)) & 1) << 2);
}

// acc[r] += sum_n a[r][n] * code[n][column..] over W columns, in float32. For what does not come in pairs: an odd
// number of word rows, or fewer columns than two vectors hold.
//
// Field j of word row c is row j * words + c. Three bits are a plane of two and a plane of one: word row c of the low
// plane shares its high bits' word with word row c + words / 2.
template <int BITS, int R>
static void contract_exact(const int16_t* words_at, int64_t columns, int rows, const float* a, vf (&acc)[R]) {
  constexpr int FIELDS = BITS == 3 ? 8 : 16 / BITS;
  const int count = rows / FIELDS, half_count = rows / 16;
  for (int c = 0; c < count; c++) {
    const int half = BITS == 3 ? c / half_count : 0;
    const vi word = words(words_at + c * columns);
    const vi high = BITS == 3 ? words(words_at + (count + c % half_count) * columns) : vi{};
    for (int j = 0; j < FIELDS; j++) {
      const vf code = __builtin_convertvector(field<BITS>(word, high, j, half), vf);
      for (int r = 0; r < R; r++) acc[r] += a[r * rows + j * count + c] * code;
    }
  }
}

// acc[r][v] += sum_n a[r][n] * code[n][column..] over pairs of word rows, 2 W columns.
//
// They are read with a stride that the hardware does not see through, so as many words from `next` on are asked for now.
template <int BITS, int R>
static inline void contract_pairs(const int16_t* words_at, int64_t columns, const int16_t* next, int rows,
                                  const int16_t* a, vi (&acc)[R][2]) {
  constexpr int LOW = BITS == 3 ? 2 : BITS, FIELDS = 16 / LOW, TOGETHER = FIELDS < 4 ? FIELDS : 4;
  constexpr int16_t MASK = (1 << LOW) - 1;
  const int count = rows / FIELDS, half_count = count / 2;
  const int16_t* high_plane = words_at + count * columns;  // of three bits
#pragma GCC unroll 4
  for (int first = 0; first < FIELDS; first += TOGETHER) {
    const int16_t* pairs[R];
    for (int r = 0; r < R; r++) pairs[r] = a + r * rows + first * count;
    const int64_t offsets[] = {0, count, 2 * count, opaque(3 * int64_t(count))};
    for (int c = 0; c < count; c += 2) {
      vw word[2], high[2];
      interleave(load<vw>(words_at + c * columns), load<vw>(words_at + (c + 1) * columns), word[0], word[1]);
      if (first == 0)
        for (int i = 0; i < (BITS == 3 ? 3 : 2); i++, next += 2 * W) __builtin_prefetch(next);
      if (BITS == 3) {
        const int half = c >= half_count;
        const int16_t* plane = high_plane + (c - half * half_count) * columns;
        interleave(load<vw>(plane) >> half, load<vw>(plane + columns) >> half, high[0], high[1]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < TOGETHER; j++) {
        const int shift = (first + j) * LOW;
        vw code[2];
        for (int v = 0; v < 2; v++) {
          code[v] = (word[v] >> shift) & MASK;
          if (BITS == 3) code[v] |= (shift ? high[v] >> (shift - 2) : high[v] << 2) & int16_t(4);
        }
        for (int r = 0; r < R; r++) {
          const vw pair = (vw)(vi{} + load<int32_t>(pairs[r] + offsets[j]));
          for (int v = 0; v < 2; v++) add_products(acc[r][v], code[v], pair);
        }
      }
      for (int r = 0; r < R; r++) pairs[r] = opaque(pairs[r] + 2);
    }
  }
}

// out[r][column] (+)= contraction + offset[r], over `columns_here` columns of one group.
template <int BITS, int R>
static void contract_group(const int16_t* words_at, int64_t columns, int64_t columns_here, const int16_t* next, int rows,
                           const Coefficients<R>& a, float* const* out, bool add) {
  int64_t m = 0;
  if (paired<BITS>(rows))
    for (; m + 2 * W <= columns_here; m += 2 * W) {
      vi acc[R][2] = {};
      contract_pairs<BITS, R>(words_at + m, columns, next + m * (rows * BITS / 16), rows, a.rounded, acc);
      for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) {
          float* at = out[r] + m + v * W;
          const vf before = add ? load<vf>(at) : vf{};
          store(at, before + (__builtin_convertvector(acc[r][v], vf) * a.unit[r] + a.offset[r]));
        }
    }
  for (; m < columns_here; m += W) {
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = add ? load<vf>(out[r] + m) + a.offset[r] : splat(a.offset[r]);
    contract_exact<BITS, R>(words_at + m, columns, rows, a.exact, acc);
    for (int r = 0; r < R; r++) store(out[r] + m, acc[r]);
  }
}

// Scales in float32; there is a multiple of 16 of them, as of a page's rows.
static inline void widen(const uint16_t* source, int64_t dtype, int64_t count, int64_t ahead, float* out) {
  for (int64_t i = 0; i < count; i += W) {
    __builtin_prefetch(source + i + ahead);
    store(out + i, dtype == FLOAT16 ? read<FLOAT16>(source, i) : read<BFLOAT16>(source, i));
  }
}

// out[r] (+)= a[r] · page, for one page of a run of keys whose tokens have scales of their own. These do not fold into the
// coefficients, so they are met by what the codes amount to.
template <int BITS, int R>
static void score_page(const Run& x, int64_t b, int64_t h, int64_t place, int64_t ahead, int rows,
                       int64_t columns, const float* const* a, float* const* out, bool add, Scratch& scratch) {
  const int16_t* words_at = static_cast<const int16_t*>(x.data) + offset_of(x.data_strides, b, h, place);
  const uint16_t* scales_at = static_cast<const uint16_t*>(x.scales) + offset_of(x.scales_strides, b, h, place);
  scratch.scales.resize(2 * columns);
  scratch.sums.assign(rows, 1.0f);
  scratch.folded.resize(R * rows);
  scratch.rounded.resize(R * rows);
  scratch.products.resize(R * columns);
  Coefficients<R> coefficients{scratch.folded.data(), scratch.rounded.data(), {}, {}};
  fold<R>(a, scratch.sums.data(), scratch.sums.data(), rows, (1 << BITS) - 1, coefficients);
  float total[R], *products[R];
  for (int r = 0; r < R; r++) {
    total[r] = coefficients.offset[r], coefficients.offset[r] = 0;
    products[r] = scratch.products.data() + r * columns;
  }
  contract_group<BITS, R>(words_at, columns, columns, words_at + ahead * x.data_strides[2], rows, coefficients, products, false);
  widen(scales_at, x.dtype, 2 * columns, 0, scratch.scales.data());
  const float *scale = scratch.scales.data(), *zero = scale + columns;
  for (int r = 0; r < R; r++)
    for (int64_t t = 0; t < columns; t += W) {
      const vf before = add ? load<vf>(out[r] + t) : vf{};
      store(out[r] + t, before + (load<vf>(products[r] + t) * load<vf>(scale + t) + load<vf>(zero + t) * total[r]));
    }
}

// out[r] (+)= a[r] · page, for one page of a run; `a[r]` has `rows` floats, `out[r]` has `columns`. The page that is read
// next lies `ahead` pages behind this one in memory.
template <int BITS, int R>
static void contract_page(const Run& x, int64_t b, int64_t h, int64_t place, int64_t ahead, int rows,
                          int64_t columns, const float* const* a, float* const* out, bool add, Scratch& scratch) {
  const int64_t groups = (columns + x.group - 1) / x.group;
  const int16_t* words_at = static_cast<const int16_t*>(x.data) + offset_of(x.data_strides, b, h, place);
  const uint16_t* scales_at = static_cast<const uint16_t*>(x.scales) + offset_of(x.scales_strides, b, h, place);
  scratch.scales.resize(2 * groups * rows);
  scratch.folded.resize(R * rows);
  scratch.rounded.resize(R * rows);
  float* scales = scratch.scales.data();
  Coefficients<R> coefficients{scratch.folded.data(), scratch.rounded.data(), {}, {}};
  widen(scales_at, x.dtype, 2 * groups * rows, ahead * x.scales_strides[2], scales);
  for (int64_t g = 0; g < groups; g++) {
    float* group_out[R];
    for (int r = 0; r < R; r++) group_out[r] = out[r] + g * x.group;
    fold<R>(a, scales + g * rows, scales + (groups + g) * rows, rows, (1 << BITS) - 1, coefficients);
    const int64_t left = columns - g * x.group;
    const int16_t* next = words_at + ahead * x.data_strides[2] + g * x.group * (rows * BITS / 16);
    contract_group<BITS, R>(words_at + g * x.group, columns, left < x.group ? left : x.group, next, rows, coefficients,
                            group_out, add);
  }
}

}  // namespace KVMIX_ISA
