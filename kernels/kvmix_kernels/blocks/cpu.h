// The arguments of placing codes and of storing tokens. runtime/native/structs.py mirrors these structs, native.cpp lists
// their fields for the check of that.
#pragma once
#include <cstdint>

// How the codes of a token lie in a block; the same numbers in structs.py.
enum Form { DIRECTIONS = 0, KEYS = 1, VALUES = 2 };

// Codes of single tokens, and the slots of an engine's blocks that they go to.
struct Placement {
  const uint8_t* codes;   // [tokens, H_kv, dim], contiguous, one code a byte
  const int64_t* slots;   // [tokens]: block * page + token of the block
  uint8_t* blocks;        // first byte of these keys, or values, in the first block
  const uint8_t* widths;  // [H_kv, dim]; of keys and values all alike
  const int64_t* places;  // [H_kv]: first byte of a head, counted from `blocks`
  int64_t block_bytes;    // from one block to the next
  int64_t tokens, heads, dim, page;
  int64_t form, group;    // of keys: channels that are packed together
  int64_t threads;
};

// Keys or values of single tokens that become codes, each group of channels by its smallest and largest. Strides are in
// elements.
struct Storing {
  Placement to;               // without codes
  const void* states;         // [tokens, H_kv, dim], channels contiguous
  uint16_t* scales;           // [blocks, H_kv, groups, 2, page], tokens contiguous
  int64_t states_strides[2];  // token, head
  int64_t scales_strides[4];  // block, head, group, from scale to zero
  int64_t dtype, scale_dtype;
};
