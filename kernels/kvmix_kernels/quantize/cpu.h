// The arguments of quantizing. runtime/native/structs.py mirrors this struct, native.cpp lists its fields for the check
// of that.
#pragma once
#include <cstdint>

// How scale and zero are chosen (grids.py); the same numbers in structs.py.
enum Encoder { MINMAX = 0, REFIT = 1, SEARCH = 2 };

// Whole pages of keys or values. Strides are in elements; the last axis of every array is contiguous.
struct Quantization {
  const void* pages;         // [B, H_kv, pages, page, dim]
  int16_t* words;            // [B, H_kv, pages, rows * bits / 16, columns]
  void* scales;              // [B, H_kv, pages, 2, groups, rows]
  int64_t pages_strides[4];  // batch, head, page, token
  int64_t words_strides[3];  // batch, head, page
  int64_t scales_strides[3]; // batch, head, page
  int64_t batch, heads, count, page, dim;
  int64_t is_key, bits, group, groups;
  int64_t dtype, scale_dtype;
  int64_t encoder;
  int64_t threads;
};
