// Exports the operations to Python.
#include <cstddef>
#include <string>

#include "../../attend/choice.h"
#include "../../attend/cpu.h"
#include "../../blocks/cpu.h"
#include "../../quantize/cpu.h"
#include "../../transform/cpu.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

namespace KVMIX_ISA {
void attend(const Attention&);
void choose(const Choice&);
void quantize(const Quantization&);
void encode(const Encoding&);
void code(const Coding&);
void place(const Placement&);
void store(const Storing&);
}  // namespace KVMIX_ISA

namespace {

void describe_struct(std::string& out, const char* name, size_t bytes) {
  out += std::string("\n") + name + " " + std::to_string(bytes);
}

void describe_field(std::string& out, const char* name, size_t offset, size_t bytes) {
  out += std::string(" ") + name + ":" + std::to_string(offset) + ":" + std::to_string(bytes);
}

// One line a struct, "name bytes field:offset:bytes ...", which structs.py compares with its mirrors when it loads this
// library. A field that is missing here shows in the struct's bytes, unless it fits the padding at its end.
std::string describe_structs() {
  std::string out;
#define STRUCT(type) describe_struct(out, #type, sizeof(type))
#define FIELD(type, name) describe_field(out, #name, offsetof(type, name), sizeof(type::name))
  STRUCT(Run);
  FIELD(Run, data); FIELD(Run, scales); FIELD(Run, data_strides); FIELD(Run, scales_strides);
  FIELD(Run, bits); FIELD(Run, channels); FIELD(Run, group); FIELD(Run, dtype);
  FIELD(Run, by_token);
  STRUCT(Coded);
  FIELD(Coded, codes); FIELD(Coded, scales); FIELD(Coded, places); FIELD(Coded, exact); FIELD(Coded, widths);
  FIELD(Coded, offsets); FIELD(Coded, decoding); FIELD(Coded, mean); FIELD(Coded, middles); FIELD(Coded, turns);
  FIELD(Coded, codes_strides); FIELD(Coded, scales_strides); FIELD(Coded, places_strides);
  FIELD(Coded, exact_strides); FIELD(Coded, exact_tokens); FIELD(Coded, exact_dtype); FIELD(Coded, frame);
  FIELD(Coded, pairs); FIELD(Coded, start); FIELD(Coded, interleaved);
  STRUCT(Vectors);
  FIELD(Vectors, codes); FIELD(Vectors, scales); FIELD(Vectors, books); FIELD(Vectors, codes_strides);
  FIELD(Vectors, scales_strides); FIELD(Vectors, books_strides); FIELD(Vectors, width); FIELD(Vectors, span);
  FIELD(Vectors, scale_dtype);
  STRUCT(Segments);
  FIELD(Segments, sink); FIELD(Segments, tail); FIELD(Segments, runs); FIELD(Segments, coded);
  FIELD(Segments, vectors); FIELD(Segments, order); FIELD(Segments, table);
  FIELD(Segments, sink_strides); FIELD(Segments, tail_strides); FIELD(Segments, order_strides);
  FIELD(Segments, sinks); FIELD(Segments, pages); FIELD(Segments, page); FIELD(Segments, tail_tokens);
  FIELD(Segments, dim);
  FIELD(Segments, run_count); FIELD(Segments, pages_per_order); FIELD(Segments, table_strides);
  FIELD(Segments, is_choice);
  FIELD(Segments, dtype);
  STRUCT(Part);
  FIELD(Part, key); FIELD(Part, value); FIELD(Part, mask); FIELD(Part, mask_strides); FIELD(Part, mask_is_bool);
  FIELD(Part, lengths); FIELD(Part, tokens);
  STRUCT(Attention);
  FIELD(Attention, parts); FIELD(Attention, query); FIELD(Attention, sink_logits); FIELD(Attention, output);
  FIELD(Attention, logarithms); FIELD(Attention, query_strides); FIELD(Attention, dtype);
  FIELD(Attention, part_count); FIELD(Attention, batch); FIELD(Attention, heads); FIELD(Attention, kv_heads);
  FIELD(Attention, queries); FIELD(Attention, dim); FIELD(Attention, value_dim);
  FIELD(Attention, threads); FIELD(Attention, scaling); FIELD(Attention, softcap);
  STRUCT(Choice);
  FIELD(Choice, query); FIELD(Choice, summary); FIELD(Choice, books); FIELD(Choice, numbers);
  FIELD(Choice, query_strides); FIELD(Choice, summary_strides); FIELD(Choice, batch); FIELD(Choice, heads);
  FIELD(Choice, kv_heads); FIELD(Choice, pages); FIELD(Choice, count); FIELD(Choice, rows); FIELD(Choice, dim);
  FIELD(Choice, parts); FIELD(Choice, entries); FIELD(Choice, query_dtype); FIELD(Choice, dtype);
  FIELD(Choice, sharing); FIELD(Choice, threads); FIELD(Choice, scaling);
  STRUCT(Quantization);
  FIELD(Quantization, pages); FIELD(Quantization, words); FIELD(Quantization, scales);
  FIELD(Quantization, pages_strides); FIELD(Quantization, words_strides); FIELD(Quantization, scales_strides);
  FIELD(Quantization, batch); FIELD(Quantization, heads); FIELD(Quantization, count); FIELD(Quantization, page);
  FIELD(Quantization, dim);
  FIELD(Quantization, is_key); FIELD(Quantization, bits); FIELD(Quantization, group); FIELD(Quantization, groups);
  FIELD(Quantization, dtype); FIELD(Quantization, scale_dtype); FIELD(Quantization, encoder);
  FIELD(Quantization, threads);
  STRUCT(Encoding);
  FIELD(Encoding, z); FIELD(Encoding, codes); FIELD(Encoding, scales); FIELD(Encoding, errors);
  FIELD(Encoding, widths); FIELD(Encoding, places); FIELD(Encoding, deviation); FIELD(Encoding, steps);
  FIELD(Encoding, batch); FIELD(Encoding, heads); FIELD(Encoding, count); FIELD(Encoding, page);
  FIELD(Encoding, dim); FIELD(Encoding, page_bytes); FIELD(Encoding, threads);
  STRUCT(Coding);
  FIELD(Coding, states); FIELD(Coding, frames); FIELD(Coding, frequencies); FIELD(Coding, encoder);
  FIELD(Coding, mean); FIELD(Coding, deviation); FIELD(Coding, steps); FIELD(Coding, widths);
  FIELD(Coding, codes); FIELD(Coding, scales); FIELD(Coding, states_strides); FIELD(Coding, tokens);
  FIELD(Coding, heads); FIELD(Coding, dim); FIELD(Coding, dtype); FIELD(Coding, pairs);
  FIELD(Coding, first); FIELD(Coding, interleaved); FIELD(Coding, frame); FIELD(Coding, threads);
  STRUCT(Placement);
  FIELD(Placement, codes); FIELD(Placement, slots); FIELD(Placement, blocks); FIELD(Placement, widths);
  FIELD(Placement, places); FIELD(Placement, block_bytes); FIELD(Placement, tokens); FIELD(Placement, heads);
  FIELD(Placement, dim); FIELD(Placement, page); FIELD(Placement, form); FIELD(Placement, group);
  FIELD(Placement, threads);
  STRUCT(Storing);
  FIELD(Storing, to); FIELD(Storing, states); FIELD(Storing, scales); FIELD(Storing, states_strides);
  FIELD(Storing, scales_strides); FIELD(Storing, dtype); FIELD(Storing, scale_dtype);
#undef FIELD
#undef STRUCT
  return out.substr(1);
}

}  // namespace

EXPORT const char* kvmix_isa() { return TEXT(KVMIX_ISA); }
EXPORT const char* kvmix_structs() {
  static const std::string text = describe_structs();
  return text.c_str();
}
EXPORT void kvmix_attend(const Attention* x) { KVMIX_ISA::attend(*x); }
EXPORT void kvmix_choose(const Choice* x) { KVMIX_ISA::choose(*x); }
EXPORT void kvmix_quantize(const Quantization* x) { KVMIX_ISA::quantize(*x); }
EXPORT void kvmix_encode(const Encoding* x) { KVMIX_ISA::encode(*x); }
EXPORT void kvmix_code(const Coding* x) { KVMIX_ISA::code(*x); }
EXPORT void kvmix_place(const Placement* x) { KVMIX_ISA::place(*x); }
EXPORT void kvmix_store(const Storing* x) { KVMIX_ISA::store(*x); }
