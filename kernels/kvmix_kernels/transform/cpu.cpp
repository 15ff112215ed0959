// Quantize and pack pages that are in the directions of their basis: what naive.py makes, in one pass over a page. Compiled
// once per instruction set, without contracted multiply-adds, which would round elsewhere.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../runtime/native/simd.h"

namespace KVMIX_ISA {

constexpr float SMALLEST_SCALE = 1e-4f;  // as in naive.py

namespace {

// One page of one head, a token a lane: directions one after the other, [dim][page].
class Page {
  const Encoding& x;
  const int64_t head;
  const uint8_t* const widths = x.widths + head * x.dim;
  const float* const deviation = x.deviation + head * x.dim;
  const float* const steps = x.steps + head * x.dim;
  std::vector<float> z, scale;
  std::vector<uint8_t> codes;

  // In units of the deviation; square roots of means of their squares are the first scales.
  vf unit(int64_t d, int64_t t) const { return load<vf>(z.data() + d * x.page + t) / splat(deviation[d]); }

  void first_scales(int64_t t) {
    vf squares = {};
    int64_t coded = 0;
    for (int64_t d = 0; d < x.dim; d++)
      if (widths[d]) squares += unit(d, t) * unit(d, t), coded++;
    const vf mean = squares / splat(float(std::max<int64_t>(coded, 1)));
    for (int i = 0; i < W; i++) scale[t + i] = std::max(std::sqrt(mean[i]), SMALLEST_SCALE);
    round_scales(t);
  }

  void round_scales(int64_t t) {
    const vh stored = float_to_half(load<vf>(scale.data() + t));
    store(scale.data() + t, half_to_float(&stored));
  }

  // Codes of W tokens, and the least-squares factor of what they stand for if tokens have scales.
  void quantize(int64_t t) {
    const vf by = load<vf>(scale.data() + t);
    vf products = {}, squares = {};
    for (int64_t d = 0; d < x.dim; d++) {
      if (!widths[d]) continue;
      const float levels = float(1 << widths[d]);
      const vf u = x.scales ? unit(d, t) / by : unit(d, t);
      vf code = u / splat(steps[d] / deviation[d]) + splat(levels / 2);
      code = code > vf{} ? code : vf{};  // NaN too
      code = code < splat(levels - 1) ? code : splat(levels - 1);
      const vi whole = __builtin_convertvector(code, vi);  // not negative: truncation is the floor
      for (int i = 0; i < W; i++) codes[d * x.page + t + i] = uint8_t(whole[i]);
      const vf value = this->value(d, whole) / splat(deviation[d]);
      products += value * u;
      squares += value * value;
    }
    if (!x.scales) return;
    squares = squares > splat(1e-6f) ? squares : splat(1e-6f);
    store(scale.data() + t, by * (products / squares));
    round_scales(t);
  }

  vf value(int64_t d, vi code) const {
    const float half = float(1 << widths[d]) / 2;
    return (__builtin_convertvector(code, vf) - splat(half) + splat(0.5f)) * splat(steps[d]);
  }

  vf error(int64_t t) const {
    const vf by = load<vf>(scale.data() + t);
    vf errors = {};
    for (int64_t d = 0; d < x.dim; d++) {
      vf left = load<vf>(z.data() + d * x.page + t);
      if (widths[d]) {
        vi code;
        for (int i = 0; i < W; i++) code[i] = codes[d * x.page + t + i];
        left -= x.scales ? value(d, code) * by : value(d, code);
      }
      errors += left * left;
    }
    return errors;
  }

  // Bit planes of each direction, lowest bits first: 4, 2 or 1 at a time.
  void pack(uint8_t* to) const {
    for (int64_t d = 0; d < x.dim; d++) {
      const uint8_t* from = codes.data() + d * x.page;
      for (int shift = 0; shift < widths[d];) {
        const int left = widths[d] - shift, bits = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int64_t bytes = x.page * bits / 8;
        std::fill(to, to + bytes, 0);
        for (int j = 0; j < 8 / bits; j++)
          for (int64_t i = 0; i < bytes; i++) to[i] |= (from[j * bytes + i] >> shift & ((1 << bits) - 1)) << (j * bits);
        to += bytes;
        shift += bits;
      }
    }
  }

  // One code a byte, a token after the other.
  void spread(uint8_t* to) const {
    for (int64_t t = 0; t < x.page; t++)
      for (int64_t d = 0; d < x.dim; d++) to[t * x.dim + d] = codes[d * x.page + t];
  }

 public:
  Page(const Encoding& x, int64_t head)
      : x(x), head(head), z(x.dim * x.page), scale(x.page, 1.0f), codes(x.dim * x.page) {}

  void encode(int64_t b, int64_t page) {
    const int64_t index = (b * x.heads + head) * x.count + page;
    const float* from = x.z + index * x.page * x.dim;
    for (int64_t t = 0; t < x.page; t++)
      for (int64_t d = 0; d < x.dim; d++) z[d * x.page + t] = from[t * x.dim + d];
    for (int64_t t = 0; t < x.page; t += W) {
      if (x.scales) first_scales(t);
      quantize(t);
      if (x.scales) store(x.scales + index * x.page + t, float_to_half(load<vf>(scale.data() + t)));
      store(x.errors + index * x.page + t, error(t));
    }
    if (x.codes) pack(x.codes + (b * x.count + page) * x.page_bytes + x.places[head]);
    if (x.bytes) spread(x.bytes + index * x.page * x.dim);
  }
};

}  // namespace

void encode(const Encoding& x) {
#pragma omp parallel for num_threads(x.threads) schedule(static) collapse(2)
  for (int64_t b = 0; b < x.batch; b++)
    for (int64_t head = 0; head < x.heads; head++) {
      Page page(x, head);
      for (int64_t i = 0; i < x.count; i++) page.encode(b, i);
    }
}

}  // namespace KVMIX_ISA
