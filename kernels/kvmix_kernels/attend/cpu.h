// The arguments of attention. runtime/native/structs.py mirrors these structs, native.cpp lists their fields for the
// check of that. Strides are in elements; the last axis is contiguous.
#pragma once
#include <cstdint>

// Channels that are stored alike, in pages: as codes with their scales, or with 16 bits as they are.
struct Run {
  const void* data;           // int16 [B, H_kv, pages, rows * bits / 16, columns], or [B, H_kv, pages, rows, columns]
  const void* scales;         // [B, H_kv, pages, 2, groups, rows], or of keys by token [B, H_kv, pages, 2, columns]
  int64_t data_strides[3];    // batch, head, page
  int64_t scales_strides[3];  // batch, head, page
  int64_t bits, channels, group;
  int64_t dtype;              // of the scales, or of the data where that is not codes
  int64_t by_token;           // of keys: every token has a scale and a zero for these channels
};

// Pages of transform codes, with the basis folded for attention; see transform_layout.py and transform/basis.py.
struct Coded {
  const uint8_t* codes;       // [B, pages, page_bytes]
  const uint16_t* scales;     // float16 [B, H_kv, pages, page] of values; null for keys
  const int32_t* places;      // null, or [B, H_kv, exact_tokens]: among the tokens of all pages, ascending; < 0: nothing
  const void* exact;          // [B, H_kv, exact_tokens, dim]
  const uint8_t* widths;      // [H_kv, dim], contiguous as all that follows
  const int64_t* offsets;     // [H_kv]: first byte of a head in a page
  const float* decoding;      // [H_kv, dim, dim]: the decoder, each direction times its step
  const float* mean;          // [H_kv, dim]
  const float* middles;       // [H_kv, dim]: of the codes of each direction
  const float* turns;         // null, or [frames, 2, pairs]: cosines and sines that turn a query to a frame
  int64_t codes_strides[2];   // batch, page
  int64_t scales_strides[3];  // batch, head, page
  int64_t places_strides[2];  // batch, head
  int64_t exact_strides[3];   // batch, head, token
  int64_t exact_tokens, exact_dtype;
  int64_t frame;              // tokens of a frame; 0: one without end
  int64_t pairs, start, interleaved;  // channels that turn, as Frames has them
};

// Pages of vector codes with their codebooks; see vectors.py.
struct Vectors {
  const uint8_t* codes;       // [B, H_kv, pages, page * dim / span * width / 8]
  const uint16_t* scales;     // null, or [B, H_kv, pages, page]: of tokens
  const float* books;         // [1 or H_kv, 1 or dim / span, span, 2^width]
  int64_t codes_strides[3];   // batch, head, page
  int64_t scales_strides[3];  // batch, head, page
  int64_t books_strides[2];   // head, group; 0 where all share one
  int64_t width, span;        // bits of a code, channels that it stands for
  int64_t scale_dtype;
};

// Keys or values: sink | packed pages | tail.
struct Segments {
  const void* sink;          // [B, H_kv, sinks, dim]
  const void* tail;          // [B, H_kv, tail_tokens, dim]
  const Run* runs;           // of values only one
  const Coded* coded;        // null, or the pages instead of runs
  const Vectors* vectors;    // null, or the pages instead of runs
  const uint8_t* order;      // null, or [B, H_kv, orders, dim]: the channel at each place of the runs
  const int32_t* table;      // null, or [B, H_kv, pages]: which of the pages in memory each page is
  int64_t sink_strides[3];   // batch, head, token
  int64_t tail_strides[3];   // batch, head, token
  int64_t order_strides[3];  // batch, head, order
  int64_t sinks, pages, page, tail_tokens, dim;
  int64_t run_count, pages_per_order;
  int64_t table_strides[2];  // batch, head; a page of a sequence is the same one for all heads where the latter is 0
  int64_t is_choice;         // the pages are some of a sequence's, ascending: the table has their numbers in it
  int64_t dtype;             // of sink and tail

  // Where a page is in memory.
  int64_t place(int64_t b, int64_t h, int64_t page) const {
    return table ? table[b * table_strides[0] + h * table_strides[1] + page] : page;
  }
  // Which page of its sequence a page is, which decides the positions of its tokens.
  int64_t number(int64_t b, int64_t h, int64_t page) const { return is_choice ? place(b, h, page) : page; }
};

// Some of the tokens, and who may see them.
struct Part {
  Segments key, value;
  const void* mask;         // null (causal, the queries being the last tokens), or [B, 1 or H, S or 1, tokens or 1]
  int64_t mask_strides[4];  // 0 where it is broadcast
  int64_t mask_is_bool;     // otherwise it is float32 and added
  const int64_t* lengths;   // null, or [B]: the tokens of each sequence, the others being nothing; then all are in pages
  int64_t tokens;
};

struct Attention {
  const Part* parts;
  const void* query;        // [B, H, S, D]
  const float* sink_logits; // null or [H]
  void* output;             // [B, H, S, D_v], contiguous
  float* logarithms;        // [B, H, S]: of the sums of weights
  int64_t query_strides[3]; // batch, head, query
  int64_t dtype;            // of query and output
  int64_t part_count;
  int64_t batch, heads, kv_heads, queries, dim, value_dim;
  int64_t threads;
  float scaling;            // of the scores
  float softcap;            // 0: none
};
