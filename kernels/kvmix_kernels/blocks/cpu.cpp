// Put single tokens into blocks that hold others already: bits of neighbours stay as they are. Compiled once per instruction
// set, without contracted multiply-adds, which would round elsewhere. Layouts are those of layout.py and
// transform_layout.py.
#include "cpu.h"

#include <vector>

#include "../quantize/grids.h"
#include "../runtime/native/simd.h"

namespace KVMIX_ISA {

namespace {

constexpr int WORD = 16;

// One token of one head.
struct Token {
  const Placement& x;
  const uint8_t* const codes;   // [dim]
  const uint8_t* const widths;  // [dim]
  uint8_t* const head;
  const int64_t token;

  // Bit planes of a width, lowest bits first: work(bits, shift).
  template <class Work> void words_planes(Work work) const {
    const int bits = widths[0];
    if (bits == 3) work(2, 0), work(1, 2);
    else work(bits, 0);
  }

  int16_t* words() const { return reinterpret_cast<int16_t*>(head); }

  // A token is a column of whole words [dim * bits / 16, page], in every group of channels.
  void keys() const {
    int16_t* to = words() + token;
    for (int64_t first = 0; first < x.dim; first += x.group) {
      const int64_t channels = x.dim - first < x.group ? x.dim - first : x.group;
      words_planes([&](int bits, int shift) {
        const int fields = WORD / bits;
        const int64_t rows = channels / fields;
        for (int64_t c = 0; c < rows; c++, to += x.page) {
          int word = 0;
          for (int j = 0; j < fields; j++)
            word |= (codes[first + j * rows + c] >> shift & ((1 << bits) - 1)) << (j * bits);
          *to = int16_t(word);
        }
      });
    }
  }

  // A token is a field of a row of words [page * bits / 16, dim].
  void values() const {
    int16_t* to = words();
    words_planes([&](int bits, int shift) {
      const int64_t rows = x.page * bits / WORD;
      const int at = int(token / rows) * bits, mask = (1 << bits) - 1;
      int16_t* row = to + token % rows * x.dim;
      for (int64_t d = 0; d < x.dim; d++)
        row[d] = int16_t((row[d] & ~(mask << at)) | (codes[d] >> shift & mask) << at);
      to += rows * x.dim;
    });
  }

  void place() const {
    switch (x.form) {
      case KEYS: return keys();
      case VALUES: return values();
      default: return directions();
    }
  }

 private:
  // A token is a field of a byte of each direction's planes.
  void directions() const {
    uint8_t* to = head;
    for (int64_t d = 0; d < x.dim; d++)
      for (int shift = 0; shift < widths[d];) {
        const int left = widths[d] - shift, bits = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int64_t bytes = x.page * bits / 8;
        const int at = int(token / bytes) * bits, mask = (1 << bits) - 1;
        uint8_t& byte = to[token % bytes];
        byte = uint8_t((byte & ~(mask << at)) | (codes[d] >> shift & mask) << at);
        to += bytes, shift += bits;
      }
  }
};

// A token must not reach others, not even with weight 0: NaN becomes 0, infinity the largest number.
uint16_t finite(uint16_t stored, int64_t dtype) {
  const uint16_t infinity = dtype == FLOAT16 ? 0x7c00 : 0x7f80, size = stored & 0x7fff;
  return size > infinity ? 0 : size == infinity ? stored - 1 : stored;
}

vf read_state(const Storing& x, int64_t at) {
  return x.dtype == FLOAT32 ? read<FLOAT32>(x.states, at)
       : x.dtype == FLOAT16 ? read<FLOAT16>(x.states, at)
                            : read<BFLOAT16>(x.states, at);
}

// Codes of one group, whose channels are whole vectors; its scale and zero go to `scale` and behind it.
void encode(const Storing& x, int64_t from, int64_t channels, uint8_t* codes, uint16_t* scale) {
  const float levels = (1 << x.to.widths[0]) - 1;
  Range range;
  for (int64_t d = 0; d < channels; d += W) range.add(read_state(x, from + d));
  const vf low = splat(-largest(-range.low)), high = splat(largest(range.high));
  const vh stored[] = {to_stored(x.scale_dtype, raw_scale(low, high, splat(sum(range.poison)), levels)),
                       to_stored(x.scale_dtype, low + splat(0.0f))};  // -0 becomes 0, as in naive.py
  const vf zero = from_stored(x.scale_dtype, &stored[1]), inverse = reciprocal(from_stored(x.scale_dtype, &stored[0]));
  for (int64_t d = 0; d < channels; d += W) {
    const vi some = code(read_state(x, from + d), zero, inverse, levels);
    for (int i = 0; i < W; i++) codes[d + i] = uint8_t(some[i]);
  }
  scale[0] = finite(stored[0][0], x.scale_dtype);
  scale[x.scales_strides[3]] = finite(stored[1][0], x.scale_dtype);
}

uint8_t* head_of(const Placement& x, int64_t h, int64_t slot) {
  return x.blocks + slot / x.page * x.block_bytes + x.places[h];
}

}  // namespace

void place(const Placement& x) {
#pragma omp parallel for num_threads(x.threads) schedule(static)
  for (int64_t h = 0; h < x.heads; h++)  // tokens of a head share bytes, heads do not
    for (int64_t i = 0; i < x.tokens; i++) {
      const uint8_t* codes = x.codes + (i * x.heads + h) * x.dim;
      Token{x, codes, x.widths + h * x.dim, head_of(x, h, x.slots[i]), x.slots[i] % x.page}.place();
    }
}

void store(const Storing& x) {
  const Placement& to = x.to;
  const int64_t *states = x.states_strides, *scales = x.scales_strides;
#pragma omp parallel for num_threads(to.threads) schedule(static)
  for (int64_t h = 0; h < to.heads; h++) {
    std::vector<uint8_t> codes(to.dim);
    for (int64_t i = 0; i < to.tokens; i++) {
      const int64_t block = to.slots[i] / to.page, token = to.slots[i] % to.page;
      const int64_t from = i * states[0] + h * states[1];
      uint16_t* scale = x.scales + block * scales[0] + h * scales[1] + token;
      for (int64_t first = 0; first < to.dim; first += to.group, scale += scales[2]) {
        const int64_t left = to.dim - first;
        encode(x, from + first, left < to.group ? left : to.group, codes.data() + first, scale);
      }
      Token{to, codes.data(), to.widths, head_of(to, h, to.slots[i]), token}.place();
    }
  }
}

}  // namespace KVMIX_ISA
