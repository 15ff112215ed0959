// Vectors of W floats or integers, in the compiler's own vector extension: the same source is compiled for AVX-512
// (W = 16), AVX2 (W = 8) and anything else (W = 4), see build.py.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifndef KVMIX_ISA
#define KVMIX_ISA generic
#define KVMIX_WIDTH 4
#endif

#define INLINE __attribute__((always_inline))
#define KERNEL __attribute__((noinline))  // a loop that needs all registers for itself

namespace KVMIX_ISA {

constexpr int W = KVMIX_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int16_t vs __attribute__((vector_size(2 * W)));
typedef int16_t vw __attribute__((vector_size(4 * W)));  // 2 W of them: as many bits as the others
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vq __attribute__((vector_size(4 * W)));
typedef uint8_t vb __attribute__((vector_size(4 * W)));  // 4 W of them

// How an unquantized element or a scale is stored; the same numbers in structs.py.
enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

template <class V> static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V> static inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

static inline vf splat(float x) { return vf{} + x; }

static inline vf bits(vu x) {
  vf v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}

static inline vi words(const int16_t* p) {
#if KVMIX_WIDTH == 8 && defined(__AVX2__)
  return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));  // GCC makes four of it
#else
  return __builtin_convertvector(load<vs>(p), vi);
#endif
}

// a0 b0 a1 b1 ...: the first W pairs into `low`, the others into `high`.
static inline void interleave(vw a, vw b, vw& low, vw& high) {
#if KVMIX_WIDTH == 16 && defined(__AVX512BW__)
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacking works within 128 bits
  const __m512i x = _mm512_permutexvar_epi64(order, (__m512i)a), y = _mm512_permutexvar_epi64(order, (__m512i)b);
  low = (vw)_mm512_unpacklo_epi16(x, y), high = (vw)_mm512_unpackhi_epi16(x, y);
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  const __m256i x = _mm256_permute4x64_epi64((__m256i)a, 0xd8), y = _mm256_permute4x64_epi64((__m256i)b, 0xd8);
  low = (vw)_mm256_unpacklo_epi16(x, y), high = (vw)_mm256_unpackhi_epi16(x, y);
#elif KVMIX_WIDTH == 4 && defined(__SSE2__)
  low = (vw)_mm_unpacklo_epi16((__m128i)a, (__m128i)b), high = (vw)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
#else
  for (int i = 0; i < W; i++) {
    low[2 * i] = a[i], low[2 * i + 1] = b[i];
    high[2 * i] = a[W + i], high[2 * i + 1] = b[W + i];
  }
#endif
}

// work(0), ..., work(N - 1), each with a constant: arrays of vectors that it indexes stay in registers, which unrolling a
// loop comes too late for.
template <class Work, int... I> static inline INLINE void each(std::integer_sequence<int, I...>, Work work) {
  (work(std::integral_constant<int, I>{}), ...);
}
template <int N, class Work> static inline INLINE void each(Work work) { each(std::make_integer_sequence<int, N>{}, work); }

// The same, in a register of its own: compilers would make a new address of every sum of known parts.
template <class T> static inline T opaque(T x) {
  asm("" : "+r"(x));
  return x;
}

// The same, loaded once: compilers would make a load of every use.
static inline vi in_register(vi x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

// sum += the two products of each pair, before anything else: compilers would collect many products first, and spill
// them all.
static inline void add_products(vi& sum, vw a, vw b) {
#if KVMIX_WIDTH == 16 && defined(__AVX512VNNI__)
  sum = (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif KVMIX_WIDTH == 16 && defined(__AVX512BW__)
  sum += (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  sum += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif KVMIX_WIDTH == 4 && defined(__SSE2__)
  sum += (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const vi x = (vi)a, y = (vi)b;
  sum += ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
#if defined(__x86_64__)
  asm("" : "+v"(sum));
#endif
}

// To the nearest integer, for |x| < 2^22.
static inline vi nearest(vf x) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#else
  return __builtin_convertvector((x + splat(12582912.0f)) - splat(12582912.0f), vi);
#endif
}

// Exact for every finite float16, subnormal ones included.
static inline vf half_to_float(const void* p) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#else
  vu h = __builtin_convertvector(load<vh>(p), vu);
  vf magnitude = bits((h & 0x7fffu) << 13) * splat(0x1p112f);
  vu u;
  std::memcpy(&u, &magnitude, sizeof u);
  return bits(u | ((h & 0x8000u) << 16));
#endif
}

static inline vf bfloat_to_float(const void* p) {
  return bits(__builtin_convertvector(load<vh>(p), vu) << 16);
}

// Round to nearest even, as PyTorch does; what is too large becomes infinite and NaN stays NaN.
static inline vh float_to_half(vf x) {
  vu u;
  std::memcpy(&u, &x, sizeof u);
  const vu sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  vf subnormal = bits(u) + splat(0.5f);  // its last bits are then those of a subnormal float16
  vu small;
  std::memcpy(&small, &subnormal, sizeof small);
  vu normal = (u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13;
  vu half = u < 0x38800000u ? small - 0x3f000000u : normal;
  half = u >= 0x47800000u ? (u > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u) : half;
  return __builtin_convertvector(half | sign, vh);
}

static inline vh float_to_bfloat(vf x) {
  vu u;
  std::memcpy(&u, &x, sizeof u);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? vu{} + 0x7fc0u : rounded, vh);
}

// W elements from index `i` of an array of the given type.
template <int DTYPE> static inline vf read(const void* p, int64_t i) {
  if (DTYPE == FLOAT16) return half_to_float(static_cast<const uint16_t*>(p) + i);
  if (DTYPE == BFLOAT16) return bfloat_to_float(static_cast<const uint16_t*>(p) + i);
  return load<vf>(static_cast<const float*>(p) + i);
}

// W elements to index `i` of an array of the given type.
template <int DTYPE> static inline void write(void* p, int64_t i, vf x) {
  if (DTYPE == FLOAT16) return store(static_cast<uint16_t*>(p) + i, float_to_half(x));
  if (DTYPE == BFLOAT16) return store(static_cast<uint16_t*>(p) + i, float_to_bfloat(x));
  store(static_cast<float*>(p) + i, x);
}

static inline float sum(vf v) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += v[i];
  return total;
#endif
}

static inline float largest(vf v) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < W; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

static inline vf larger(vf a, vf b) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);  // GCC compares and chooses
#else
  return a > b ? a : b;
#endif
}

static inline vf magnitude(vf x) {
  vu u;
  std::memcpy(&u, &x, sizeof u);
  return bits(u & 0x7fffffffu);
}

// exp(x) for x <= 0, and 0 below -87: 2^n 2^f with |f| <= 1/2, of which the second is a polynomial (minimax, but 1 at 0) and
// the first is added to its exponent. The relative error is below 2e-7 (1 + |x|).
static inline vf exp_negative(vf x) {
  const vf to_base_2 = splat(1.44269504f), last_bit_is_1 = splat(12582912.0f);
  const vf shifted = x * to_base_2 + last_bit_is_1, f = x * to_base_2 - (shifted - last_bit_is_1);
  vf p = splat(1.3264725e-3f);
  p = p * f + splat(9.671513e-3f);
  p = p * f + splat(5.5507336e-2f);
  p = p * f + splat(2.4022242e-1f);
  p = p * f + splat(6.9314700e-1f);
  p = p * f + splat(1.0f);
  vu significand, n;
  std::memcpy(&significand, &p, sizeof p);
  std::memcpy(&n, &shifted, sizeof n);
  return x > splat(-87.0f) ? bits(significand + (n << 23)) : vf{};
}

}  // namespace KVMIX_ISA
