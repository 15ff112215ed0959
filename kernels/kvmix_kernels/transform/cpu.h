// The arguments of encoding. runtime/native/structs.py mirrors these structs, native.cpp lists their fields for the check
// of that.
#pragma once
#include <cstdint>

// Whole pages in the directions of their basis. All arrays are contiguous.
struct Encoding {
  const float* z;          // [B, H_kv, pages, page, dim]
  uint8_t* codes;          // [B, pages, page_bytes]
  uint16_t* scales;        // float16 [B, H_kv, pages, page] of values; null for keys
  float* errors;           // [B, H_kv, pages, page]
  const uint8_t* widths;   // [H_kv, dim]
  const int64_t* places;   // [H_kv]: first byte of a head in a page
  const float* deviation;  // [H_kv, dim]
  const float* steps;      // [H_kv, dim], in units of z; 0 for 0 bits
  int64_t batch, heads, count, page, dim, page_bytes;
  int64_t threads;
};

// Single tokens on their way to codes, one a byte. Strides are in elements; all other arrays are contiguous.
struct Coding {
  const void* states;         // [tokens, H_kv, dim], channels contiguous
  const int64_t* frames;      // [tokens]; null where nothing is turned
  const double* frequencies;  // [pairs]: radians a position
  const float* encoder;       // [H_kv, dim, dim], transposed: a row for each channel
  const float* mean;          // [H_kv, dim]
  const float* deviation;     // [H_kv, dim]
  const float* steps;         // [H_kv, dim], in units of z; 0 for 0 bits
  const uint8_t* widths;      // [H_kv, dim]
  uint8_t* codes;             // [tokens, H_kv, dim]
  uint16_t* scales;           // float16 [tokens, H_kv] of values; null for keys
  int64_t states_strides[2];  // token, head
  int64_t tokens, heads, dim, dtype;
  int64_t pairs, first, interleaved, frame;  // of channels that are turned, the first of these; tokens of a frame
  int64_t threads;
};
