// Queries over coded keys.
#pragma once
#include "coded.h"
#include "key_products.h"

namespace KVMIX_ISA {

// R queries over coded keys.
template <int R> class CodedKeys {
  const CodedHead head;
  const float* const* const query;
  Scratch& scratch;
  const int64_t dim = head.s.dim, page = head.s.page;
  KeyProducts<R> products{head, scratch};
  ExactTokens exact{head};
  int64_t frame = -1;
  float offset[R];

  // The coefficients of a frame, and zeros beyond them to the end of four vectors.
  void meet(int64_t next) {
    frame = next;
    const int64_t columns = (head.coded + W - 1) / W * W, room = dim + 4 * W;
    scratch.turned.resize(R * dim);
    scratch.folded.assign(R * room, 0.0f);
    const float* turned[R];
    float* folded[R];
    for (int r = 0; r < R; r++) {
      turned[r] = turn(query[r], scratch.turned.data() + r * dim);
      folded[r] = scratch.folded.data() + r * room;
    }
    mix_full<FLOAT32, R>(head.decoding, dim, dim, columns, turned, folded, false);
    for (int r = 0; r < R; r++) {
      std::fill(folded[r] + head.coded, folded[r] + columns, 0.0f);
      vf mean = {};
      for (int64_t e = 0; e < dim; e += W) mean += load<vf>(turned[r] + e) * load<vf>(head.mean + e);
      offset[r] = sum(mean);
    }
    products.meet(folded, offset);
  }

  const float* turn(const float* from, float* to) const {
    const Coded& x = head.x;
    if (!x.turns || frame == 0) return from;
    const float *cos = x.turns + 2 * frame * x.pairs, *sin = cos + x.pairs;
    const int64_t step = x.interleaved ? 2 : 1, apart = x.interleaved ? 1 : x.pairs;
    std::copy(from, from + dim, to);
    for (int64_t i = 0; i < x.pairs; i++) {
      const int64_t at = x.start + i * step;
      to[at] = from[at] * cos[i] - from[at + apart] * sin[i];
      to[at + apart] = from[at + apart] * cos[i] + from[at] * sin[i];
    }
    return to;
  }

 public:
  // For pages in ascending order.
  CodedKeys(const Segments& s, int64_t b, int64_t h, const float* const* query, Scratch& scratch)
      : head{s, *s.coded, b, h}, query(query), scratch(scratch) {}

  // Scores of a page's tokens; up to VB floats beyond them are written as well.
  void score(int64_t at, float* const* out) {
    const int64_t start = head.s.number(head.b, head.h, at) * page, next = head.x.frame ? start / head.x.frame : 0;
    if (next != frame) meet(next);
    products.score(at, offset, out);
    exact.within(start, start + page, [&](int64_t place, auto token) {
      float scores[R], *score[R];
      for (int r = 0; r < R; r++) score[r] = scores + r;
      dot_full<token.dtype, R>(token.at, dim, 1, dim, query, score);
      for (int r = 0; r < R; r++) out[r][place - start] = scores[r];
    });
  }
};

}  // namespace KVMIX_ISA
