// Attention over parts of sink | packed pages | tail on a CPU. Compiled once per instruction set; see runtime/native/build.py.
#include "cpu.h"

#include <cmath>
#include <vector>

#include "../runtime/native/simd.h"
#include "coded_keys.h"
#include "coded_values.h"
#include "contract.h"
#include "plain.h"
#include "vectors.h"

namespace KVMIX_ISA {

constexpr int ROWS = 4;              // query rows that share an unpacked code: as many as registers allow
constexpr int64_t MIN_SPLIT = 512;   // tokens below which a thread is not worth its start
constexpr int64_t MAX_SPLIT = 2048;  // tokens whose scores stay in a core's own cache
constexpr float NEVER = -INFINITY;

// Tokens [start, stop) of keys (`in[r]` = query [dim], `out[r]` = scores from `start`) or of values (`in[r]` = weights
// from `start`, `out[r]` = accumulators [dim], followed by those of coded pages). The range meets packed pages on their edges only.
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
    for (int64_t i = 0, channel = 0; i < s.run_count; channel += s.runs[i++].channels)
      packed(s.runs[i], channel, most(start, s.sinks), least(stop, packed_end));
    if (s.coded) coded((most(start, s.sinks) - s.sinks) / s.page, (least(stop, packed_end) - s.sinks) / s.page);
    if (s.vectors) vectors((most(start, s.sinks) - s.sinks) / s.page, (least(stop, packed_end) - s.sinks) / s.page);
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
    with_dtype(s.dtype, x, offset_of(strides, b, h, first - origin), [&](auto tokens) {
      if (is_key)
        dot_full<tokens.dtype, R>(tokens.at, strides[2], last - first, s.dim, in_at, out_at);
      else
        mix_full<tokens.dtype, R>(tokens.at, strides[2], last - first, s.dim, in_at, out_at, true);
    });
  }

  void packed(const Run& x, int64_t channel, int64_t first, int64_t last) const {
    switch (x.bits) {
      case 1: return pages<1>(x, channel, first, last);
      case 2: return pages<2>(x, channel, first, last);
      case 3: return pages<3>(x, channel, first, last);
      case 4: return pages<4>(x, channel, first, last);
      case 8: return pages<8>(x, channel, first, last);
      case 16: return pages<16>(x, channel, first, last);
    }
  }

  // One run, whose first place is `channel`; the first one writes the scores that the others add to.
  template <int BITS> void pages(const Run& x, int64_t channel, int64_t first, int64_t last) const {
    const int64_t rows = is_key ? x.channels : s.page, columns = is_key ? s.page : x.channels;
    const bool add = !is_key || channel > 0;
    int64_t order = -1;
    for (int64_t token = first; token < last; token += s.page) {
      const int64_t page = (token - s.sinks) / s.page, place = s.place(b, h, page);
      const int64_t ahead = token + s.page < last ? s.place(b, h, page + 1) - place : 1;
      const float* in_at[R];
      float* out_at[R];
      from(token, in_at, out_at);
      if (s.order) {
        if (order != page / s.pages_per_order) sort(order = page / s.pages_per_order, channel, rows);
        for (int r = 0; r < R; r++) in_at[r] = scratch.sorted.data() + r * rows;
      } else if (is_key) {
        for (int r = 0; r < R; r++) in_at[r] += channel;
      }
      if constexpr (BITS < 16) {
        if (x.by_token)
          score_page<BITS, R>(x, b, h, place, ahead, rows, columns, in_at, out_at, add, scratch);
        else
          contract_page<BITS, R>(x, b, h, place, ahead, rows, columns, in_at, out_at, add, scratch);
      } else
        with_dtype(x.dtype, x.data, offset_of(x.data_strides, b, h, place), [&](auto states) {
          mix_full<states.dtype, R>(states.at, columns, rows, columns, in_at, out_at, add);
        });
    }
  }

  // Pages [first, last) of transform codes.
  void coded(int64_t first, int64_t last) const {
    const float* in_at[R];
    float* out_at[R];
    if (is_key) {
      CodedKeys<R> keys(s, b, h, in, scratch);
      for (int64_t page = first; page < last; page++) {
        from(s.sinks + page * s.page, in_at, out_at);
        keys.score(page, out_at);
      }
    } else if (first < last) {
      CodedValues<R> values(s, b, h, scratch);
      for (int64_t page = first; page < last; page += values.pages_together()) {
        from(s.sinks + page * s.page, in_at, out_at);
        float* weights[R];  // of the scores' memory, which nothing reads after this
        for (int r = 0; r < R; r++) weights[r] = const_cast<float*>(in_at[r]);
        values.mix(page, least(values.pages_together(), last - page), weights, out_at);
      }
      values.finish(out);
    }
  }

  // Pages [first, last) of vector codes.
  void vectors(int64_t first, int64_t last) const {
    if (first >= last) return;
    const float* in_at[R];
    float* out_at[R];
    from(s.sinks + first * s.page, in_at, out_at);
    static_assert(R <= LANES, "a lane of a table for each query row");
    if (is_key)
      score_vectors(s, b, h, first, last, R, in_at, out_at, scratch);
    else
      mix_vectors(s, b, h, first, last, R, in_at, out_at, scratch);
  }

  // The queries' channels at `count` places from `place` on.
  void sort(int64_t order, int64_t place, int64_t count) const {
    const uint8_t* channels = s.order + offset_of(s.order_strides, b, h, order) + place;
    scratch.sorted.resize(R * count);
    for (int r = 0; r < R; r++)
      for (int64_t i = 0; i < count; i++) scratch.sorted[r * count + i] = in[r][channels[i]];
  }
};

// The values that are coded, of which there is one part at most; null if there are none.
static const Segments* coded_values(const Attention& x) {
  for (int64_t i = 0; i < x.part_count; i++)
    if (x.parts[i].value.coded) return &x.parts[i].value;
  return nullptr;
}

// Floats of a row's unnormalised output, before its maximum and sum.
static int64_t partial_width(const Attention& x) { return coded_values(x) ? coded_width(x.value_dim) : x.value_dim; }

// The tokens of a sequence.
static int64_t tokens_of(const Part& part, int64_t b) { return part.lengths ? part.lengths[b] : part.tokens; }

// Tokens [start, stop) of a part.
struct Split {
  const Part* part;
  int64_t start, stop;
};

// Soft-cap, mask and exponential of one row of scores, in place. Returns the maximum and the sum of weights.
static void softmax_row(const Attention& x, const Split& split, int64_t b, int64_t head, int64_t row, float* scores,
                        float* maximum, float* total) {
  const Part& part = *split.part;
  const int64_t start = split.start, stop = split.stop, count = stop - start;
  if (x.softcap > 0)
    for (int64_t t = 0; t < count; t++) scores[t] = x.softcap * std::tanh(scores[t] / x.softcap);
  if (part.mask) {
    const int64_t at = b * part.mask_strides[0] + head * part.mask_strides[1] + row * part.mask_strides[2];
    if (part.mask_is_bool) {
      const uint8_t* mask = static_cast<const uint8_t*>(part.mask) + at + start * part.mask_strides[3];
      for (int64_t t = 0; t < count; t++) scores[t] = mask[t * part.mask_strides[3]] ? scores[t] : NEVER;
    } else {
      const float* mask = static_cast<const float*>(part.mask) + at + start * part.mask_strides[3];
      for (int64_t t = 0; t < count; t++) scores[t] += mask[t * part.mask_strides[3]];
    }
  } else {
    const int64_t seen = tokens_of(part, b) - x.queries + row + 1;
    for (int64_t t = seen > start ? seen : start; t < stop; t++) scores[t - start] = NEVER;
  }
  constexpr int N = 2;  // vectors whose steps do not wait for each other
  for (int64_t t = count; t % (N * W); t++) scores[t] = NEVER;
  vf most[N] = {splat(NEVER), splat(NEVER)}, sums[N] = {};
  for (int64_t t = 0; t < count; t += N * W)
    each<N>([&](auto i) INLINE { most[i] = larger(most[i], load<vf>(scores + t + i * W)); });
  *maximum = largest(larger(most[0], most[1]));
  const vf shift = splat(*maximum == NEVER ? 0.0f : *maximum);
  for (int64_t t = 0; t < count; t += N * W)
    each<N>([&](auto i) INLINE {
      const vf weight = exp_negative(load<vf>(scores + t + i * W) - shift);
      store(scores + t + i * W, weight);
      sums[i] += weight;
    });
  *total = sum(sums[0] + sums[1]);
}

// The pages of a split that a sequence has tokens in.
static Split of_sequence(const Split& split, int64_t b) {
  const int64_t page = split.part->key.page;
  if (!split.part->lengths) return split;
  const int64_t end = (split.part->lengths[b] + page - 1) / page * page;
  return {split.part, split.start, end < split.start ? split.start : end < split.stop ? end : split.stop};
}

static void scale_query(const Attention& x, int64_t b, int64_t head, int64_t row, float* scaled) {
  with_dtype(x.dtype, x.query, offset_of(x.query_strides, b, head, row), [&](auto query) {
    for (int64_t d = 0; d < x.dim; d += W) store(scaled + d, read<query.dtype>(query.at, d) * x.scaling);
  });
}

// One KV head, R query rows, the tokens of a split: unnormalised output, maximum and sum of each row.
template <int R>
static void attend_rows(const Attention& x, const Split& of_all, int64_t b, int64_t h, int64_t first_row, float* partial,
                        Scratch& scratch) {
  const Split split = of_sequence(of_all, b);
  const int64_t ratio = x.heads / x.kv_heads, start = split.start, stop = split.stop;
  const int64_t room = (stop - start + 2 * W) / W * W + VB, width = partial_width(x);
  scratch.query.resize(R * x.dim);
  scratch.scores.resize(R * room);
  const float* query[R];
  float *scores[R], *output[R];
  for (int r = 0; r < R; r++) {
    float* scaled = scratch.query.data() + r * x.dim;
    scale_query(x, b, h * ratio + (first_row + r) / x.queries, (first_row + r) % x.queries, scaled);
    query[r] = scaled;
    scores[r] = scratch.scores.data() + r * room;
    output[r] = partial + r * (width + 2);
    for (int64_t d = 0; d < width; d++) output[r][d] = 0;
    output[r][width] = NEVER, output[r][width + 1] = 0;
  }
  if (start == stop) return;
  Pass<R>{split.part->key, b, h, start, stop, true, query, scores, scratch}.run();
  for (int r = 0; r < R; r++) {
    const int64_t head = h * ratio + (first_row + r) / x.queries, row = (first_row + r) % x.queries;
    softmax_row(x, split, b, head, row, scores[r], output[r] + width, output[r] + width + 1);
  }
  Pass<R>{split.part->value, b, h, start, stop, false, scores, output, scratch}.run();
}

static void attend_some(int rows, const Attention& x, const Split& split, int64_t b, int64_t h, int64_t first_row,
                        float* partial, Scratch& scratch) {
  switch (rows) {
    case 1: attend_rows<1>(x, split, b, h, first_row, partial, scratch); break;
    case 2: attend_rows<2>(x, split, b, h, first_row, partial, scratch); break;
    case 3: attend_rows<3>(x, split, b, h, first_row, partial, scratch); break;
    default: attend_rows<4>(x, split, b, h, first_row, partial, scratch); break;
  }
}

// Merge the splits of one row by their maxima and sums (log-sum-exp), with the head's sink logit if it has one: [width],
// of which the first [value_dim] are the output.
static void merge_row(const Attention& x, int64_t b, int64_t head, const float* partial, int64_t width, int64_t splits,
                      float* merged, float* logarithm) {
  const int64_t stride = width + 2;
  float most = x.sink_logits ? x.sink_logits[head] : NEVER;
  for (int64_t s = 0; s < splits; s++) most = std::fmax(most, partial[s * stride + width]);
  float total = x.sink_logits ? std::exp(x.sink_logits[head] - most) : 0.0f;
  for (int64_t d = 0; d < width; d++) merged[d] = 0;
  *logarithm = NEVER;
  if (most == NEVER) return;
  for (int64_t s = 0; s < splits; s++) {
    const float* part = partial + s * stride;
    const float share = std::exp(part[width] - most);
    if (share == 0) continue;
    total += share * part[width + 1];
    for (int64_t d = 0; d < width; d++) merged[d] += share * part[d];
  }
  if (const Segments* values = coded_values(x)) finish_coded(*values, b, head / (x.heads / x.kv_heads), merged);
  for (int64_t d = 0; d < x.value_dim; d++) merged[d] /= total;
  *logarithm = most + std::log(total);
}

static void write_row(const Attention& x, int64_t row, const float* merged) {
  with_dtype(x.dtype, x.output, 0, [&](auto output) {
    for (int64_t d = 0; d < x.value_dim; d += W) write<output.dtype>(x.output, row * x.value_dim + d, load<vf>(merged + d));
  });
}

// A part in some number of pieces, on page edges.
static void split_part(const Part& part, int64_t pieces, std::vector<Split>& splits) {
  const Segments& packed = part.key.pages ? part.key : part.value;
  const int64_t step = packed.pages ? packed.page : 16;
  int64_t start = 0;
  for (int64_t i = 1; i < pieces; i++) {
    const int64_t near = part.tokens * i / pieces;
    const int64_t edge = packed.sinks + (near - packed.sinks) / step * step;
    if (edge <= start || edge >= part.tokens) continue;
    splits.push_back({&part, start, edge});
    start = edge;
  }
  if (start < part.tokens) splits.push_back({&part, start, part.tokens});
}

// Token ranges that threads share out: as many as keep all threads busy and their caches warm.
static std::vector<Split> split_tokens(const Attention& x, int64_t tasks) {
  int64_t tokens = 0;
  for (int64_t i = 0; i < x.part_count; i++) tokens += x.parts[i].tokens;
  int64_t pieces = tasks % x.threads == 0 ? 1 : (4 * x.threads + tasks - 1) / tasks;
  const int64_t most = tokens / MIN_SPLIT;
  pieces = pieces < most ? pieces : most;
  std::vector<Split> splits;
  for (int64_t i = 0; i < x.part_count; i++) {
    const Part& part = x.parts[i];
    const int64_t least = (part.tokens + MAX_SPLIT - 1) / MAX_SPLIT, share = pieces * part.tokens / (tokens + !tokens);
    split_part(part, share > least ? share : least, splits);
  }
  return splits;
}

void attend(const Attention& x) {
  const int64_t rows = x.heads / x.kv_heads * x.queries, width = partial_width(x), stride = width + 2;
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  const int64_t tasks = x.batch * x.kv_heads * blocks;
  const std::vector<Split> splits = split_tokens(x, tasks);
  const int64_t count = splits.size();
  static thread_local std::vector<float> partials;
  partials.resize(x.batch * x.kv_heads * rows * count * stride + ROWS * stride);
  float* partial = partials.data();
#pragma omp parallel num_threads(x.threads)
  {
    static thread_local Scratch scratch;
    std::vector<float> block_out(ROWS * stride), merged(width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks * count; task++) {
      const int64_t block = task % blocks, split = task / blocks % count, head = task / blocks / count;
      const int64_t first = block * ROWS, here = rows - first < ROWS ? rows - first : ROWS;
      attend_some(here, x, splits[split], head / x.kv_heads, head % x.kv_heads, first, block_out.data(), scratch);
      for (int64_t r = 0; r < here; r++)
        std::memcpy(partial + ((head * rows + first + r) * count + split) * stride, block_out.data() + r * stride,
                    stride * sizeof(float));
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < x.batch * x.kv_heads * rows; row++) {
      merge_row(x, row / x.queries / x.heads, row / x.queries % x.heads, partial + row * count * stride, width, count,
                merged.data(), x.logarithms + row);
      write_row(x, row, merged.data());
    }
  }
}

}  // namespace KVMIX_ISA
