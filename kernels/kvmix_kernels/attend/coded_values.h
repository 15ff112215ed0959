// Weights over coded values. Four tokens of a direction are multiplied at a time, as they lie.
#pragma once
#include "coded.h"

namespace KVMIX_ISA {

constexpr int64_t BLOCK = 1024;  // tokens whose weights are rounded together: sums of their products have 31 bits

// Codes of VB tokens of a direction.
template <int WIDTH, int CHUNK> static INLINE inline Codes direction_codes(const uint8_t* at) {
  constexpr int LOW = low_bits(WIDTH), HIGH = high_bits(WIDTH);
  if constexpr (WIDTH == 0)
    return codes_of<0, VB, 0>(load<vb>(at), vb{});
  else if constexpr (HIGH == 0)
    return codes_of<WIDTH, VB, CHUNK>(plane<LOW>(at, part_of<LOW, VB>(CHUNK)), vb{});
  else
    return codes_of<WIDTH, VB, CHUNK>(plane<LOW>(at, part_of<LOW, VB>(CHUNK)),
                                      plane<HIGH>(at + plane_bytes<LOW>(), part_of<HIGH, VB>(CHUNK)));
}

// R rows of weights over coded values. Sums stay in the basis, see `finish_coded`.
template <int R> class CodedValues {
  const CodedHead head;
  Scratch& scratch;
  const int64_t dim = head.s.dim, page = head.s.page;
  ExactTokens exact;
  float middles[R] = {};  // sums of what codes are multiplied with
  float mass[R] = {};     // sums of the weights of coded tokens

  // Weights times token scales, rounded: for each VB tokens [R] rows of two vectors.
  void fold(int64_t first, int64_t pages, int64_t room, const float* const* weights, float* units) {
    scratch.folded.resize(R * room);
    scratch.words.resize(R * room / 2);
    float* folded = scratch.folded.data();
    vf sums[R] = {}, most[R] = {};
    for (int64_t p = 0, token = 0; p < pages; p++) {
      const uint16_t* scales =
          head.x.scales + offset_of(head.x.scales_strides, head.b, head.h, head.s.place(head.b, head.h, first + p));
      for (int64_t t = 0; t < page; t += W, token += W) {
        const vf scale = half_to_float(scales + t);
        for (int r = 0; r < R; r++) {
          const vf weight = load<vf>(weights[r] + token), product = weight * scale;
          sums[r] += weight;
          most[r] = larger(most[r], magnitude(product));
          store(folded + r * room + token, product);
        }
      }
    }
    for (int r = 0; r < R; r++) {
      mass[r] += sum(sums[r]);
      std::fill(folded + r * room + pages * page, folded + (r + 1) * room, 0.0f);
      const float peak = largest(most[r]);
      units[r] = peak / MOST;
      middles[r] += units[r] * round_row(folded + r * room, room, splat(peak > 0 ? MOST / peak : 0.0f), r);
    }
  }

  // Returns the sum of the integers.
  float round_row(const float* folded, int64_t room, vf inverse, int r) {
    int32_t* to = scratch.words.data() + 2 * r * W;
    vf sums = {};
    for (int64_t t = 0; t < room; t += VB, to += 2 * R * W) {
      vi rounded[4], first, second;
      for (int i = 0; i < 4; i++) rounded[i] = nearest(load<vf>(folded + t + i * W) * inverse);
      split(rounded, first, second);
      store(to, first), store(to + W, second);
      sums += __builtin_convertvector((rounded[0] + rounded[1]) + (rounded[2] + rounded[3]), vf);
    }
    return sum(sums);
  }

  // Give the weights of exact tokens, of `tokens` from `start` on, to what they are: nothing is left for their codes.
  void take_exact(int64_t start, int64_t tokens, float* const* weights, float* const* out) {
    exact.within(start, start + tokens, [&](int64_t place, auto token) {
      const float* weight[R];
      for (int r = 0; r < R; r++) weight[r] = weights[r] + place - start;
      mix_full<token.dtype, R>(token.at, dim, 1, dim, weight, out, true);
      for (int r = 0; r < R; r++) weights[r][place - start] = 0;
    });
  }

  // Add sums of two directions to those at `sums_at`: in each 128 bits one for each row. Codes of the two begin at `from`
  // and `apart` bytes later, those of the next tokens `stride` bytes later. Codes that are read soon begin `ahead` bytes
  // later: pages of one head are far apart, and the hardware does not see it.
  template <int WIDTH>
  KERNEL void multiply(const uint8_t* from, int64_t apart, int64_t stride, int64_t ahead, int64_t room, vf units,
                       float* sums_at) const {
    constexpr int CHUNKS = WIDTH ? UNROLLED_PAGE / VB : 1;
    vi one_sums[4][SUMS] = {}, other_sums[4][SUMS] = {};
    const int32_t* words = scratch.words.data();
    for (int64_t t = 0; t < room; t += CHUNKS * VB, from += stride, words += CHUNKS * 2 * R * W) {
      for (int i = 0; i < UNROLLED_PAGE / 4 * WIDTH; i += 64) __builtin_prefetch(from + ahead + i);
      each<CHUNKS>([&](auto c) INLINE {
        const Codes one = direction_codes<WIDTH, c>(from), other = direction_codes<WIDTH, c>(from + apart);
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

  // Weights of exact tokens are zero after this.
  void mix(int64_t first, int64_t pages, float* const* weights, float* const* out) {
    const int64_t room = (pages * page + VB - 1) / VB * VB;
    float units[R];
    take_exact(head.s.number(head.b, head.h, first) * page, pages * page, weights, out);
    fold(first, pages, room, weights, units);
    vf of_rows = {};
    for (int i = 0; i < W; i++) of_rows[i] = i % 4 < R ? units[i % 4] : 0.0f;
    const int64_t stride = head.x.codes_strides[1];
    const uint8_t *const start = head.codes(first), *from = start;
    float* sums = scratch.sums.data();
    for (int64_t d = 0; d < head.coded; d += RUN, sums += RUN * W) {
      const int width = head.widths[d];
      const int64_t bytes = width * page / 8;
      const uint8_t* next = d + RUN < head.coded ? from + RUN * bytes : start + pages * stride;
      if (page == UNROLLED_PAGE)
        with_width(width, [&](auto known) {
          for (int i = 0; i < RUN; i += 2)
            multiply<known>(from + i * bytes, bytes, stride, next - from, room, of_rows, sums + i * W);
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

}  // namespace KVMIX_ISA
