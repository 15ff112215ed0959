// Decode attention over packed pages on a CPU. Compiled once per instruction set; see native/build.py.
//
// A page is a matrix [rows, columns] whose rows are contracted: q·k sums over channels, p·v over tokens. With scales
// s and zeros z of a group of columns,
//
//     sum_n a_n (code_nm s_n + z_n)  =  sum_n (a_n s_n) code_nm  +  sum_n a_n z_n
//
// so scales fold into the coefficients once a group, and codes are multiplied as the small integers they are. Packed
// bytes are read once for up to ROWS query rows, which share a KV head.
#include "cpu.h"

#include <cmath>
#include <vector>

#include "../native/simd.h"

namespace KVMIX_ISA {

constexpr int ROWS = 4;            // query rows that share an unpacked code: as many as registers allow
constexpr int64_t MIN_SPLIT = 512; // tokens below which a thread is not worth its start
constexpr float NEVER = -INFINITY;

// Code `j` of a word, and for three bits with its high bit from the second plane.
template <int BITS> static inline vi field(vi word, vi high, int j, int half) {
  if (BITS != 3) return (word >> (j * BITS)) & ((1 << BITS) - 1);
  return ((word >> (2 * j)) & 3) | (((high >> (2 * j + half)) & 1) << 2);
}

// acc[r] += sum_n a[n][r] * code[n][column..] over W columns, in float32; `a` is [rows][R]. For what does not come in
// pairs: an odd number of word rows, or fewer columns than two vectors hold.
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
      for (int r = 0; r < R; r++) acc[r] += a[(j * count + c) * R + r] * code;
    }
  }
}

// The coefficients of a group, for R query rows: in float32, and rounded to 16 bits in pairs of contracted rows.
//
// One 16-bit multiply-add does the work of four float32 ones for two codes, so it is what the inner loop uses. Rounding
// a coefficient to 1/32767 of its row's largest moves the result by about 1.5e-4 of it (relative RMS).
template <int R> struct Coefficients {
  const float* exact;      // [rows][R]
  const int32_t* pairs;    // [fields][words / 2][R]: row `c` of a field, and row `c + words / 2`
  float unit[R];           // what 1 stands for in `pairs`
  float offset[R];         // to be added to every column
};

// acc[r][v] += sum_n a[n][r] * code[n][column..] over pairs of word rows, 2 W columns. `rows * bits / 16` must be even.
template <int BITS, int R>
static inline void contract_pairs(const int16_t* words_at, int64_t columns, int rows, const int32_t* pairs,
                                  vi (&acc)[R][2]) {
  constexpr int LOW = BITS == 3 ? 2 : BITS, FIELDS = 16 / LOW, TOGETHER = FIELDS < 4 ? FIELDS : 4;
  constexpr int16_t MASK = (1 << LOW) - 1;
  const int half = rows / FIELDS / 2;
  const int16_t* high_plane = words_at + 2 * half * columns;  // of three bits
#pragma GCC unroll 4
  for (int first = 0; first < FIELDS; first += TOGETHER) {
    const int32_t* coefficient[TOGETHER];
    for (int j = 0; j < TOGETHER; j++) coefficient[j] = pairs + (first + j) * half * R;
    for (int c = 0; c < half; c++) {
      vw word[2], high[2];
      interleave(load<vw>(words_at + c * columns), load<vw>(words_at + (c + half) * columns), word[0], word[1]);
      if (BITS == 3) {
        const vw plane = load<vw>(high_plane + c * columns);
        interleave(plane, plane >> 1, high[0], high[1]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < TOGETHER; j++) {
        const int shift = (first + j) * LOW;
        vw code[2];
        for (int v = 0; v < 2; v++) {
          code[v] = (word[v] >> shift) & MASK;
          if (BITS == 3) code[v] |= ((high[v] >> shift) & int16_t(1)) << 2;
        }
        for (int r = 0; r < R; r++) {
          const vw a = (vw)(vi{} + coefficient[j][c * R + r]);
          for (int v = 0; v < 2; v++) add_now(acc[r][v], multiply_pairs(code[v], a));
        }
      }
    }
  }
}

// out[r][column] (+)= contraction + offset[r], over `columns_here` columns of one group.
template <int BITS, int R>
static void contract_group(const int16_t* words_at, int64_t columns, int64_t columns_here, int rows,
                           const Coefficients<R>& a, float* const* out, bool add) {
  int64_t m = 0;
  if (a.pairs)
    for (; m + 2 * W <= columns_here; m += 2 * W) {
      vi acc[R][2] = {};
      contract_pairs<BITS, R>(words_at + m, columns, rows, a.pairs, acc);
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

// One thread's working memory, kept from call to call.
struct Scratch {
  std::vector<float> scores, rows, scales, coefficients;
  std::vector<int32_t> pairs;
};

// Scales in float32; there is a multiple of 16 of them, as of a page's rows.
static void widen(const void* source, int64_t dtype, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += W)
    store(out + i, dtype == FLOAT16 ? read<FLOAT16>(source, i) : read<BFLOAT16>(source, i));
}

// Element `i` is element `first + i / R` of `x`: each repeated for R query rows.
template <int R> static inline vf spread(vf x, int first) {
  vf out;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) out[i] = x[first + i / R];
  return out;
}

// folded[n][r] = a[n][r] * scale[n], offset[r] = sum_n a[n][r] * zero[n], and the largest |folded[:, r]|.
template <int R>
static void fold(const float* a, const float* scale, const float* zero, int rows, float* folded, float* offset,
                 float* largest_of) {
  for (int r = 0; r < R; r++) offset[r] = largest_of[r] = 0;
  if (W % R) {
    for (int n = 0; n < rows; n++)
      for (int r = 0; r < R; r++) {
        const float x = a[n * R + r] * scale[n];
        folded[n * R + r] = x;
        offset[r] += a[n * R + r] * zero[n];
        largest_of[r] = std::fmax(largest_of[r], std::fabs(x));
      }
    return;
  }
  vf sums[R] = {}, most[R] = {};
  for (int n = 0; n < rows; n += W) {
    const vf scales = load<vf>(scale + n), zeros = load<vf>(zero + n);
#pragma GCC unroll 4
    for (int k = 0; k < R; k++) {
      const vf x = load<vf>(a + n * R + k * W), y = x * spread<R>(scales, k * (W / R));
      store(folded + n * R + k * W, y);
      sums[k] += x * spread<R>(zeros, k * (W / R));
      most[k] = larger(most[k], y > vf{} ? y : -y);
    }
  }
  for (int k = 0; k < R; k++)
    for (int i = 0; i < W; i++) {
      offset[i % R] += sums[k][i];
      largest_of[i % R] = std::fmax(largest_of[i % R], most[k][i]);
    }
}

// Round folded coefficients to 16 bits and pair them up. The largest integer leaves room for the sum over all rows.
template <int R>
static void pair_up(const float* folded, const float* largest_of, int rows, int fields, int levels, int32_t* pairs,
                    float* unit) {
  const double room = 2147483647.0 / (double(rows) * levels);
  const float top = room < 32767.0 ? float(std::floor(room)) : 32767.0f;
  float inverse[R];
  for (int r = 0; r < R; r++) {
    unit[r] = largest_of[r] / top;
    inverse[r] = largest_of[r] > 0 ? top / largest_of[r] : 0.0f;
  }
  const int count = rows / fields / 2 * R;
  const auto rounded = [](vf x) { return __builtin_convertvector((x + splat(12582912.0f)) - splat(12582912.0f), vi); };
  vf factor = {};
  for (int i = 0; i < W; i++) factor[i] = inverse[i % R];
  for (int j = 0; j < fields; j++, folded += 2 * count, pairs += count) {
    int i = 0;
    if (W % R == 0)
      for (; i + W <= count; i += W) {
        const vi first = rounded(load<vf>(folded + i) * factor), second = rounded(load<vf>(folded + count + i) * factor);
        store(pairs + i, (first & 0xffff) | (second << 16));
      }
    for (; i < count; i++) {
      const int first = std::lrintf(folded[i] * inverse[i % R]), second = std::lrintf(folded[count + i] * inverse[i % R]);
      pairs[i] = (first & 0xffff) | int32_t(uint32_t(second) << 16);
    }
  }
}

// Columns are read with a stride that the hardware does not see through: ask for the next page while this one is used.
static void prefetch_page(const Segments& s, int64_t b, int64_t h, int64_t page) {
  const int16_t* words_at = s.words + b * s.words_strides[0] + h * s.words_strides[1] + page * s.words_strides[2];
  const int64_t count = s.page * s.dim * s.bits / 16;
  for (int64_t i = 0; i < count; i += 32) __builtin_prefetch(words_at + i);
}

// out[r] (+)= a[:, r] · page, for one page; `a` is [rows][R], `out[r]` has `columns` floats.
template <int BITS, int R>
static void contract_page(const Segments& s, int64_t b, int64_t h, int64_t page, bool is_key, const float* a,
                          float* const* out, Scratch& scratch) {
  constexpr int FIELDS = BITS == 3 ? 8 : 16 / BITS;
  const int rows = is_key ? s.dim : s.page;
  const int64_t columns = is_key ? s.page : s.dim;
  const int16_t* words_at = s.words + b * s.words_strides[0] + h * s.words_strides[1] + page * s.words_strides[2];
  const int64_t scales_at = b * s.scales_strides[0] + h * s.scales_strides[1] + page * s.scales_strides[2];
  scratch.scales.resize(2 * s.groups * rows);
  scratch.coefficients.resize(R * rows);
  scratch.pairs.resize(R * rows / 2);
  float* scales = scratch.scales.data();
  float* folded = scratch.coefficients.data();
  const bool paired = rows / FIELDS % 2 == 0;
  widen(static_cast<const uint16_t*>(s.scales) + scales_at, s.scale_dtype, 2 * s.groups * rows, scales);
  for (int64_t g = 0; g < s.groups; g++) {
    Coefficients<R> coefficients{folded, paired ? scratch.pairs.data() : nullptr, {}, {}};
    float largest_of[R];
    float* group_out[R];
    fold<R>(a, scales + g * rows, scales + (s.groups + g) * rows, rows, folded, coefficients.offset, largest_of);
    if (paired) pair_up<R>(folded, largest_of, rows, FIELDS, (1 << BITS) - 1, scratch.pairs.data(), coefficients.unit);
    for (int r = 0; r < R; r++) group_out[r] = out[r] + g * s.group;
    const int64_t left = columns - g * s.group;
    contract_group<BITS, R>(words_at + g * s.group, columns, left < s.group ? left : s.group, rows, coefficients,
                            group_out, !is_key);
  }
}

// out[r][t] = sum_d query[d][r] * x[t][d] over unquantized keys.
template <int DTYPE, int R>
static void dot_full(const void* x, int64_t stride, int64_t count, int64_t dim, const float* query, float* const* out,
                     Scratch& scratch) {
  scratch.coefficients.resize(R * dim);
  float* by_row = scratch.coefficients.data();
  for (int64_t d = 0; d < dim; d++)
    for (int r = 0; r < R; r++) by_row[r * dim + d] = query[d * R + r];
  for (int64_t t = 0; t < count; t++) {
    vf acc[R] = {};
    for (int64_t d = 0; d < dim; d += W) {
      vf k = read<DTYPE>(x, t * stride + d);
      for (int r = 0; r < R; r++) acc[r] += k * load<vf>(by_row + r * dim + d);
    }
    for (int r = 0; r < R; r++) out[r][t] = sum(acc[r]);
  }
}

// out[r][d] += sum_t weights[t][r] * x[t][d] over unquantized values.
template <int DTYPE, int R>
static void mix_full(const void* x, int64_t stride, int64_t count, int64_t dim, const float* weights,
                     float* const* out) {
  for (int64_t d = 0; d < dim; d += W) {
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = load<vf>(out[r] + d);
    for (int64_t t = 0; t < count; t++) {
      vf v = read<DTYPE>(x, t * stride + d);
      for (int r = 0; r < R; r++) acc[r] += weights[t * R + r] * v;
    }
    for (int r = 0; r < R; r++) store(out[r] + d, acc[r]);
  }
}

template <int DTYPE, int R>
static void full_part(bool is_key, const void* x, int64_t offset, int64_t stride, int64_t count, int64_t dim,
                      const float* in, float* const* out, Scratch& scratch) {
  const char* at = static_cast<const char*>(x) + offset * (DTYPE == FLOAT32 ? 4 : 2);
  if (is_key)
    dot_full<DTYPE, R>(at, stride, count, dim, in, out, scratch);
  else
    mix_full<DTYPE, R>(at, stride, count, dim, in, out);
}

// Tokens [start, stop) of keys (`in` = queries [dim][R], `out[r]` = scores from `start`) or of values (`in` = weights
// [tokens from start][R], `out[r]` = accumulators [dim]). The range meets packed pages on their edges only.
template <int R> struct Pass {
  const Segments& s;
  const int64_t b, h, start, stop;
  const bool is_key;
  const float* const in;
  float* const* const out;
  Scratch& scratch;

  void run() const {
    const int64_t packed_end = s.sinks + s.pages * s.page;
    full(s.sink, s.sink_strides, 0, start, least(stop, s.sinks));
    packed(most(start, s.sinks), least(stop, packed_end));
    full(s.tail, s.tail_strides, packed_end, most(start, packed_end), stop);
  }

 private:
  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

  // Input and outputs for the tokens from `token` on.
  const float* from(int64_t token, float** out_at) const {
    for (int r = 0; r < R; r++) out_at[r] = is_key ? out[r] + (token - start) : out[r];
    return is_key ? in : in + (token - start) * R;
  }

  void full(const void* x, const int64_t* strides, int64_t origin, int64_t first, int64_t last) const {
    if (first >= last) return;
    float* out_at[R];
    const float* in_at = from(first, out_at);
    const int64_t offset = b * strides[0] + h * strides[1] + (first - origin) * strides[2], count = last - first;
    switch (s.dtype) {
      case FLOAT32: full_part<FLOAT32, R>(is_key, x, offset, strides[2], count, s.dim, in_at, out_at, scratch); break;
      case FLOAT16: full_part<FLOAT16, R>(is_key, x, offset, strides[2], count, s.dim, in_at, out_at, scratch); break;
      default: full_part<BFLOAT16, R>(is_key, x, offset, strides[2], count, s.dim, in_at, out_at, scratch);
    }
  }

  void packed(int64_t first, int64_t last) const {
    switch (s.bits) {
      case 1: return pages<1>(first, last);
      case 2: return pages<2>(first, last);
      case 3: return pages<3>(first, last);
      case 4: return pages<4>(first, last);
      case 8: return pages<8>(first, last);
    }
  }

  template <int BITS> void pages(int64_t first, int64_t last) const {
    for (int64_t token = first; token < last; token += s.page) {
      if (token + s.page < last) prefetch_page(s, b, h, (token - s.sinks) / s.page + 1);
      float* out_at[R];
      const float* in_at = from(token, out_at);
      contract_page<BITS, R>(s, b, h, (token - s.sinks) / s.page, is_key, in_at, out_at, scratch);
    }
  }
};

// Soft-cap, mask and exponential of one row of scores, in place. Returns the maximum and the sum of weights.
static void softmax_row(const Attention& x, int64_t b, int64_t head, int64_t row, int64_t start, int64_t stop,
                        float* scores, float* maximum, float* total) {
  const int64_t count = stop - start;
  if (x.softcap > 0)
    for (int64_t t = 0; t < count; t++) scores[t] = x.softcap * std::tanh(scores[t] / x.softcap);
  if (x.mask) {
    const int64_t at = b * x.mask_strides[0] + head * x.mask_strides[1] + row * x.mask_strides[2];
    if (x.mask_is_bool) {
      const uint8_t* mask = static_cast<const uint8_t*>(x.mask) + at + start * x.mask_strides[3];
      for (int64_t t = 0; t < count; t++) scores[t] = mask[t * x.mask_strides[3]] ? scores[t] : NEVER;
    } else {
      const float* mask = static_cast<const float*>(x.mask) + at + start * x.mask_strides[3];
      for (int64_t t = 0; t < count; t++) scores[t] += mask[t * x.mask_strides[3]];
    }
  } else {
    const int64_t seen = x.tokens - x.queries + row + 1;
    for (int64_t t = seen > start ? seen : start; t < stop; t++) scores[t - start] = NEVER;
  }
  for (int64_t t = count; t % W; t++) scores[t] = NEVER;
  vf most = splat(NEVER);
  for (int64_t t = 0; t < count; t += W) most = larger(most, load<vf>(scores + t));
  *maximum = largest(most);
  const vf shift = splat(*maximum == NEVER ? 0.0f : *maximum);
  vf sums = {};
  for (int64_t t = 0; t < count; t += W) {
    vf score = load<vf>(scores + t);
    vf weight = exp_negative(score - shift);
    weight = score == splat(NEVER) ? vf{} : weight;
    store(scores + t, weight);
    sums += weight;
  }
  *total = sum(sums);
}

// One KV head, R query rows, tokens [start, stop): unnormalised output, maximum and sum of each row.
template <int R>
static void attend_rows(const Attention& x, int64_t b, int64_t h, int64_t first_row, int64_t start, int64_t stop,
                        float* partial, Scratch& scratch) {
  const int64_t ratio = x.heads / x.kv_heads, dim = x.key.dim, out_dim = x.value.dim, count = stop - start;
  const int64_t room = (count + W) / W * W;
  scratch.scores.resize(R * room);
  scratch.rows.resize(R * (count > dim ? count : dim));
  const float* query = x.query + ((b * x.heads + h * ratio) * x.queries + first_row) * dim;
  float* rows = scratch.rows.data();
  float *scores[R], *output[R];
  for (int r = 0; r < R; r++) {
    scores[r] = scratch.scores.data() + r * room;
    output[r] = partial + r * (out_dim + 2);
    for (int64_t d = 0; d < dim; d++) rows[d * R + r] = query[r * dim + d];
    for (int64_t d = 0; d < out_dim; d++) output[r][d] = 0;
  }
  Pass<R>{x.key, b, h, start, stop, true, rows, scores, scratch}.run();
  for (int r = 0; r < R; r++) {
    const int64_t head = h * ratio + (first_row + r) / x.queries, row = (first_row + r) % x.queries;
    softmax_row(x, b, head, row, start, stop, scores[r], output[r] + out_dim, output[r] + out_dim + 1);
  }
  for (int64_t t = 0; t < count; t++)
    for (int r = 0; r < R; r++) rows[t * R + r] = scores[r][t];
  Pass<R>{x.value, b, h, start, stop, false, rows, output, scratch}.run();
}

static void attend_some(int rows, const Attention& x, int64_t b, int64_t h, int64_t first_row, int64_t start,
                        int64_t stop, float* partial, Scratch& scratch) {
  switch (rows) {
    case 1: attend_rows<1>(x, b, h, first_row, start, stop, partial, scratch); break;
    case 2: attend_rows<2>(x, b, h, first_row, start, stop, partial, scratch); break;
    case 3: attend_rows<3>(x, b, h, first_row, start, stop, partial, scratch); break;
    default: attend_rows<4>(x, b, h, first_row, start, stop, partial, scratch); break;
  }
}

// Merge the splits of one row by their maxima and sums (log-sum-exp), with the head's sink logit if it has one.
static void merge_row(const Attention& x, int64_t head, const float* partial, int64_t stride, int64_t splits,
                      float* output) {
  const int64_t dim = x.value.dim;
  float most = x.sink_logits ? x.sink_logits[head] : NEVER;
  for (int64_t s = 0; s < splits; s++) most = std::fmax(most, partial[s * stride + dim]);
  float total = x.sink_logits ? std::exp(x.sink_logits[head] - most) : 0.0f;
  for (int64_t d = 0; d < dim; d++) output[d] = 0;
  if (most == NEVER) return;
  for (int64_t s = 0; s < splits; s++) {
    const float* part = partial + s * stride;
    const float share = std::exp(part[dim] - most);
    if (share == 0) continue;
    total += share * part[dim + 1];
    for (int64_t d = 0; d < dim; d++) output[d] += share * part[d];
  }
  for (int64_t d = 0; d < dim; d++) output[d] /= total;
}

// Token ranges that threads share out: on page edges, as many as keep all threads busy.
static std::vector<int64_t> split_tokens(const Attention& x, int64_t tasks) {
  const Segments& packed = x.key.pages ? x.key : x.value;
  const int64_t step = packed.pages ? packed.page : 16;
  int64_t splits = tasks % x.threads == 0 ? 1 : (4 * x.threads + tasks - 1) / tasks;
  const int64_t most = x.tokens / MIN_SPLIT;
  splits = splits < most ? splits : (most > 1 ? most : 1);
  std::vector<int64_t> edges{0};
  for (int64_t i = 1; i < splits; i++) {
    const int64_t near = x.tokens * i / splits;
    const int64_t edge = packed.sinks + (near - packed.sinks) / step * step;
    if (edge > edges.back() && edge < x.tokens) edges.push_back(edge);
  }
  edges.push_back(x.tokens);
  return edges;
}

void attend(const Attention& x) {
  const int64_t rows = x.heads / x.kv_heads * x.queries, stride = x.value.dim + 2;
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  const int64_t tasks = x.batch * x.kv_heads * blocks;
  const std::vector<int64_t> edges = split_tokens(x, tasks);
  const int64_t splits = edges.size() - 1;
  static thread_local std::vector<float> partials;
  partials.resize(x.batch * x.kv_heads * rows * splits * stride + ROWS * stride);
  float* partial = partials.data();
#pragma omp parallel num_threads(x.threads)
  {
    static thread_local Scratch scratch;
    std::vector<float> block_out(ROWS * stride);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks * splits; task++) {
      const int64_t split = task % splits, block = task / splits % blocks, head = task / splits / blocks;
      const int64_t first = block * ROWS, count = rows - first < ROWS ? rows - first : ROWS;
      attend_some(count, x, head / x.kv_heads, head % x.kv_heads, first, edges[split], edges[split + 1],
                  block_out.data(), scratch);
      for (int64_t r = 0; r < count; r++)
        std::memcpy(partial + ((head * rows + first + r) * splits + split) * stride, block_out.data() + r * stride,
                    stride * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < x.batch * x.kv_heads * rows; row++)
      merge_row(x, row / x.queries % x.heads, partial + row * splits * stride, stride, splits,
                x.output + row * x.value.dim);
  }
}

}  // namespace KVMIX_ISA
