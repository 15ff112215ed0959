// Attention over pages of transform codes (transform_layout.py), heads of any widths.
//
// A token is y = mean + decoding (code - middle), `decoding` being the decoder with the steps in it. So
//
//     q . y         =  c . code + (q . mean - c . middle)                  with c = decoding^T q
//     sum_t w_t y_t =  decoding sum_t (w_t s_t) (code_t - middle) + (sum_t w_t) mean
//
// c is computed once a frame, after the query has been turned to it; the product with `decoding` on the left once a
// query head, after all tokens. In between there are codes times coefficients, which are rounded to 16 bits: what they
// are centred with is computed from the rounded ones. Directions of 0 bits have no codes, and nothing is read of them.
// Exact tokens are met by the query as it is; their codes weigh nothing.
#pragma once
#include <algorithm>

#include "contract.h"
#include "planes.h"
#include "plain.h"

namespace KVMIX_ISA {

// One KV head of a coded tensor.
struct CodedHead {
  const Segments& s;
  const Coded& x;
  const int64_t b, h;
  const uint8_t* const widths = x.widths + h * s.dim;
  const float* const decoding = x.decoding + h * s.dim * s.dim;
  const float* const mean = x.mean + h * s.dim;
  const float* const middles = x.middles + h * s.dim;
  const int64_t coded = s.dim - std::count(widths, widths + s.dim, 0);  // directions that have codes, in whole runs

  const uint8_t* codes(int64_t page) const {
    return x.codes + b * x.codes_strides[0] + s.place(b, h, page) * x.codes_strides[1] + x.offsets[h];
  }
};

// The exact tokens of one KV head, in the order of their places.
class ExactTokens {
  const Coded& x;
  const int64_t offset, count, dim;  // of the head, its tokens
  const int32_t* const places;
  int64_t next = 0;

 public:
  explicit ExactTokens(const CodedHead& head)
      : x(head.x),
        offset(head.b * x.exact_strides[0] + head.h * x.exact_strides[1]),
        count(x.places ? x.exact_tokens : 0),
        dim(head.s.dim),
        places(x.places + head.b * x.places_strides[0] + head.h * x.places_strides[1]) {}

  // work(place, elements) of those in [first, last), in a dtype that the compiler knows; ranges come in ascending order.
  template <class Work> void within(int64_t first, int64_t last, Work work) {
    next = std::lower_bound(places + next, places + count, first) - places;
    if (next == count || places[next] >= last) return;
    with_dtype(x.exact_dtype, x.exact, offset, [&](auto tokens) {
      for (; next < count && places[next] < last; next++)
        work(places[next], Elements<tokens.dtype>{tokens.from(next * x.exact_strides[2])});
      if (next == count) return;
      const char *from = static_cast<const char*>(tokens.from(next * x.exact_strides[2])), *end = from + dim * 4;
      for (; from < end; from += 64) __builtin_prefetch(from);
    });
  }
};

// Floats of an output that may have a coded part: what is in the model's own channels, and what is in the basis.
static inline int64_t coded_width(int64_t dim) { return 2 * dim + 1; }

// Add to the first [dim] floats of a sum what its others stand for.
static inline void finish_coded(const Segments& s, int64_t b, int64_t h, float* sum) {
  const CodedHead head{s, *s.coded, b, h};
  const float *codes = sum + s.dim, mass = sum[2 * s.dim];
  for (int64_t e = 0; e < s.dim; e++) {
    float decoded, *out = &decoded;
    dot_full<FLOAT32, 1>(head.decoding + e * s.dim, s.dim, 1, s.dim, &codes, &out);
    sum[e] += decoded + mass * head.mean[e];
  }
}

}  // namespace KVMIX_ISA
