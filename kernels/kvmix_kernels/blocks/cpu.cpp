// Put codes of single tokens into blocks that hold others already: bits of neighbours stay as they are. Compiled once per
// instruction set. Layouts are those of layout.py and transform_layout.py.
#include "cpu.h"

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

}  // namespace

void place(const Placement& x) {
#pragma omp parallel for num_threads(x.threads) schedule(static)
  for (int64_t h = 0; h < x.heads; h++)  // tokens of a head share bytes, heads do not
    for (int64_t i = 0; i < x.tokens; i++) {
      uint8_t* head = x.blocks + x.slots[i] / x.page * x.block_bytes + x.places[h];
      const Token token{x, x.codes + (i * x.heads + h) * x.dim, x.widths + h * x.dim, head, x.slots[i] % x.page};
      switch (x.form) {
        case KEYS: token.keys(); break;
        case VALUES: token.values(); break;
        default: token.directions(); break;
      }
    }
}

}  // namespace KVMIX_ISA
