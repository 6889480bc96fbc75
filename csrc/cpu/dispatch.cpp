#include "dispatch.hpp"

#include <atomic>

namespace fused_dni {

// Every file of kernels has a function that enters its own into the table; setup.py says for which
// instruction sets they were compiled.
#define FUSED_DNI_DECLARE(isa)             \
  namespace isa {                          \
  void add_linear(Kernels&);               \
  void add_linear_cross_entropy(Kernels&); \
  void add_synthesizer(Kernels&);          \
  void add_lstm(Kernels&);                 \
  void add_lstm_cell(Kernels&);            \
  void add_lstm_update(Kernels&);          \
  inline void add(Kernels& to) {           \
    add_linear(to);                        \
    add_linear_cross_entropy(to);          \
    add_synthesizer(to);                   \
    add_lstm(to);                          \
    add_lstm_cell(to);                     \
    add_lstm_update(to);                   \
  }                                        \
  }
FUSED_DNI_DECLARE(portable)
#ifdef FUSED_DNI_WITH_AVX2
FUSED_DNI_DECLARE(avx2)
#endif
#ifdef FUSED_DNI_WITH_AVX512
FUSED_DNI_DECLARE(avx512)
#endif
#ifdef FUSED_DNI_WITH_AVX512BF16
namespace avx512bf16 {
void add_linear_bf16(Kernels&);
}
#endif
#undef FUSED_DNI_DECLARE

namespace {

struct Variant {
  const char* name;
  Kernels kernels;
};

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
#endif

std::vector<Variant> runnable() {
  std::vector<Variant> found;
  const auto add = [&](const char* name, void (*kernels)(Kernels&)) {
    found.push_back({name, {}});
    kernels(found.back().kernels);
  };
  add("portable", portable::add);
#ifdef FUSED_DNI_WITH_AVX2
  if (runs_avx2()) add("avx2", avx2::add);
#endif
#ifdef FUSED_DNI_WITH_AVX512
  if (runs_avx512()) {
    add("avx512", avx512::add);
#ifdef FUSED_DNI_WITH_AVX512BF16
    if (__builtin_cpu_supports("avx512bf16")) avx512bf16::add_linear_bf16(found.back().kernels);
#endif
  }
#endif
  return found;
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = runnable();
  return all;
}

std::atomic<const Variant*>& chosen() {
  static std::atomic<const Variant*> variant{&variants().back()};
  return variant;
}

}  // namespace

const Kernels& kernels() { return chosen().load(std::memory_order_relaxed)->kernels; }

std::string isa() { return chosen().load(std::memory_order_relaxed)->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.emplace_back(variant.name);
  return names;
}

std::string wider() {
  const std::string widest = runs_avx512() ? "avx512" : runs_avx2() ? "avx2" : "portable";
  return variants().back().name == widest ? "" : widest;
}

bool set_isa(const std::string& name) {
  for (const Variant& variant : variants())
    if (variant.name == name) {
      chosen().store(&variant, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace fused_dni
