// Chooses the instruction set, once, and exports the operations to Python.
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../../attend/cpu.h"
#include "../../blocks/cpu.h"
#include "../../quantize/cpu.h"
#include "../../transform/cpu.h"

#define KVMIX_DECLARE(isa)                  \
  namespace isa {                           \
  void attend(const Attention&);            \
  void quantize(const Quantization&);       \
  void encode(const Encoding&);             \
  void code(const Coding&);                 \
  void place(const Placement&);             \
  void store(const Storing&);               \
  }

#define EXPORT extern "C" __attribute__((visibility("default")))

KVMIX_DECLARE(generic)
#ifdef KVMIX_HAS_AVX2
KVMIX_DECLARE(avx2)
KVMIX_DECLARE(avx512)
KVMIX_DECLARE(vnni)
#endif

namespace {

struct Variant {
  const char* name;
  void (*attend)(const Attention&);
  void (*quantize)(const Quantization&);
  void (*encode)(const Encoding&);
  void (*code)(const Coding&);
  void (*place)(const Placement&);
  void (*store)(const Storing&);
};

#define VARIANT(isa) {#isa, isa::attend, isa::quantize, isa::encode, isa::code, isa::place, isa::store}

// The best variant that the processor has, or the one asked for if it has that.
Variant choose(const char* wanted) {
#ifdef KVMIX_HAS_AVX2
  const bool any = !wanted || !*wanted;
  __builtin_cpu_init();
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_vnni = has512 && __builtin_cpu_supports("avx512vnni");
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_vnni && (any || !std::strcmp(wanted, "vnni"))) return VARIANT(vnni);
  if (has512 && (any || !std::strcmp(wanted, "avx512"))) return VARIANT(avx512);
  if (has2 && (any || !std::strcmp(wanted, "avx2"))) return VARIANT(avx2);
#endif
  return VARIANT(generic);
}

Variant current = choose(std::getenv("KVMIX_ISA"));

// One line a struct, "name bytes field:offset:bytes ...", which structs.py compares with its mirrors when it loads this
// library. A field that is missing here shows in the struct's bytes, unless it fits the padding at its end.
std::string describe_structs() {
  std::string out;
#define STRUCT(type) out += "\n" #type " " + std::to_string(sizeof(type))
#define FIELD(type, name) \
  out += " " #name ":" + std::to_string(offsetof(type, name)) + ":" + std::to_string(sizeof(type::name))
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
  STRUCT(Segments);
  FIELD(Segments, sink); FIELD(Segments, tail); FIELD(Segments, runs); FIELD(Segments, coded); FIELD(Segments, order);
  FIELD(Segments, table);
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

EXPORT const char* kvmix_isa() { return current.name; }
EXPORT void kvmix_use(const char* name) { current = choose(*name ? name : std::getenv("KVMIX_ISA")); }
EXPORT const char* kvmix_structs() {
  static const std::string text = describe_structs();
  return text.c_str();
}
EXPORT void kvmix_attend(const Attention* x) { current.attend(*x); }
EXPORT void kvmix_quantize(const Quantization* x) { current.quantize(*x); }
EXPORT void kvmix_encode(const Encoding* x) { current.encode(*x); }
EXPORT void kvmix_code(const Coding* x) { current.code(*x); }
EXPORT void kvmix_place(const Placement* x) { current.place(*x); }
EXPORT void kvmix_store(const Storing* x) { current.store(*x); }
