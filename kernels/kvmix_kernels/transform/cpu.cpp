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
    pack(x.codes + (b * x.count + page) * x.page_bytes + x.places[head]);
  }
};

// One token of one head, a direction a lane.
class SingleToken {
  const Coding& x;
  const int64_t token, head;
  const uint8_t* const widths = x.widths + head * x.dim;
  const float* const deviation = x.deviation + head * x.dim;
  const float* const steps = x.steps + head * x.dim;
  float* const state;                // [dim]
  float* const z;                    // [dim]
  uint8_t* const codes = x.codes + (token * x.heads + head) * x.dim;

  void read_state() {
    const int64_t from = token * x.states_strides[0] + head * x.states_strides[1];
    for (int64_t d = 0; d < x.dim; d += W)
      store(state + d, x.dtype == FLOAT32   ? read<FLOAT32>(x.states, from + d)
                       : x.dtype == FLOAT16 ? read<FLOAT16>(x.states, from + d)
                                            : read<BFLOAT16>(x.states, from + d));
  }

  // To the start of its frame: by minus the angle of the frame's first position.
  void turn(const float* cosines, const float* sines) {
    float* of = state + x.first;
    for (int64_t i = 0; i < x.pairs; i++) {
      float &a = x.interleaved ? of[2 * i] : of[i], &b = x.interleaved ? of[2 * i + 1] : of[x.pairs + i];
      const float first = a * cosines[i] - b * sines[i], second = b * cosines[i] + a * sines[i];
      a = first, b = second;
    }
  }

  void project() {
    const float *mean = x.mean + head * x.dim, *encoder = x.encoder + head * x.dim * x.dim;
    for (int64_t c = 0; c < x.dim; c++) state[c] -= mean[c];
    for (int64_t d = 0; d < x.dim; d += W) {
      vf sum = {};
      for (int64_t c = 0; c < x.dim; c++) sum += splat(state[c]) * load<vf>(encoder + c * x.dim + d);
      store(z + d, sum);
    }
  }

  vf levels(int64_t d) const {
    vf found;
    for (int i = 0; i < W; i++) found[i] = float(1 << widths[d + i]);
    return found;
  }

  static float rounded(float scale) {
    const vh stored = float_to_half(splat(scale));
    return half_to_float(&stored)[0];
  }

  // The root mean square of coded directions, in units of their deviation.
  float first_scale() const {
    vf squares = {};
    int64_t coded = 0;
    for (int64_t d = 0; d < x.dim; d += W) {
      vf unit = load<vf>(z + d) / load<vf>(deviation + d);
      for (int i = 0; i < W; i++) widths[d + i] ? void(coded++) : void(unit[i] = 0);
      squares += unit * unit;
    }
    return rounded(std::max(std::sqrt(sum(squares) / float(std::max<int64_t>(coded, 1))), SMALLEST_SCALE));
  }

 public:
  SingleToken(const Coding& x, int64_t token, int64_t head, float* room)
      : x(x), token(token), head(head), state(room), z(room + x.dim) {}

  void code(const float* cosines, const float* sines) {
    read_state();
    if (cosines) turn(cosines, sines);
    project();
    const vf by = splat(x.scales ? first_scale() : 1.0f);
    vf products = {}, squares = {};
    for (int64_t d = 0; d < x.dim; d += W) {
      const vf deviation = load<vf>(this->deviation + d), steps = load<vf>(this->steps + d), levels = this->levels(d);
      const vf u = x.scales ? load<vf>(z + d) / deviation / by : load<vf>(z + d) / deviation;
      vf code = u / (steps / deviation) + levels * splat(0.5f);
      code = code > vf{} ? code : vf{};  // NaN too
      code = code < levels - splat(1.0f) ? code : levels - splat(1.0f);
      const vi whole = __builtin_convertvector(code, vi);  // not negative: truncation is the floor
      for (int i = 0; i < W; i++) codes[d + i] = uint8_t(whole[i]);
      const vf value = (__builtin_convertvector(whole, vf) - levels * splat(0.5f) + splat(0.5f)) * steps / deviation;
      products += value * u;
      squares += value * value;
    }
    if (!x.scales) return;
    const float scale = by[0] * (sum(products) / std::max(sum(squares), 1e-6f));
    x.scales[token * x.heads + head] = float_to_half(splat(scale))[0];
  }
};

}  // namespace

void code(const Coding& x) {
#pragma omp parallel num_threads(x.threads)
  {
    std::vector<float> room(2 * x.dim), turns(2 * x.pairs);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < x.tokens; t++) {
      const bool is_turned = x.frames && x.frames[t];
      for (int64_t i = 0; is_turned && i < x.pairs; i++) {
        const double angle = double(x.frames[t] * x.frame) * x.frequencies[i];
        turns[i] = float(std::cos(angle)), turns[x.pairs + i] = float(-std::sin(angle));
      }
      for (int64_t h = 0; h < x.heads; h++)
        SingleToken(x, t, h, room.data()).code(is_turned ? turns.data() : nullptr, turns.data() + x.pairs);
    }
  }
}

void encode(const Encoding& x) {
#pragma omp parallel for num_threads(x.threads) schedule(static) collapse(2)
  for (int64_t b = 0; b < x.batch; b++)
    for (int64_t head = 0; head < x.heads; head++) {
      Page page(x, head);
      for (int64_t i = 0; i < x.count; i++) page.encode(b, i);
    }
}

}  // namespace KVMIX_ISA
