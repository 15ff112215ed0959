// Pages [first, last) of vector codes of one KV head, for as many query rows as share a code. See vectors.cpp.
#pragma once
#include "contract.h"

namespace KVMIX_ISA {

constexpr int LANES = 4;  // query rows, at most

// out[r] = products of queries with all tokens.
void score_vectors(const Segments& s, int64_t b, int64_t h, int64_t first, int64_t last, int rows,
                   const float* const* query, float* const* out, Scratch& scratch);

// out[r] += tokens times their weights.
void mix_vectors(const Segments& s, int64_t b, int64_t h, int64_t first, int64_t last, int rows,
                 const float* const* weights, float* const* out, Scratch& scratch);

}  // namespace KVMIX_ISA
