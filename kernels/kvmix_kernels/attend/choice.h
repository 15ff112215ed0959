// The arguments of choosing pages. runtime/native/structs.py mirrors this struct, native.cpp lists its fields for the check
// of that. Strides are in elements.
#pragma once
#include <cstdint>

// Query heads that choose together (summaries.py); the same numbers in structs.py.
enum Sharing { LARGEST = 0, SUM = 1, LAYER = 2 };

// Pages with their summaries, of which one query a sequence chooses some.
struct Choice {
  const void* query;          // [B, H, dim], the last axis contiguous
  const void* summary;        // [B, H_kv, pages, rows, dim], of one row or two, or uint8 [B, H_kv, pages, rows, parts]: codes;
                              // a page is contiguous
  const void* books;          // null, or [B, H_kv, parts, entries, dim / parts], contiguous: what codes stand for
  int32_t* numbers;           // [B, H_kv, count], contiguous: the pages that are chosen, ascending
  int64_t query_strides[2];   // batch, head
  int64_t summary_strides[3]; // batch, head, page
  int64_t batch, heads, kv_heads, pages, count, rows, dim, parts, entries;
  int64_t query_dtype;
  int64_t dtype;              // of the summary, or of the books
  int64_t sharing;
  int64_t threads;
  float scaling;              // of the logits
};
