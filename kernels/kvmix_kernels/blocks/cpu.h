// The arguments of placing codes. runtime/native/structs.py mirrors this struct, native.cpp lists its fields for the check
// of that.
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
