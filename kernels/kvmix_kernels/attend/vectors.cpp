// Attention over pages of vector codes: a code stands for `span` neighbouring channels of a token, by a codebook.
//
// Of a token with codes c_g of its groups of channels, and a scale,
//
//     q . k           =  scale sum_g table_g[c_g]           with table_g[e] = q_g . book_g[e]
//     sum_t w_t v_t   =  sum_e weight_g[e] book_g[e]        in group g, with weight_g[e] the sum of w_t scale_t over
//                                                           the tokens whose code there is e
//
// so a code of a key is one look-up in a table of products, and a code of a value one addition to a table of weights.
// Rows of tables have a number for each of LANES query rows, which share the codes. There are tables of a few groups at a
// time, which stay in the nearest cache while the tokens of a split go past. All is in float32.
#include "vectors.h"

#include <algorithm>

namespace KVMIX_ISA {

constexpr int GROUPS_TOGETHER = 4;
typedef float vr __attribute__((vector_size(4 * LANES)));

// The first W / LANES numbers at p, each in LANES lanes.
static INLINE inline vf spread(const float* p) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  const __m512i order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (vf)_mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(p)));
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  return (vf)_mm256_set_m128(_mm_broadcast_ss(p + 1), _mm_broadcast_ss(p));
#else
  return splat(*p);
#endif
}

// LANES numbers, as often as they fit.
static INLINE inline vf repeated(const float* p) {
#if KVMIX_WIDTH == 16 && defined(__AVX512F__)
  return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif KVMIX_WIDTH == 8 && defined(__AVX2__)
  return (vf)_mm256_broadcast_ps((const __m128*)p);
#else
  return load<vf>(p);
#endif
}

// Element i of the first, of the second, and so on, becomes those of vector i.
static INLINE inline void transpose(vr (&x)[LANES]) {
#ifdef __SSE2__
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) std::swap(reinterpret_cast<float*>(x + i)[j], reinterpret_cast<float*>(x + j)[i]);
#endif
}

// Codes of six bits as they are packed, four of each code and then the other two, one a byte.
static inline void unpack_six(const uint8_t* from, int64_t count, uint8_t* to) {
  const uint8_t* high = from + count / 2;
  for (int64_t i = 0; i < count; i += 4, from += 2, high++) {
    const uint32_t low = from[0] | uint32_t(from[1]) << 16, two = *high;
    const uint32_t tops = (two & 3) << 4 | (two & 12) << 10 | (two & 48) << 16 | (two & 192) << 22;
    const uint32_t codes = ((low | low << 4) & 0x0f0f0f0fu) | tops;
    std::memcpy(to + i, &codes, 4);
  }
}

// Sums of a token, `sums[t][LANES]`, plus the products that its codes stand for in N groups of channels.
template <int ENTRIES, int N>
KERNEL static void look_up(const uint8_t* from, int64_t groups, int64_t tokens, const float* tables, float* sums) {
  for (int64_t t = 0; t < tokens; t++, from += groups, sums += LANES) {
    uint32_t codes = 0;
    std::memcpy(&codes, from, N);
    vr sum = load<vr>(sums);
    each<N>([&](auto i) INLINE { sum += load<vr>(tables + (i * ENTRIES + (codes >> 8 * i & 255)) * LANES); });
    store(sums, sum);
  }
}

// Weights of tokens, `weights[t][LANES]`, added to those of the entries that their codes stand for in N groups of channels.
template <int ENTRIES, int N>
KERNEL static void gather(const uint8_t* from, int64_t groups, int64_t tokens, const float* weights, float* tables) {
  for (int64_t t = 0; t < tokens; t++, from += groups, weights += LANES) {
    uint32_t codes = 0;
    std::memcpy(&codes, from, N);
    const vr weight = load<vr>(weights);
    each<N>([&](auto i) INLINE {
      float* entry = tables + (i * ENTRIES + (codes >> 8 * i & 255)) * LANES;
      store(entry, load<vr>(entry) + weight);
    });
  }
}

// Pages [first, last) of one KV head, whose codes have WIDTH bits and stand for SPAN channels, for at most LANES query rows.
template <int WIDTH, int SPAN> class VectorProducts {
  static constexpr int ENTRIES = 1 << WIDTH, TABLE = ENTRIES * LANES;

  const Segments& s;
  const Vectors& x;
  const int64_t b, h, first, last;
  Scratch& scratch;
  const int64_t page = s.page, groups = s.dim / SPAN, tokens = (last - first) * page;

  const float* book(int64_t group) const { return x.books + h * x.books_strides[0] + group * x.books_strides[1]; }
  int64_t place(int64_t at) const { return s.place(b, h, first + at); }

  const uint8_t* packed(int64_t at) const { return x.codes + offset_of(x.codes_strides, b, h, place(at)); }

  // Codes of a page, one a byte: those of a token in a row.
  const uint8_t* codes(int64_t at) const {
    if (WIDTH != 8) return scratch.codes.data() + at * page * groups;
    return packed(at);
  }

  // work(tables, first group, their number), for all groups, a few at a time.
  template <class Work> void by_groups(Work work) const {
    float* tables = scratch.turned.data();
    int64_t group = 0;
    for (; group + GROUPS_TOGETHER <= groups; group += GROUPS_TOGETHER)
      work(tables, group, std::integral_constant<int, GROUPS_TOGETHER>{});
    for (; group < groups; group += 2) work(tables, group, std::integral_constant<int, 2>{});  // heads are multiples of 16
  }

  // The products of a group of channels of the queries, [dim, LANES], with all entries of its codebook.
  void multiply(const float* query, int64_t group, float* table) const {
    const float* entries = book(group);
    vf q[SPAN];
    each<SPAN>([&](auto i) INLINE { q[i] = repeated(query + (group * SPAN + i) * LANES); });
    for (int e = 0; e < ENTRIES; e += W / LANES) {
      vf sum = {};
      each<SPAN>([&](auto i) INLINE { sum += q[i] * spread(entries + i * ENTRIES + e); });
      store(table + e * LANES, sum);
    }
  }

  // out[r] += the entries of a group's codebook times their weights.
  void add_entries(const float* table, int64_t group, int rows, float* const* out) const {
    const float* entries = book(group);
    vf sums[SPAN] = {};
    for (int e = 0; e < ENTRIES; e += W / LANES) {
      const vf weights = load<vf>(table + e * LANES);
      each<SPAN>([&](auto i) INLINE { sums[i] += weights * spread(entries + i * ENTRIES + e); });
    }
    for (int i = 0; i < SPAN; i++)
      for (int r = 0; r < rows; r++)
        for (int j = r; j < W; j += LANES) out[r][group * SPAN + i] += sums[i][j];
  }

  // work(token, scales of LANES tokens from there on), for all tokens.
  template <class Work> void by_scales(Work work) const {
    for (int64_t at = 0, token = 0; at < last - first; at++) {
      const uint16_t* scales = x.scales ? x.scales + offset_of(x.scales_strides, b, h, place(at)) : nullptr;
      for (int64_t t = 0; t < page; t += W, token += W) {
        vf scale = splat(1.0f);
        if (scales) scale = x.scale_dtype == FLOAT16 ? read<FLOAT16>(scales, t) : read<BFLOAT16>(scales, t);
        for (int i = 0; i < W; i += LANES) work(token + i, load<vr>(reinterpret_cast<const float*>(&scale) + i));
      }
    }
  }

 public:
  VectorProducts(const Segments& s, int64_t b, int64_t h, int64_t first, int64_t last, Scratch& scratch)
      : s(s), x(*s.vectors), b(b), h(h), first(first), last(last), scratch(scratch) {
    scratch.turned.resize(GROUPS_TOGETHER * TABLE);
    if (WIDTH == 8) return;
    scratch.codes.resize(tokens * groups);
    for (int64_t at = 0; at < last - first; at++)
      unpack_six(packed(at), page * groups, scratch.codes.data() + at * page * groups);
  }

  // out[r] = products of queries with all tokens.
  void score(const float* const* query, int rows, float* const* out) {
    scratch.folded.assign(s.dim * LANES, 0.0f);
    for (int r = 0; r < rows; r++)
      for (int64_t d = 0; d < s.dim; d++) scratch.folded[d * LANES + r] = query[r][d];
    scratch.products.assign(tokens * LANES, 0.0f);
    float* sums = scratch.products.data();
    by_groups([&](float* tables, int64_t group, auto count) {
      for (int i = 0; i < count; i++) multiply(scratch.folded.data(), group + i, tables + i * TABLE);
      for (int64_t at = 0; at < last - first; at++)
        look_up<ENTRIES, count>(codes(at) + group, groups, page, tables, sums + at * page * LANES);
    });
    by_scales([&](int64_t token, vr scale) INLINE {
      vr of_rows[LANES];
      for (int i = 0; i < LANES; i++) of_rows[i] = load<vr>(sums + (token + i) * LANES);
      transpose(of_rows);
      for (int r = 0; r < rows; r++) store(out[r] + token, of_rows[r] * scale);
    });
  }

  // out[r] += tokens times their weights.
  void mix(const float* const* weights, int rows, float* const* out) {
    scratch.products.resize(tokens * LANES);
    float* scaled = scratch.products.data();
    by_scales([&](int64_t token, vr scale) INLINE {
      vr of_rows[LANES] = {};
      for (int r = 0; r < rows; r++) of_rows[r] = load<vr>(weights[r] + token) * scale;
      transpose(of_rows);
      for (int i = 0; i < LANES; i++) store(scaled + (token + i) * LANES, of_rows[i]);
    });
    by_groups([&](float* tables, int64_t group, auto count) {
      std::fill(tables, tables + count * TABLE, 0.0f);
      for (int64_t at = 0; at < last - first; at++)
        gather<ENTRIES, count>(codes(at) + group, groups, page, scaled + at * page * LANES, tables);
      for (int i = 0; i < count; i++) add_entries(tables + i * TABLE, group + i, rows, out);
    });
  }
};

// work(products), of a class that knows the width and the span of the codes.
template <class Work>
static void with_products(const Segments& s, int64_t b, int64_t h, int64_t first, int64_t last, Scratch& scratch,
                          Work work) {
  switch (s.vectors->span) {
    case 8: return work(VectorProducts<8, 8>(s, b, h, first, last, scratch));
    case 4: return work(VectorProducts<8, 4>(s, b, h, first, last, scratch));
    case 2:
      if (s.vectors->width == 6) return work(VectorProducts<6, 2>(s, b, h, first, last, scratch));
      return work(VectorProducts<8, 2>(s, b, h, first, last, scratch));
    default: return work(VectorProducts<8, 1>(s, b, h, first, last, scratch));
  }
}

void score_vectors(const Segments& s, int64_t b, int64_t h, int64_t first, int64_t last, int rows,
                   const float* const* query, float* const* out, Scratch& scratch) {
  with_products(s, b, h, first, last, scratch, [&](auto products) { products.score(query, rows, out); });
}

void mix_vectors(const Segments& s, int64_t b, int64_t h, int64_t first, int64_t last, int rows,
                 const float* const* weights, float* const* out, Scratch& scratch) {
  with_products(s, b, h, first, last, scratch, [&](auto products) { products.mix(weights, rows, out); });
}

}  // namespace KVMIX_ISA
