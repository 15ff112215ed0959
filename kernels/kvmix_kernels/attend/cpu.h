// What cpu.py hands over; the ctypes structures there must have the same fields in the same order.
#pragma once
#include <cstdint>

// Keys or values of one layer: sink | packed pages | tail. Strides are in elements; the last axis is contiguous.
struct Segments {
  const void* sink;       // [B, H_kv, sinks, dim]
  const int16_t* words;   // [B, H_kv, pages, rows * bits / 16, columns]
  const void* scales;     // [B, H_kv, pages, 2, groups, rows]
  const void* tail;       // [B, H_kv, tail_tokens, dim]
  int64_t sink_strides[3];    // batch, head, token
  int64_t words_strides[3];   // batch, head, page
  int64_t scales_strides[3];  // batch, head, page
  int64_t tail_strides[3];    // batch, head, token
  int64_t sinks, pages, tail_tokens, dim;
  int64_t bits, page, group, groups;
  int64_t dtype, scale_dtype;
};

struct Attention {
  Segments key, value;
  const float* query;       // [B, H, S, D], contiguous, already scaled
  const void* mask;         // null (causal), or [B, 1 or H, S or 1, T]
  int64_t mask_strides[4];  // 0 where it is broadcast
  int64_t mask_is_bool;     // otherwise it is float32 and added
  const float* sink_logits; // null or [H]
  float* output;            // [B, H, S, D_v], contiguous
  float* logarithms;        // [B, H, S]: of the sums of weights
  int64_t batch, heads, kv_heads, queries, tokens;
  int64_t threads;
  float softcap;            // 0: none
};
