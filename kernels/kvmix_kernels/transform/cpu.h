// The arguments of encoding. runtime/native/structs.py mirrors this struct, native.cpp lists its fields for the check
// of that.
#pragma once
#include <cstdint>

// Whole pages in the directions of their basis. All arrays are contiguous.
struct Encoding {
  const float* z;          // [B, H_kv, pages, page, dim]
  uint8_t* codes;          // [B, pages, page_bytes]; null if they stay one a byte
  uint8_t* bytes;          // [B, H_kv, pages, page, dim], one code a byte; null if they are packed
  uint16_t* scales;        // float16 [B, H_kv, pages, page] of values; null for keys
  float* errors;           // [B, H_kv, pages, page]
  const uint8_t* widths;   // [H_kv, dim]
  const int64_t* places;   // [H_kv]: first byte of a head in a page
  const float* deviation;  // [H_kv, dim]
  const float* steps;      // [H_kv, dim], in units of z; 0 for 0 bits
  int64_t batch, heads, count, page, dim, page_bytes;
  int64_t threads;
};
