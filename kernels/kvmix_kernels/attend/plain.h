// Keys and values that are not quantized: products with float32, read from whatever they are stored as.
#pragma once
#include "../runtime/native/simd.h"

namespace KVMIX_ISA {

// Unquantized elements whose dtype the compiler knows.
template <int DTYPE> struct Elements {
  static constexpr int dtype = DTYPE;
  const void* at;

  const void* from(int64_t offset) const { return static_cast<const char*>(at) + (DTYPE == FLOAT32 ? 4 : 2) * offset; }
};

// out[r][t] = sum_d query[r][d] * x[t][d] over unquantized keys.
template <int DTYPE, int R>
static void dot_full(const void* x, int64_t stride, int64_t count, int64_t dim, const float* const* query,
                     float* const* out) {
  for (int64_t t = 0; t < count; t++) {
    vf acc[R] = {};
    for (int64_t d = 0; d < dim; d += W) {
      const vf k = read<DTYPE>(x, t * stride + d);
      for (int r = 0; r < R; r++) acc[r] += k * load<vf>(query[r] + d);
    }
    for (int r = 0; r < R; r++) out[r][t] = sum(acc[r]);
  }
}

constexpr int ROWS_AHEAD = 16;

// Columns [m, m + N W) of what follows. Rows are a cache line each where vectors have 256 bits, which the hardware asks for
// too late; with longer vectors asking for more than it does takes longer than it saves.
template <int DTYPE, int R, int N>
KERNEL static void mix_columns(const void* x, int64_t stride, int64_t rows, int64_t m, const float* const* a,
                               float* const* out, bool add) {
  vf acc[R][N];
  each<R>([&](auto r) INLINE { each<N>([&](auto i) INLINE { acc[r][i] = add ? load<vf>(out[r] + m + i * W) : vf{}; }); });
  for (int64_t n = 0; n < rows; n++) {
    vf v[N];
    if constexpr (W == 8) __builtin_prefetch(Elements<DTYPE>{x}.from((n + ROWS_AHEAD) * stride + m));
    each<N>([&](auto i) INLINE { v[i] = read<DTYPE>(x, n * stride + m + i * W); });
    each<R>([&](auto r) INLINE { each<N>([&](auto i) INLINE { acc[r][i] += a[r][n] * v[i]; }); });
  }
  each<R>([&](auto r) INLINE { each<N>([&](auto i) INLINE { store(out[r] + m + i * W, acc[r][i]); }); });
}

// out[r][m] (+)= sum_n a[r][n] * x[n][m] over unquantized values, or pages of key channels.
template <int DTYPE, int R>
static void mix_full(const void* x, int64_t stride, int64_t rows, int64_t columns, const float* const* a,
                     float* const* out, bool add) {
  constexpr int N = W == 16 ? 4 : 2;  // vectors of sums: as many as registers allow
  int64_t m = 0;
  for (; m + N * W <= columns; m += N * W) mix_columns<DTYPE, R, N>(x, stride, rows, m, a, out, add);
  for (; m < columns; m += W) mix_columns<DTYPE, R, 1>(x, stride, rows, m, a, out, add);
}

// work(elements), of those from `offset` on.
template <class Work> static void with_dtype(int64_t dtype, const void* x, int64_t offset, Work work) {
  const char* bytes = static_cast<const char*>(x);
  switch (dtype) {
    case FLOAT32: return work(Elements<FLOAT32>{bytes + 4 * offset});
    case FLOAT16: return work(Elements<FLOAT16>{bytes + 2 * offset});
    default: return work(Elements<BFLOAT16>{bytes + 2 * offset});
  }
}

}  // namespace KVMIX_ISA
