// Codes of a page of transform codes, from the bit planes that hold them (transform_layout.py).
//
// A plane of b bits has page * b / 8 bytes for each direction, and field j of byte i is the code of token
// j * page * b / 8 + i. Pages of 128 tokens are read a chunk of tokens at a time, by vectors: those of `UNIT` bytes of a
// direction, which is repeated if its plane is shorter, each time with the next fields lowest.
#pragma once
#include "codes.h"

namespace KVMIX_ISA {

constexpr int RUN = 8;              // directions of one width
constexpr int WIDEST = 6;           // bits of a code
constexpr int UNROLLED_PAGE = 128;  // tokens of a page that is read by vectors

// Bit planes of a code, lowest bits first; all but three widths have one.
constexpr int low_bits(int width) { return width == 3 ? 2 : width > 4 ? 4 : width; }
constexpr int high_bits(int width) { return width - low_bits(width); }

template <int BITS> constexpr int plane_bytes() { return UNROLLED_PAGE * BITS / 8; }

// Parts of UNIT bytes that a plane has, and which of them has the tokens of a chunk.
template <int BITS, int UNIT> constexpr int parts() { return plane_bytes<BITS>() < UNIT ? 1 : plane_bytes<BITS>() / UNIT; }
template <int BITS, int UNIT> constexpr int part_of(int chunk) { return chunk * UNIT % plane_bytes<BITS>() / UNIT; }
// Where in a byte the codes of a chunk are.
template <int BITS, int UNIT> constexpr int shift_of(int chunk) { return chunk * UNIT / plane_bytes<BITS>() * BITS; }

// Bytes that were repeated, the second time with the next field lowest, and so on.
template <int BITS, int UNIT> static INLINE inline vb advanced(vb x) {
  if constexpr (plane_bytes<BITS>() >= UNIT) return x;
  vu shifts;
  for (int i = 0; i < W; i++) shifts[i] = i * 4 % UNIT / plane_bytes<BITS>() * BITS;
  return (vb)((vu)x >> shifts);
}

// A part of a plane in a vector of VB tokens.
template <int BITS> static INLINE inline vb plane(const uint8_t* at, int part) {
  if constexpr (plane_bytes<BITS>() >= VB)
    return load<vb>(at + part * VB);
  else
    return advanced<BITS, VB>(repeat<plane_bytes<BITS>()>(at));
}

// Codes of a chunk, of the vectors that hold its low plane and, if WIDTH has two, its high one. Width 0 stands for codes
// that are one a byte already.
template <int WIDTH, int UNIT, int CHUNK> static INLINE inline Codes codes_of(vb low, vb high) {
  constexpr int LOW = low_bits(WIDTH), HIGH = high_bits(WIDTH);
  if constexpr (WIDTH == 0)
    return codes_at<0, 255>(low);
  else if constexpr (HIGH == 0)
    return codes_at<shift_of<LOW, UNIT>(CHUNK), (1 << LOW) - 1>(low);
  else
    return codes_at<shift_of<LOW, UNIT>(CHUNK), (1 << LOW) - 1>(low) |
           codes_at<shift_of<HIGH, UNIT>(CHUNK) - LOW, ((1 << HIGH) - 1) << LOW>(high);
}

// Codes of a page of any length, of the directions of a run one after the other, `stride` bytes apart, each code a byte.
static void unpack_any(int width, const uint8_t* from, int64_t page, uint8_t* out, int64_t stride) {
  for (int d = 0; d < RUN; d++, out += stride) {
    std::memset(out, 0, page);
    for (int shift = 0; shift < width;) {
      const int bits = width - shift >= 4 ? 4 : width - shift >= 2 ? 2 : 1;
      const int64_t bytes = page * bits / 8;
      for (int64_t token = 0; token < page; token++)
        out[token] |= (from[token % bytes] >> (token / bytes * bits) & ((1 << bits) - 1)) << shift;
      from += bytes;
      shift += bits;
    }
  }
}

// work(width), with a width that the compiler knows.
template <class Work> static inline void with_width(int width, Work work) {
  switch (width) {
    case 1: return work(std::integral_constant<int, 1>{});
    case 2: return work(std::integral_constant<int, 2>{});
    case 3: return work(std::integral_constant<int, 3>{});
    case 4: return work(std::integral_constant<int, 4>{});
    case 5: return work(std::integral_constant<int, 5>{});
    default: return work(std::integral_constant<int, 6>{});
  }
}

}  // namespace KVMIX_ISA
