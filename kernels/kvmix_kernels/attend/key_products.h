// Scores of pages of keys by multiplication.
//
// Four directions of a token are multiplied at a time. Their planes are put together byte by byte as they are packed, once
// a page, and fields are taken out of them where they are multiplied. A vector has SPAN tokens of `ABREAST` such quads.
#pragma once
#include "coded.h"

namespace KVMIX_ISA {

constexpr int SPAN = VB < 32 ? VB : 32;      // tokens of a chunk
constexpr int ABREAST = VB / SPAN;           // quads that are multiplied by one vector: 2 where vectors have 512 bits
constexpr int UNIT_DIRECTIONS = 4 * ABREAST;
constexpr int UNITS = RUN / UNIT_DIRECTIONS;  // in a run
constexpr int TOGETHER = 2;                  // vectors of codes that are multiplied with the same coefficients

// Vectors of a unit of some width, of a whole page.
template <int WIDTH> constexpr int unit_vectors() {
  constexpr int HIGH = high_bits(WIDTH);
  int count = 4 * parts<low_bits(WIDTH), SPAN>();
  if constexpr (HIGH > 0) count += 4 * parts<HIGH, SPAN>();
  return count;
}

// Part of a plane of a direction, and beside it that of the direction four later, if ABREAST is 2.
template <int BITS>
static INLINE inline vb abreast(const uint8_t* at, [[maybe_unused]] int64_t apart, [[maybe_unused]] int part) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  const uint8_t *one = at + part * SPAN, *other = one + 4 * apart;
  if constexpr (plane_bytes<BITS>() < SPAN)
    return (vb)_mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)one))),
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)other)), 1);
  else
    return (vb)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)one)),
                                  _mm256_loadu_si256((const __m256i*)other), 1);
#else
  if constexpr (plane_bytes<BITS>() < SPAN)
    return repeat<plane_bytes<BITS>()>(at);
  else
    return load<vb>(at + part * SPAN);
#endif
}

// Part of a plane of a unit, byte by byte together: four vectors.
template <int BITS>
static INLINE inline void interleave_part(const uint8_t* from, int64_t apart, int part, uint8_t* to) {
  vb quads[4];
  interleave(abreast<BITS>(from, apart, part), abreast<BITS>(from + apart, apart, part),
             abreast<BITS>(from + 2 * apart, apart, part), abreast<BITS>(from + 3 * apart, apart, part), quads);
  each<4>([&](auto i) INLINE { store(to + i * VB, advanced<BITS, SPAN>(quads[i])); });
}

template <int BITS> static INLINE inline void interleave_plane(const uint8_t* from, int64_t apart, uint8_t* to) {
  each<parts<BITS, SPAN>()>([&](auto part) INLINE { interleave_part<BITS>(from, apart, part, to + 4 * part * VB); });
}

// A run of directions of 128 tokens.
template <int WIDTH> KERNEL static void interleave_run(const uint8_t* from, uint8_t* to) {
  constexpr int LOW = low_bits(WIDTH), HIGH = high_bits(WIDTH), BYTES = UNROLLED_PAGE * WIDTH / 8;
  for (int unit = 0; unit < UNITS; unit++, from += UNIT_DIRECTIONS * BYTES, to += unit_vectors<WIDTH>() * VB) {
    interleave_plane<LOW>(from, BYTES, to);
    if constexpr (HIGH > 0) interleave_plane<HIGH>(from + plane_bytes<LOW>(), BYTES, to + 4 * parts<LOW, SPAN>() * VB);
  }
}

// The two vectors of coefficients of a unit.
static INLINE inline void coefficients_of(const int32_t* words, vi& first, vi& second) {
  if constexpr (ABREAST == 1)
    first = vi{} + words[0], second = vi{} + words[1];
  else
    first = load<vi>(words), second = load<vi>(words + W);
  first = in_register(first), second = in_register(second);
}

// Scores of two vectors of sums, whose quads that are side by side belong together, to where the tokens are.
static INLINE inline void place(vi a, vi b, vf unit, vf offset, float* to) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  const __m512i one = _mm512_shuffle_i64x2((__m512i)a, (__m512i)b, 0x44);
  const __m512i other = _mm512_shuffle_i64x2((__m512i)a, (__m512i)b, 0xee);
  const vf scores = __builtin_convertvector((vi)_mm512_add_epi32(one, other), vf) * unit + offset;
  const __m512 sorted = _mm512_shuffle_f32x4((__m512)scores, (__m512)scores, 0xd8);
  _mm256_storeu_ps(to, _mm512_castps512_ps256(sorted));
  _mm256_storeu_ps(to + 16, _mm512_extractf32x8_ps(sorted, 1));
#else
  const vf x = __builtin_convertvector(a, vf) * unit + offset, y = __builtin_convertvector(b, vf) * unit + offset;
  for (int i = 0; i < W / 4; i++) {
    std::memcpy(to + 16 * i, reinterpret_cast<const float*>(&x) + 4 * i, 16);
    std::memcpy(to + 16 * i + 4, reinterpret_cast<const float*>(&y) + 4 * i, 16);
  }
#endif
}

// R queries over the codes of keys.
template <int R> class KeyProducts {
  static constexpr int ALIKE = ABREAST == 1 ? 1 : W / ABREAST;  // lanes that a quad's coefficients are written to
  static constexpr int WORDS = 2 * R * ABREAST * ALIKE;         // of the coefficients of a unit

  const CodedHead& head;
  Scratch& scratch;
  const int64_t page = head.s.page, chunks = (page + SPAN - 1) / SPAN;
  const int64_t units = head.coded / UNIT_DIRECTIONS;
  int64_t units_of[WIDEST + 1] = {}, slice = 0;
  const uint8_t* ahead = nullptr;
  float unit[R];

  // Round the coefficients of a query. Returns their product with the middles of codes.
  float round_query(const float* folded, vf inverse, int r) {
    vf middle = {};
    for (int64_t d = 0; d < head.coded; d += 4 * W) {
      vi rounded[4], first, second;
      for (int i = 0; i < 4; i++) {
        rounded[i] = nearest(load<vf>(folded + d + i * W) * inverse);
        if (d + i * W < head.coded) middle += __builtin_convertvector(rounded[i], vf) * load<vf>(head.middles + d + i * W);
      }
      split(rounded, first, second);
      int32_t words[2 * W];
      store(words, first), store(words + W, second);
      for (int64_t quad = 0; quad < W && d / 4 + quad < units * ABREAST; quad++) {
        const int64_t at = d / 4 + quad;
        int32_t* to = scratch.words.data() + at / ABREAST * WORDS + r * (WORDS / R) + at % ABREAST * ALIKE;
        for (int i = 0; i < ALIKE; i++) to[i] = words[quad], to[ABREAST * ALIKE + i] = words[W + quad];
      }
    }
    return sum(middle);
  }

  // All runs of a page, as `multiply` takes them.
  void interleave_page(int64_t at) {
    const uint8_t* from = head.codes(at);
    uint8_t* to = scratch.codes.data();
    for (int64_t d = 0; d < head.coded; d += RUN) {
      const int width = head.widths[d];
      if (page == UNROLLED_PAGE)
        with_width(width, [&](auto known) {
          interleave_run<known>(from, to);
          to += UNITS * unit_vectors<known>() * VB;
        });
      else
        to = interleave_any(width, from, to);
      from += width * page;
    }
  }

  // A run of a page of any length, one code a byte.
  uint8_t* interleave_any(int width, const uint8_t* from, uint8_t* to) {
    const int64_t stride = chunks * SPAN;
    scratch.run.resize(RUN * stride);
    uint8_t* run = scratch.run.data();
    unpack_any(width, from, page, run, stride);
    for (int unit = 0; unit < UNITS; unit++, run += UNIT_DIRECTIONS * stride)
      for (int64_t chunk = 0; chunk < chunks; chunk++, to += 4 * VB) interleave_part<8>(run, stride, chunk, to);
    return to;
  }

  // Ask for bytes of the next page: pages of one head are far apart, and the hardware does not see it.
  INLINE void fetch(int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(ahead + first + i);
  }

  // Scores of the tokens of a chunk. accumulate(sums, codes, words, v) adds the products of the vectors from v on.
  template <class Accumulate> INLINE void multiply(int64_t chunk, const float* offset, float* const* out, Accumulate accumulate) const {
    for (int v = 0; v < 4; v += TOGETHER) {
      fetch((4 * chunk + v) / TOGETHER * slice, slice);
      vi sums[R][TOGETHER][SUMS] = {};
      accumulate(sums, scratch.codes.data() + v * VB, scratch.words.data());
      each<R>([&](auto r) INLINE {
        place(total(sums[r][0]), total(sums[r][1]), splat(unit[r]), splat(offset[r]), out[r] + chunk * SPAN + 4 * v);
      });
    }
  }

  template <int WIDTH, int CHUNK>
  static INLINE void add_unit(vi (&sums)[R][TOGETHER][SUMS], const uint8_t* low, const uint8_t* high, const int32_t* words) {
    Codes codes[TOGETHER];
    each<TOGETHER>([&](auto i) INLINE {
      codes[i] = codes_of<WIDTH, SPAN, CHUNK>(load<vb>(low + i * VB), load<vb>(high + i * VB));
    });
    each<R>([&](auto r) INLINE {
      vi first, second;
      coefficients_of(words + WORDS / R * r, first, second);
      each<TOGETHER>([&](auto i) INLINE { add_codes(sums[r][i], codes[i], first, second); });
    });
  }

  template <int CHUNK> KERNEL void multiply_chunk(const float* offset, float* const* out) const {
    multiply(CHUNK, offset, out, [&](auto& sums, const uint8_t* codes, const int32_t* words) INLINE {
      each<WIDEST>([&](auto narrower) INLINE {
        constexpr int WIDTH = WIDEST - narrower, LOW = low_bits(WIDTH), HIGH = high_bits(WIDTH);
        constexpr int AT = 4 * part_of<LOW, SPAN>(CHUNK) * VB;
        for (int64_t left = units_of[WIDTH]; left; left--, codes += unit_vectors<WIDTH>() * VB, words += WORDS) {
          const uint8_t* high = codes;
          if constexpr (HIGH > 0) high += 4 * (parts<LOW, SPAN>() + part_of<HIGH, SPAN>(CHUNK)) * VB;
          add_unit<WIDTH, CHUNK>(sums, codes + AT, high, words);
        }
      });
    });
  }

  KERNEL void multiply_any(int64_t chunk, const float* offset, float* const* out) const {
    multiply(chunk, offset, out, [&](auto& sums, const uint8_t* codes, const int32_t* words) INLINE {
      codes += chunk * 4 * VB;
      for (int64_t left = units; left; left--, codes += chunks * 4 * VB, words += WORDS)
        add_unit<0, 0>(sums, codes, codes, words);
    });
  }

 public:
  KeyProducts(const CodedHead& head, Scratch& scratch) : head(head), scratch(scratch) {
    int64_t bytes = 0;
    for (int64_t d = 0; d < head.coded; d += UNIT_DIRECTIONS) {
      units_of[head.widths[d]]++;
      bytes += UNIT_DIRECTIONS * head.widths[d] * page / 8;
    }
    slice = (bytes * TOGETHER / (4 * chunks) + 63) / 64 * 64;  // of a page, while TOGETHER vectors are multiplied
  }

  // Take coefficients of the directions that have codes, and from `offset` what their middles stand for.
  void meet(const float* const* coefficients, float* offset) {
    scratch.words.resize(units * WORDS + 2 * W);
    scratch.codes.resize(units * (chunks * 4 + 8) * VB);
    for (int r = 0; r < R; r++) {
      vf most = {};
      for (int64_t d = 0; d < head.coded; d += W) most = larger(most, magnitude(load<vf>(coefficients[r] + d)));
      const float peak = largest(most);
      unit[r] = peak / MOST;
      offset[r] -= unit[r] * round_query(coefficients[r], splat(peak > 0 ? MOST / peak : 0.0f), r);
    }
  }

  // Scores of a page's tokens; up to VB floats beyond them are written as well.
  void score(int64_t at, const float* offset, float* const* out) {
    interleave_page(at);
    ahead = head.codes(at) + head.x.codes_strides[1];
    if (page == UNROLLED_PAGE)
      each<UNROLLED_PAGE / SPAN>([&](auto chunk) INLINE { multiply_chunk<chunk>(offset, out); });
    else
      for (int64_t chunk = 0; chunk < chunks; chunk++) multiply_any(chunk, offset, out);
  }
};

}  // namespace KVMIX_ISA
