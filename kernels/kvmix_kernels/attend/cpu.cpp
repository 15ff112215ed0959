// Decode attention over sink | packed pages | tail on a CPU. Compiled once per instruction set; see native/build.py.
#include "cpu.h"

#include <cmath>
#include <vector>

#include "../native/simd.h"
#include "contract.h"

namespace KVMIX_ISA {

constexpr int ROWS = 4;              // query rows that share an unpacked code: as many as registers allow
constexpr int64_t MIN_SPLIT = 512;   // tokens below which a thread is not worth its start
constexpr int64_t MAX_SPLIT = 2048;  // tokens whose scores stay in a core's own cache
constexpr float NEVER = -INFINITY;

// out[r][t] = sum_d query[r][d] * x[t][d] over unquantized keys.
template <int DTYPE, int R>
static void dot_full(const void* x, int64_t stride, int64_t count, int64_t dim, const float* const* query,
                     float* const* out) {
  for (int64_t t = 0; t < count; t++) {
    vf acc[R] = {};
    for (int64_t d = 0; d < dim; d += W) {
      const vf k = read<DTYPE>(x, t * stride + d);
      for (int r = 0; r < R; r++) acc[r] += k * load<vf>(query[r] + d);
    }
    for (int r = 0; r < R; r++) out[r][t] = sum(acc[r]);
  }
}

// out[r][d] += sum_t weights[r][t] * x[t][d] over unquantized values.
template <int DTYPE, int R>
static void mix_full(const void* x, int64_t stride, int64_t count, int64_t dim, const float* const* weights,
                     float* const* out) {
  for (int64_t d = 0; d < dim; d += W) {
    vf acc[R];
    for (int r = 0; r < R; r++) acc[r] = load<vf>(out[r] + d);
    for (int64_t t = 0; t < count; t++) {
      const vf v = read<DTYPE>(x, t * stride + d);
      for (int r = 0; r < R; r++) acc[r] += weights[r][t] * v;
    }
    for (int r = 0; r < R; r++) store(out[r] + d, acc[r]);
  }
}

template <int DTYPE, int R>
static void full_part(bool is_key, const void* x, int64_t offset, int64_t stride, int64_t count, int64_t dim,
                      const float* const* in, float* const* out) {
  const char* at = static_cast<const char*>(x) + offset * (DTYPE == FLOAT32 ? 4 : 2);
  if (is_key)
    dot_full<DTYPE, R>(at, stride, count, dim, in, out);
  else
    mix_full<DTYPE, R>(at, stride, count, dim, in, out);
}

// Tokens [start, stop) of keys (`in[r]` = query [dim], `out[r]` = scores from `start`) or of values (`in[r]` = weights
// from `start`, `out[r]` = accumulators [dim]). The range meets packed pages on their edges only.
template <int R> struct Pass {
  const Segments& s;
  const int64_t b, h, start, stop;
  const bool is_key;
  const float* const* const in;
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

  // Inputs and outputs for the tokens from `token` on.
  void from(int64_t token, const float** in_at, float** out_at) const {
    for (int r = 0; r < R; r++) {
      in_at[r] = is_key ? in[r] : in[r] + (token - start);
      out_at[r] = is_key ? out[r] + (token - start) : out[r];
    }
  }

  void full(const void* x, const int64_t* strides, int64_t origin, int64_t first, int64_t last) const {
    if (first >= last) return;
    const float* in_at[R];
    float* out_at[R];
    from(first, in_at, out_at);
    const int64_t offset = b * strides[0] + h * strides[1] + (first - origin) * strides[2], count = last - first;
    switch (s.dtype) {
      case FLOAT32: full_part<FLOAT32, R>(is_key, x, offset, strides[2], count, s.dim, in_at, out_at); break;
      case FLOAT16: full_part<FLOAT16, R>(is_key, x, offset, strides[2], count, s.dim, in_at, out_at); break;
      default: full_part<BFLOAT16, R>(is_key, x, offset, strides[2], count, s.dim, in_at, out_at);
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
      const float* in_at[R];
      float* out_at[R];
      from(token, in_at, out_at);
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
  const int64_t ratio = x.heads / x.kv_heads, out_dim = x.value.dim;
  const int64_t room = (stop - start + W) / W * W;
  scratch.scores.resize(R * room);
  const float* query[R];
  float *scores[R], *output[R];
  for (int r = 0; r < R; r++) {
    query[r] = x.query + ((b * x.heads + h * ratio) * x.queries + first_row + r) * x.key.dim;
    scores[r] = scratch.scores.data() + r * room;
    output[r] = partial + r * (out_dim + 2);
    for (int64_t d = 0; d < out_dim; d++) output[r][d] = 0;
  }
  Pass<R>{x.key, b, h, start, stop, true, query, scores, scratch}.run();
  for (int r = 0; r < R; r++) {
    const int64_t head = h * ratio + (first_row + r) / x.queries, row = (first_row + r) % x.queries;
    softmax_row(x, b, head, row, start, stop, scores[r], output[r] + out_dim, output[r] + out_dim + 1);
  }
  Pass<R>{x.value, b, h, start, stop, false, scores, output, scratch}.run();
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
                      float* output, float* logarithm) {
  const int64_t dim = x.value.dim;
  float most = x.sink_logits ? x.sink_logits[head] : NEVER;
  for (int64_t s = 0; s < splits; s++) most = std::fmax(most, partial[s * stride + dim]);
  float total = x.sink_logits ? std::exp(x.sink_logits[head] - most) : 0.0f;
  for (int64_t d = 0; d < dim; d++) output[d] = 0;
  *logarithm = NEVER;
  if (most == NEVER) return;
  for (int64_t s = 0; s < splits; s++) {
    const float* part = partial + s * stride;
    const float share = std::exp(part[dim] - most);
    if (share == 0) continue;
    total += share * part[dim + 1];
    for (int64_t d = 0; d < dim; d++) output[d] += share * part[d];
  }
  for (int64_t d = 0; d < dim; d++) output[d] /= total;
  *logarithm = most + std::log(total);
}

// Token ranges that threads share out: on page edges, as many as keep all threads busy and their caches warm.
static std::vector<int64_t> split_tokens(const Attention& x, int64_t tasks) {
  const Segments& packed = x.key.pages ? x.key : x.value;
  const int64_t step = packed.pages ? packed.page : 16;
  int64_t splits = tasks % x.threads == 0 ? 1 : (4 * x.threads + tasks - 1) / tasks;
  const int64_t least = (x.tokens + MAX_SPLIT - 1) / MAX_SPLIT, most = x.tokens / MIN_SPLIT;
  splits = splits < most ? splits : (most > 1 ? most : 1);
  splits = splits > least ? splits : least;
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
      const int64_t block = task % blocks, split = task / blocks % splits, head = task / blocks / splits;
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
                x.output + row * x.value.dim, x.logarithms + row);
  }
}

}  // namespace KVMIX_ISA
