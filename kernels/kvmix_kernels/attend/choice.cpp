// The pages that one query reads, by their summaries: what choice.py says, in one pass over these. Compiled once per
// instruction set.
#include "choice.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../runtime/native/simd.h"
#include "plain.h"

namespace KVMIX_ISA {
namespace {

constexpr int ROWS = 4;  // query rows that share what is read of a page
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float vr __attribute__((vector_size(4 * ROWS)));  // a number for each of these rows

struct Scratch {
  std::vector<float> query, logits, tables, ranked;
};

int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

int64_t offset(const int64_t* strides, int64_t b, int64_t h) { return b * strides[0] + h * strides[1]; }

// A query with what it multiplies in a summary: itself for a mean; for the two ends of a range its negative numbers, then its
// positive ones, so that the sum is the largest that a key between the ends can have.
void coefficients(const Choice& x, int64_t b, int64_t head, float* out) {
  with_dtype(x.query_dtype, x.query, offset(x.query_strides, b, head), [&](auto query) {
    for (int64_t d = 0; d < x.dim; d += W) {
      const vf q = read<query.dtype>(query.at, d) * splat(x.scaling);
      if (x.books || x.rows == 1) {
        store(out + d, q);
      } else {
        store(out + d, q < vf{} ? q : vf{});
        store(out + x.dim + d, q > vf{} ? q : vf{});
      }
    }
  });
}

template <int R> void logits_of_ends(const Choice& x, int64_t b, int64_t h, const float* const* query, float* const* out) {
  with_dtype(x.dtype, x.summary, offset(x.summary_strides, b, h), [&](auto summary) {
    dot_full<summary.dtype, R>(summary.at, x.summary_strides[2], x.pages, x.rows * x.dim, query, out);
  });
}

// Products of each row's part of the query with all entries of the codebooks, [parts][entries], the rows side by side.
void fill_tables(const Choice& x, int64_t b, int64_t h, int rows, const float* const* query, float* tables) {
  const int64_t width = x.dim / x.parts, all = x.parts * x.entries;
  with_dtype(x.dtype, x.books, (b * x.kv_heads + h) * all * width, [&](auto books) {
    for (int64_t entry = 0; entry < all; entry++) {
      vf sums[ROWS] = {};
      for (int64_t d = 0; d < width; d += W) {
        const vf number = read<books.dtype>(books.at, entry * width + d);
        for (int r = 0; r < rows; r++) sums[r] += number * load<vf>(query[r] + entry / x.entries * width + d);
      }
      for (int r = 0; r < ROWS; r++) tables[entry * ROWS + r] = sum(sums[r]);
    }
  });
}

// The largest logit in each page of the keys that codes stand for.
void logits_of_codes(const Choice& x, int64_t b, int64_t h, int rows, const float* tables, float* const* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(x.summary) + offset(x.summary_strides, b, h);
  for (int64_t page = 0; page < x.pages; page++, codes += x.summary_strides[2]) {
    vr most = vr{} + NEVER;
    for (const uint8_t *token = codes, *end = codes + x.rows * x.parts; token < end; token += x.parts) {
      vr logit = load<vr>(tables + ROWS * token[0]);
      for (int64_t part = 1; part < x.parts; part++) logit += load<vr>(tables + ROWS * (part * x.entries + token[part]));
      most = logit > most ? logit : most;
    }
    for (int r = 0; r < rows; r++) out[r][page] = most[r];
  }
}

// Turn logits into weights by a softmax; there is room for whole vectors.
void softmax(float* logits, int64_t count) {
  for (int64_t i = count; i < padded(count); i++) logits[i] = NEVER;
  vf most = splat(NEVER), total = {};
  for (int64_t i = 0; i < count; i += W) most = larger(most, load<vf>(logits + i));
  const vf shift = splat(largest(most));
  for (int64_t i = 0; i < count; i += W) {
    const vf weight = exp_negative(load<vf>(logits + i) - shift);
    store(logits + i, weight);
    total += weight;
  }
  const vf share = splat(1 / sum(total));
  for (int64_t i = 0; i < count; i += W) store(logits + i, load<vf>(logits + i) * share);
}

// What the pages are worth to the queries of a KV head. Where logits are not finite it is 0: numbers have an order then.
void weigh(const Choice& x, int64_t b, int64_t h, float* worth, Scratch& scratch) {
  const int64_t ratio = x.heads / x.kv_heads, room = padded(x.pages), length = (x.books ? 1 : x.rows) * x.dim;
  scratch.query.resize(ROWS * length);
  scratch.logits.resize(ROWS * room);
  std::fill(worth, worth + room, 0.0f);
  for (int64_t first = 0; first < ratio; first += ROWS) {
    const int rows = int(std::min<int64_t>(ROWS, ratio - first));
    float *query[ROWS], *logits[ROWS];
    for (int r = 0; r < ROWS; r++) {
      query[r] = scratch.query.data() + r * length;
      logits[r] = scratch.logits.data() + r * room;
      if (r < rows) coefficients(x, b, h * ratio + first + r, query[r]);
    }
    if (x.books) {
      scratch.tables.resize(x.parts * x.entries * ROWS);
      fill_tables(x, b, h, rows, query, scratch.tables.data());
      logits_of_codes(x, b, h, rows, scratch.tables.data(), logits);
    } else {
      switch (rows) {
        case 1: logits_of_ends<1>(x, b, h, query, logits); break;
        case 2: logits_of_ends<2>(x, b, h, query, logits); break;
        case 3: logits_of_ends<3>(x, b, h, query, logits); break;
        default: logits_of_ends<4>(x, b, h, query, logits); break;
      }
    }
    for (int r = 0; r < rows; r++) {
      softmax(logits[r], x.pages);
      for (int64_t i = 0; i < x.pages; i += W) {
        const vf weight = load<vf>(logits[r] + i), before = load<vf>(worth + i);
        const vf known = weight > vf{} ? weight : vf{};
        store(worth + i, x.sharing == LARGEST ? larger(before, known) : before + known);
      }
    }
  }
}

// The numbers of the pages that are worth most, ascending; of equal ones the first.
void select(const float* worth, int64_t pages, int64_t count, int32_t* numbers, Scratch& scratch) {
  scratch.ranked.assign(worth, worth + pages);
  const auto last = scratch.ranked.begin() + (count - 1);
  std::nth_element(scratch.ranked.begin(), last, scratch.ranked.end(), std::greater<float>());
  const float least = *last;
  int64_t equal = count - std::count_if(worth, worth + pages, [&](float each) { return each > least; });
  for (int64_t page = 0; page < pages; page++)
    if (worth[page] > least || (worth[page] == least && equal-- > 0)) *numbers++ = int32_t(page);
}

}  // namespace

void choose(const Choice& x) {
  const int64_t room = padded(x.pages), heads = x.batch * x.kv_heads;
  static thread_local std::vector<float> buffer;
  buffer.resize(heads * room);
  float* worth = buffer.data();
#pragma omp parallel num_threads(x.threads)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t head = 0; head < heads; head++)
      weigh(x, head / x.kv_heads, head % x.kv_heads, worth + head * room, scratch);
    if (x.sharing != LAYER) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < heads; head++)
        select(worth + head * room, x.pages, x.count, x.numbers + head * x.count, scratch);
    } else {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < x.batch; b++) {
        float* total = worth + b * x.kv_heads * room;
        for (int64_t h = 1; h < x.kv_heads; h++)
          for (int64_t i = 0; i < x.pages; i += W) store(total + i, load<vf>(total + i) + load<vf>(total + h * room + i));
        int32_t* numbers = x.numbers + b * x.kv_heads * x.count;
        select(total, x.pages, x.count, numbers, scratch);
        for (int64_t h = 1; h < x.kv_heads; h++) std::copy(numbers, numbers + x.count, numbers + h * x.count);
      }
    }
  }
}

}  // namespace KVMIX_ISA
