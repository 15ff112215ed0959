// Chooses the instruction set, once, and exports the operations to Python.
#include <cstdlib>
#include <cstring>

#include "../attend/cpu.h"
#include "../quantize/cpu.h"

#define KVMIX_DECLARE(isa)                  \
  namespace isa {                           \
  void attend(const Attention&);            \
  void quantize(const Quantization&);       \
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
};

// The best variant that the processor has, or the one asked for if it has that.
Variant choose(const char* wanted) {
#ifdef KVMIX_HAS_AVX2
  const bool any = !wanted || !*wanted;
  __builtin_cpu_init();
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_vnni = has512 && __builtin_cpu_supports("avx512vnni");
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_vnni && (any || !std::strcmp(wanted, "vnni"))) return {"vnni", vnni::attend, vnni::quantize};
  if (has512 && (any || !std::strcmp(wanted, "avx512"))) return {"avx512", avx512::attend, avx512::quantize};
  if (has2 && (any || !std::strcmp(wanted, "avx2"))) return {"avx2", avx2::attend, avx2::quantize};
#endif
  return {"generic", generic::attend, generic::quantize};
}

Variant current = choose(std::getenv("KVMIX_ISA"));

}  // namespace

EXPORT const char* kvmix_isa() { return current.name; }
EXPORT void kvmix_use(const char* name) { current = choose(name); }
EXPORT void kvmix_attend(const Attention* x) { current.attend(*x); }
EXPORT void kvmix_quantize(const Quantization* x) { current.quantize(*x); }
