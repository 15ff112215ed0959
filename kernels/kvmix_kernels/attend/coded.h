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

#include "../runtime/native/simd.h"
#include "contract.h"
#include "plain.h"

namespace KVMIX_ISA {

constexpr int VB = 4 * W;              // bytes of a vector
constexpr int RUN = 8;                 // directions of one width
constexpr int UNROLLED_PAGE = 128;     // tokens of a page that is unpacked by vectors
constexpr int64_t BLOCK = 512;         // tokens whose weights are rounded together

static inline int64_t padded(int64_t tokens) { return (tokens + VB - 1) / VB * VB; }

// Bit planes of a code, lowest bits first; all but two widths have one.
constexpr int low_bits(int width) { return width == 3 ? 2 : width > 4 ? 4 : width; }
constexpr int high_bits(int width) { return width - low_bits(width); }

// A plane of the 128 tokens of a page: vector `part` of it, repeated if it has fewer bytes, each time with the next
// fields lowest.
template <int BITS> constexpr int plane_bytes() { return UNROLLED_PAGE * BITS / 8; }
template <int BITS> constexpr int plane_parts() { return plane_bytes<BITS>() < VB ? 1 : plane_bytes<BITS>() / VB; }

template <int BITS> static INLINE inline vb plane(const uint8_t* at, int part) {
  if constexpr (plane_bytes<BITS>() >= VB)
    return load<vb>(at + part * VB);
  else
    return repeat<plane_bytes<BITS>()>(at);
}

template <int BITS> static INLINE inline vb shifted(vb x) {
  if constexpr (plane_bytes<BITS>() >= VB) return x;
  vu shifts;
  for (int i = 0; i < W; i++) shifts[i] = i * 4 / plane_bytes<BITS>() * BITS;
  return (vb)((vu)x >> shifts);
}

// Fields of tokens `chunk * VB` to `chunk * VB + VB - 1`, which are in part `part_of(chunk)`.
template <int BITS> constexpr int part_of(int chunk) { return chunk * VB % plane_bytes<BITS>() / VB; }
template <int BITS> static INLINE inline vb fields(vb x, int chunk) {
  return (vb)((vu)x >> (chunk * VB / plane_bytes<BITS>() * BITS)) & uint8_t((1 << BITS) - 1);
}

// Codes of VB tokens of a direction, one a byte. Width 0 stands for codes that are one a byte already.
template <int WIDTH> static INLINE inline vb codes_of(const uint8_t* at, int chunk) {
  if constexpr (WIDTH == 0) {
    return load<vb>(at);
  } else {
    constexpr int LOW = low_bits(WIDTH), HIGH = high_bits(WIDTH);
    const vb low = fields<LOW>(shifted<LOW>(plane<LOW>(at, part_of<LOW>(chunk))), chunk);
    if constexpr (HIGH == 0) return low;
    else {
      const vb high = shifted<HIGH>(plane<HIGH>(at + plane_bytes<LOW>(), part_of<HIGH>(chunk)));
      return low | (vb)((vu)fields<HIGH>(high, chunk) << LOW);
    }
  }
}

// A plane of four directions, `apart` bytes from each other, byte by byte together.
template <int BITS> struct Quad {
  vb parts[plane_parts<BITS>()][4];

  INLINE Quad(const uint8_t* at, int64_t apart) {
    each<plane_parts<BITS>()>([&](auto p) INLINE {
      interleave(plane<BITS>(at, p), plane<BITS>(at + apart, p), plane<BITS>(at + 2 * apart, p),
                 plane<BITS>(at + 3 * apart, p), parts[p]);
      each<4>([&](auto i) INLINE { parts[p][i] = shifted<BITS>(parts[p][i]); });
    });
  }
};

// Codes of a run of directions of 128 tokens: four directions together for each token. The same bytes from `ahead` on are
// asked for: pages of one head are far apart, and the hardware does not see it.
template <int WIDTH> KERNEL static void unpack_run(const uint8_t* from, const uint8_t* ahead, uint8_t* out) {
  constexpr int LOW = low_bits(WIDTH), HIGH = high_bits(WIDTH), BYTES = UNROLLED_PAGE * WIDTH / 8;
  for (int i = 0; i < RUN * BYTES; i += 64) __builtin_prefetch(ahead + i);
  for (int quad = 0; quad < RUN; quad += 4, from += 4 * BYTES) {
    const Quad<LOW> low(from, BYTES);
    each<UNROLLED_PAGE / VB>([&](auto c) INLINE {
      each<4>([&](auto i) INLINE { store(out + (4 * c + i) * VB, fields<LOW>(low.parts[part_of<LOW>(c)][i], c)); });
    });
    if constexpr (HIGH > 0) {
      const Quad<HIGH> high(from + plane_bytes<LOW>(), BYTES);
      each<UNROLLED_PAGE / VB>([&](auto c) INLINE {
        each<4>([&](auto i) INLINE {
          uint8_t* to = out + (4 * c + i) * VB;
          store(to, load<vb>(to) | (vb)((vu)fields<HIGH>(high.parts[part_of<HIGH>(c)][i], c) << LOW));
        });
      });
    }
    out += 4 * UNROLLED_PAGE;
  }
}

// The same for a page of any length, directions one after the other, `stride` bytes apart, each code a byte.
static void unpack_any(int width, const uint8_t* from, int64_t page, uint8_t* out, int64_t stride) {
  for (int d = 0; d < RUN; d++, out += stride) {
    std::memset(out, 0, page);
    for (int shift = 0; shift < width;) {
      const int bits = width - shift >= 4 ? 4 : width - shift >= 2 ? 2 : 1;
      const int64_t bytes = page * bits / 8;
      for (int64_t token = 0; token < page; token++)
        out[token] |= (from[token % bytes] >> (token / bytes * bits) & ((1 << bits) - 1)) << shift;
      from += bytes;
      shift += bits;
    }
  }
}

// work(width), with a width that the compiler knows.
template <class Work> static inline void with_width(int width, Work work) {
  switch (width) {
    case 1: return work(std::integral_constant<int, 1>{});
    case 2: return work(std::integral_constant<int, 2>{});
    case 3: return work(std::integral_constant<int, 3>{});
    case 4: return work(std::integral_constant<int, 4>{});
    case 5: return work(std::integral_constant<int, 5>{});
    default: return work(std::integral_constant<int, 6>{});
  }
}

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
  const int64_t offset, count;  // of the head, its tokens
  const int32_t* const places;
  int64_t next = 0;

 public:
  explicit ExactTokens(const CodedHead& head)
      : x(head.x),
        offset(head.b * x.exact_strides[0] + head.h * x.exact_strides[1]),
        count(x.places ? x.exact_tokens : 0),
        places(x.places + head.b * x.places_strides[0] + head.h * x.places_strides[1]) {}

  // work(place, elements) of those in [first, last), in a dtype that the compiler knows; ranges come in ascending order.
  template <class Work> void within(int64_t first, int64_t last, Work work) {
    next = std::lower_bound(places + next, places + count, first) - places;
    if (next == count || places[next] >= last) return;
    with_dtype(x.exact_dtype, x.exact, offset, [&](auto tokens) {
      for (; next < count && places[next] < last; next++)
        work(places[next], Elements<tokens.dtype>{tokens.from(next * x.exact_strides[2])});
    });
  }
};

// out = 32639 / unit times `a`, rounded, in two words for every four. Returns the sum of out.
static inline double round_coefficients(const float* a, int64_t count, int16_t* rounded, float* unit) {
  vf most = {};
  for (int64_t i = 0; i < count; i += W) most = larger(most, magnitude(load<vf>(a + i)));
  const float peak = largest(most);
  const vf inverse = splat(peak > 0 ? MOST / peak : 0.0f);
  vi sums = {};
  for (int64_t i = 0; i < count; i += W) {
    const vi x = nearest(load<vf>(a + i) * inverse);
    sums += x;
    store(rounded + i, __builtin_convertvector(x, vs));
  }
  *unit = peak / MOST;
  int64_t total = 0;
  for (int i = 0; i < W; i++) total += sums[i];
  return double(total);
}

// R queries over coded keys.
template <int R> class CodedKeys {
  const CodedHead head;
  const float* const* const query;
  Scratch& scratch;
  const int64_t dim = head.s.dim, page = head.s.page, stride = padded(page), vectors = stride / W;
  const int64_t quads = head.coded / 4;
  ExactTokens exact;
  int64_t frame = -1;
  float unit[R], offset[R];

  // The coefficients of a frame.
  void meet(int64_t next) {
    frame = next;
    scratch.turned.resize(R * dim);
    scratch.folded.resize(R * dim);
    scratch.rounded.resize(R * dim);
    scratch.words.resize(2 * R * quads);
    scratch.split.resize(2 * quads);
    const float* turned[R];
    float* folded[R];
    for (int r = 0; r < R; r++) {
      turned[r] = turn(query[r], scratch.turned.data() + r * dim);
      folded[r] = scratch.folded.data() + r * dim;
    }
    const int64_t columns = (head.coded + W - 1) / W * W;
    mix_full<FLOAT32, R>(head.decoding, dim, dim, columns, turned, folded, false);
    for (int r = 0; r < R; r++) {
      int16_t* rounded = scratch.rounded.data() + r * dim;
      int32_t *two = scratch.split.data(), *words = scratch.words.data() + 2 * r;
      round_coefficients(folded[r], columns, rounded, unit + r);
      split(rounded, 4 * quads, two, two + quads);
      for (int64_t i = 0; i < quads; i++) words[2 * R * i] = two[i], words[2 * R * i + 1] = two[quads + i];
      vf middle = {}, mean = {};
      for (int64_t d = 0; d < columns; d += W)
        middle += __builtin_convertvector(load<vs>(rounded + d), vf) * load<vf>(head.middles + d);
      for (int64_t e = 0; e < dim; e += W) mean += load<vf>(turned[r] + e) * load<vf>(head.mean + e);
      offset[r] = sum(mean) - unit[r] * sum(middle);
    }
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

  // Codes of four directions together, for each token.
  void unpack(int64_t at) {
    scratch.codes.resize(4 * quads * stride);
    const uint8_t* from = head.codes(at);
    uint8_t* to = scratch.codes.data();
    for (int64_t d = 0; d < head.coded; d += RUN, to += RUN * stride) {
      const int width = head.widths[d];
      if (page == UNROLLED_PAGE)
        with_width(width, [&](auto known) { unpack_run<known>(from, from + head.x.codes_strides[1], to); });
      else
        interleave_run(width, from, to);
      from += width * page;
    }
  }

  void interleave_run(int width, const uint8_t* from, uint8_t* to) {
    scratch.run.resize(RUN * stride);
    uint8_t* run = scratch.run.data();
    unpack_any(width, from, page, run, stride);
    for (int quad = 0; quad < RUN; quad += 4)
      for (int64_t k = 0; k < stride; k += VB, to += 4 * VB) {
        const uint8_t* four = run + quad * stride + k;
        vb together[4];
        interleave(load<vb>(four), load<vb>(four + stride), load<vb>(four + 2 * stride), load<vb>(four + 3 * stride),
                   together);
        for (int i = 0; i < 4; i++) store(to + i * VB, together[i]);
      }
  }

  KERNEL void multiply(float* const* out) const {
    for (int64_t v = 0; v < vectors; v += TOGETHER) {
      vi sums[R][TOGETHER][SUMS] = {};
      const uint8_t* codes = scratch.codes.data() + v * VB;
      const int32_t* words = scratch.words.data();
      for (int64_t quad = 0; quad < quads; quad++, words += 2 * R, codes += vectors * VB)
        each<R>([&](auto r) INLINE {
          const Splat word(words + 2 * r);
          each<TOGETHER>([&](auto i) INLINE { add_codes(sums[r][i], load<vb>(codes + i * VB), word); });
        });
      each<R>([&](auto r) INLINE {
        each<TOGETHER>([&](auto i) INLINE { place(total(sums[r][i]), v % 4 + i, r, out[r] + v / 4 * VB); });
      });
    }
  }

  // Scores of vector `k` of four.
  void place(vi sums, int k, int r, float* to) const {
    const vf scores = __builtin_convertvector(sums, vf) * unit[r] + offset[r];
    for (int block = 0; block < W / 4; block++)
      std::memcpy(to + place_of(k, block), reinterpret_cast<const float*>(&scores) + 4 * block, 16);
  }

 public:
  // For pages in ascending order.
  CodedKeys(const Segments& s, int64_t b, int64_t h, const float* const* query, Scratch& scratch)
      : head{s, *s.coded, b, h}, query(query), scratch(scratch), exact(head) {}

  // Scores of a page's tokens; up to VB floats beyond them are written as well.
  void score(int64_t at, float* const* out) {
    const int64_t start = head.s.number(head.b, head.h, at) * page, next = head.x.frame ? start / head.x.frame : 0;
    if (next != frame) meet(next);
    unpack(at);
    multiply(out);
    exact.within(start, start + page, [&](int64_t place, auto token) {
      float scores[R], *score[R];
      for (int r = 0; r < R; r++) score[r] = scores + r;
      dot_full<token.dtype, R>(token.at, dim, 1, dim, query, score);
      for (int r = 0; r < R; r++) out[r][place - start] = scores[r];
    });
  }
};

// R rows of weights over coded values. Sums stay in the basis, see `finish_coded`.
template <int R> class CodedValues {
  const CodedHead head;
  Scratch& scratch;
  const int64_t dim = head.s.dim, page = head.s.page;
  ExactTokens exact;
  float middles[R] = {};  // sums of what codes are multiplied with
  float mass[R] = {};     // sums of the weights of coded tokens

  // Weights times token scales, rounded: for each VB tokens [R] rows of two vectors. `out` gets the exact tokens.
  void fold(int64_t first, int64_t pages, int64_t room, const float* const* weights, float* const* out, float* units) {
    const int64_t tokens = pages * page;
    scratch.folded.resize(R * room);
    scratch.rounded.resize(room);
    scratch.words.resize(R * room / 2);
    float* folded = scratch.folded.data();
    vf sums[R] = {};
    for (int64_t p = 0, token = 0; p < pages; p++) {
      const uint16_t* scales = head.x.scales + offset_of(head.x.scales_strides, head.b, head.h, head.s.place(head.b, head.h, first + p));
      for (int64_t t = 0; t < page; t += W, token += W) {
        const vf scale = half_to_float(scales + t);
        for (int r = 0; r < R; r++) {
          const vf weight = load<vf>(weights[r] + token);
          sums[r] += weight;
          store(folded + r * room + token, weight * scale);
        }
      }
    }
    for (int r = 0; r < R; r++) {
      mass[r] += sum(sums[r]);
      std::fill(folded + r * room + tokens, folded + (r + 1) * room, 0.0f);
    }
    take_exact(head.s.number(head.b, head.h, first) * page, tokens, room, weights, out);
    for (int r = 0; r < R; r++) {
      const double total = round_coefficients(folded + r * room, room, scratch.rounded.data(), units + r);
      for (int64_t t = 0; t < room; t += VB) {
        int32_t* to = scratch.words.data() + 2 * (t / VB * R + r) * W;
        split(scratch.rounded.data() + t, VB, to, to + W);
      }
      middles[r] += float(units[r] * total);
    }
  }

  // Give the weights of exact tokens, of `tokens` from `start` on, to what they are, instead of to their codes.
  void take_exact(int64_t start, int64_t tokens, int64_t room, const float* const* weights, float* const* out) {
    exact.within(start, start + tokens, [&](int64_t place, auto token) {
      const float* weight[R];
      for (int r = 0; r < R; r++) {
        weight[r] = weights[r] + place - start;
        mass[r] -= *weight[r];
        scratch.folded[r * room + place - start] = 0;
      }
      mix_full<token.dtype, R>(token.at, dim, 1, dim, weight, out, true);
    });
  }

  // Add sums of two directions to those at `sums_at`: in each 128 bits one for each row. Codes of the two begin at `from`
  // and `apart` bytes later, those of the next tokens `stride` bytes later.
  template <int WIDTH>
  KERNEL void multiply(const uint8_t* from, int64_t apart, int64_t stride, int64_t ahead, int64_t room, vf units,
                       float* sums_at) const {
    constexpr int CHUNKS = WIDTH ? UNROLLED_PAGE / VB : 1;
    vi one_sums[4][SUMS] = {}, other_sums[4][SUMS] = {};
    const int32_t* words = scratch.words.data();
    for (int64_t t = 0; t < room; t += CHUNKS * VB, from += stride, words += CHUNKS * 2 * R * W) {
      for (int i = 0; i < UNROLLED_PAGE / 4 * WIDTH; i += 64) __builtin_prefetch(from + ahead + i);
      each<CHUNKS>([&](auto c) INLINE {
        const vb one = codes_of<WIDTH>(from, c), other = codes_of<WIDTH>(from + apart, c);
        each<R>([&](auto r) INLINE {
          const int32_t* word = words + 2 * (c * R + r) * W;
          const vi first = in_register(load<vi>(word)), second = in_register(load<vi>(word + W));
          add_codes(one_sums[r], one, first, second);
          add_codes(other_sums[r], other, first, second);
        });
      });
    }
    add_rows(one_sums, units, sums_at);
    add_rows(other_sums, units, sums_at + W);
  }

  static INLINE void add_rows(const vi (&sums)[4][SUMS], vf units, float* to) {
    const vi rows = sum_quarters(total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3]));
    store(to, load<vf>(to) + __builtin_convertvector(rows, vf) * units);
  }

 public:
  // For pages in ascending order.
  CodedValues(const Segments& s, int64_t b, int64_t h, Scratch& scratch)
      : head{s, *s.coded, b, h}, scratch(scratch), exact(head) {
    scratch.sums.assign(head.coded * W, 0.0f);
  }

  // Pages that fit a block, or one; those of a table need not follow one another in memory.
  int64_t pages_together() const { return page < BLOCK && !head.s.table ? BLOCK / page : 1; }

  void mix(int64_t first, int64_t pages, const float* const* weights, float* const* out) {
    const int64_t room = padded(pages * page);
    float units[R];
    fold(first, pages, room, weights, out, units);
    vf of_rows = {};
    for (int i = 0; i < W; i++) of_rows[i] = i % 4 < R ? units[i % 4] : 0.0f;
    const int64_t stride = head.x.codes_strides[1];
    const uint8_t* from = head.codes(first);
    float* sums = scratch.sums.data();
    for (int64_t d = 0; d < head.coded; d += RUN, sums += RUN * W) {
      const int width = head.widths[d];
      const int64_t bytes = width * page / 8;
      if (page == UNROLLED_PAGE)
        with_width(width, [&](auto known) {
          for (int i = 0; i < RUN; i += 2)
            multiply<known>(from + i * bytes, bytes, stride, pages * stride, room, of_rows, sums + i * W);
        });
      else
        multiply_any(width, from, pages, room, of_rows, sums);
      from += RUN * bytes;
    }
  }

  void multiply_any(int width, const uint8_t* from, int64_t pages, int64_t room, vf units, float* sums) {
    scratch.run.resize(RUN * room);
    uint8_t* run = scratch.run.data();
    for (int64_t p = 0; p < pages; p++)
      unpack_any(width, from + p * head.x.codes_strides[1], page, run + p * page, room);
    for (int i = 0; i < RUN; i += 2) multiply<0>(run + i * room, room, VB, 0, room, units, sums + i * W);
  }

  // Add up what the basis has: `out[r]` is [dim] of exact tokens, [dim] sums of centred codes, and the weights' sum.
  void finish(float* const* out) const {
    for (int64_t d = 0; d < head.coded; d++)
      for (int r = 0; r < R; r++) {
        float total = 0;
        for (int i = r; i < W; i += 4) total += scratch.sums[d * W + i];
        out[r][dim + d] = total - middles[r] * head.middles[d];
      }
    for (int r = 0; r < R; r++) out[r][2 * dim] = mass[r];
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
