// Codes, one a byte and below 64, times coefficients of 16 bits, of at most MOST: a lane sums the products of four
// neighbouring codes.
#pragma once
#include "../runtime/native/simd.h"

namespace KVMIX_ISA {

constexpr int VB = 4 * W;      // bytes of a vector
constexpr int MOST = 32639;    // 127 * 256 + 127

#if KVMIX_WIDTH == 16 && defined(__AVX512VNNI__)
// Coefficients are two signed bytes, 256 high + low, which are multiplied apart.
constexpr int SUMS = 2;

struct Codes {
  vb bytes;

  INLINE Codes operator|(Codes x) const { return {bytes | x.bytes}; }
};

// The bits of MASK in each byte, after it has been shifted to the right, or to the left if SHIFT is negative.
template <int SHIFT, int MASK> static INLINE inline Codes codes_at(vb x) {
  const vu shifted = SHIFT < 0 ? (vu)x << -SHIFT : (vu)x >> SHIFT;
  return {(vb)shifted & uint8_t(MASK)};
}

static INLINE inline void add_codes(vi (&sums)[SUMS], Codes codes, vi first, vi second) {
  sums[0] = (vi)_mm512_dpbusd_epi32((__m512i)sums[0], (__m512i)codes.bytes, (__m512i)first);
  sums[1] = (vi)_mm512_dpbusd_epi32((__m512i)sums[1], (__m512i)codes.bytes, (__m512i)second);
  asm("" : "+v"(sums[0]), "+v"(sums[1]));
}

static INLINE inline vi total(const vi (&sums)[SUMS]) { return (sums[0] << 8) + sums[1]; }
#else
// Codes become words of 16 bits: those of even bytes, and those of odd ones.
constexpr int SUMS = 1;

struct Codes {
  vw even, odd;

  INLINE Codes operator|(Codes x) const { return {even | x.even, odd | x.odd}; }
};

template <int SHIFT, int MASK> static INLINE inline Codes codes_at(vb x) {
  const vq even = SHIFT < 0 ? (vq)x << -SHIFT : (vq)x >> SHIFT;
  return {(vw)(even & uint16_t(MASK)), (vw)((vq)x >> (8 + SHIFT) & uint16_t(MASK))};
}

static INLINE inline void add_codes(vi (&sums)[SUMS], Codes codes, vi first, vi second) {
  add_products(sums[0], codes.even, (vw)first);
  add_products(sums[0], codes.odd, (vw)second);
}

static INLINE inline vi total(const vi (&sums)[SUMS]) { return sums[0]; }
#endif

// In each 128 bits the lanes of a as words of 16 bits, then those of b.
static inline vw narrowed(vi a, vi b) {
#if KVMIX_WIDTH == 16 && defined(__AVX512BW__)
  return (vw)_mm512_packs_epi32((__m512i)a, (__m512i)b);
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  return (vw)_mm256_packs_epi32((__m256i)a, (__m256i)b);
#elif KVMIX_WIDTH == 4 && defined(__SSE2__)
  return (vw)_mm_packs_epi32((__m128i)a, (__m128i)b);
#else
  static_assert(W == 4, "vectors of 128 bits");
  return vw{int16_t(a[0]), int16_t(a[1]), int16_t(a[2]), int16_t(a[3]),
            int16_t(b[0]), int16_t(b[1]), int16_t(b[2]), int16_t(b[3])};
#endif
}

// Of vectors that hold, in each 128 bits, lanes of four vectors one after the other: all lanes of the first, and so on.
static inline vi in_order(vi x) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return (vi)_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), (__m512i)x);
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  return (vi)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#else
  return x;
#endif
}

// The coefficients of 4 W codes as `add_codes` takes them, from as many integers of up to MOST.
static inline void split(const vi (&x)[4], vi& first, vi& second) {
  const vw a = narrowed(x[0], x[1]), b = narrowed(x[2], x[3]);
#if KVMIX_WIDTH == 16 && defined(__AVX512VNNI__)
  const __m512i high = _mm512_packs_epi16((__m512i)((a + int16_t(128)) >> 8), (__m512i)((b + int16_t(128)) >> 8));
  const __m512i low = _mm512_packus_epi16((__m512i)(a & int16_t(255)), (__m512i)(b & int16_t(255)));
  first = in_order((vi)high), second = in_order((vi)low);
#elif KVMIX_WIDTH == 16 && defined(__AVX512BW__)
  const __m512i p = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16((__m512i)a, 0xd8), 0xd8);
  const __m512i q = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16((__m512i)b, 0xd8), 0xd8);
  first = in_order((vi)_mm512_shuffle_ps((__m512)p, (__m512)q, 0x88));
  second = in_order((vi)_mm512_shuffle_ps((__m512)p, (__m512)q, 0xdd));
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  const __m256i p = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16((__m256i)a, 0xd8), 0xd8);
  const __m256i q = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16((__m256i)b, 0xd8), 0xd8);
  first = in_order((vi)_mm256_shuffle_ps((__m256)p, (__m256)q, 0x88));
  second = in_order((vi)_mm256_shuffle_ps((__m256)p, (__m256)q, 0xdd));
#else
  static_assert(W == 4, "vectors of 128 bits");
  first = (vi)vw{a[0], a[2], a[4], a[6], b[0], b[2], b[4], b[6]};
  second = (vi)vw{a[1], a[3], a[5], a[7], b[1], b[3], b[5], b[7]};
#endif
}

// Byte i of a, of b, of c, of d, then the next i: four vectors, whose lanes go to `place_of`.
static inline void interleave(vb a, vb b, vb c, vb d, vb (&out)[4]) {
#if KVMIX_WIDTH == 16 && defined(__AVX512BW__)
  const __m512i ab = _mm512_unpacklo_epi8((__m512i)a, (__m512i)b), cd = _mm512_unpacklo_epi8((__m512i)c, (__m512i)d);
  const __m512i ef = _mm512_unpackhi_epi8((__m512i)a, (__m512i)b), gh = _mm512_unpackhi_epi8((__m512i)c, (__m512i)d);
  out[0] = (vb)_mm512_unpacklo_epi16(ab, cd), out[1] = (vb)_mm512_unpackhi_epi16(ab, cd);
  out[2] = (vb)_mm512_unpacklo_epi16(ef, gh), out[3] = (vb)_mm512_unpackhi_epi16(ef, gh);
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  const __m256i ab = _mm256_unpacklo_epi8((__m256i)a, (__m256i)b), cd = _mm256_unpacklo_epi8((__m256i)c, (__m256i)d);
  const __m256i ef = _mm256_unpackhi_epi8((__m256i)a, (__m256i)b), gh = _mm256_unpackhi_epi8((__m256i)c, (__m256i)d);
  out[0] = (vb)_mm256_unpacklo_epi16(ab, cd), out[1] = (vb)_mm256_unpackhi_epi16(ab, cd);
  out[2] = (vb)_mm256_unpacklo_epi16(ef, gh), out[3] = (vb)_mm256_unpackhi_epi16(ef, gh);
#else
  static_assert(W == 4, "vectors of 128 bits");
#ifdef __SSE2__
  const __m128i ab = _mm_unpacklo_epi8((__m128i)a, (__m128i)b), cd = _mm_unpacklo_epi8((__m128i)c, (__m128i)d);
  const __m128i ef = _mm_unpackhi_epi8((__m128i)a, (__m128i)b), gh = _mm_unpackhi_epi8((__m128i)c, (__m128i)d);
  out[0] = (vb)_mm_unpacklo_epi16(ab, cd), out[1] = (vb)_mm_unpackhi_epi16(ab, cd);
  out[2] = (vb)_mm_unpacklo_epi16(ef, gh), out[3] = (vb)_mm_unpackhi_epi16(ef, gh);
#else
  for (int i = 0; i < 16; i++) {
    out[i / 4][i % 4 * 4] = a[i], out[i / 4][i % 4 * 4 + 1] = b[i];
    out[i / 4][i % 4 * 4 + 2] = c[i], out[i / 4][i % 4 * 4 + 3] = d[i];
  }
#endif
#endif
}

// Where the four lanes from `4 * block` on of vector `k` of an interleaving belong: it works within 128 bits.
static inline int place_of(int k, int block) { return 16 * block + 4 * k; }

// Sums of a, of b, of c and of d over every fourth lane, one after the other, in each 128 bits.
static inline vi sum_quarters(vi a, vi b, vi c, vi d) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  const __m512i w = (__m512i)a, x = (__m512i)b, y = (__m512i)c, z = (__m512i)d;
  const __m512i wx = _mm512_add_epi32(_mm512_unpacklo_epi32(w, x), _mm512_unpackhi_epi32(w, x));
  const __m512i yz = _mm512_add_epi32(_mm512_unpacklo_epi32(y, z), _mm512_unpackhi_epi32(y, z));
  return (vi)_mm512_add_epi32(_mm512_unpacklo_epi64(wx, yz), _mm512_unpackhi_epi64(wx, yz));
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  const __m256i wx = _mm256_hadd_epi32((__m256i)a, (__m256i)b), yz = _mm256_hadd_epi32((__m256i)c, (__m256i)d);
  return (vi)_mm256_hadd_epi32(wx, yz);
#else
  vi out = {};
  for (int i = 0; i < W; i++) {
    const int at = i / 4 * 4, from = i % 4;
    const vi x = from == 0 ? a : from == 1 ? b : from == 2 ? c : d;
    out[i] = x[at] + x[at + 1] + x[at + 2] + x[at + 3];
  }
  return out;
#endif
}

// The same BYTES bytes (16 or 32) as often as they fit.
template <int BYTES> static inline vb repeat(const uint8_t* p) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  if constexpr (BYTES == 16) return (vb)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  if constexpr (BYTES == 32) return (vb)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  if constexpr (BYTES == 16) return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#endif
  return load<vb>(p);
}

}  // namespace KVMIX_ISA
