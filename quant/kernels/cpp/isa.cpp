#include "isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace coldstream {
namespace {

#if defined(COLDSTREAM_HAS_AVXVNNI)
// Leaf 7, subleaf 1, EAX bit 4; compilers know the name of this feature only since recently.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

#if defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // every Apple processor of this kind
#endif
}
#endif

struct Choice {
  const Kernels* table;
  bool runs;
};

// Best first.
const Choice* choices(int* count) {
  static const Choice all[] = {
#if defined(__x86_64__)
#if defined(COLDSTREAM_HAS_AVX512BF16)
      {&avx512bf16_kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
      {&avx512_kernels, has_avx512()},
#if defined(COLDSTREAM_HAS_AVXVNNI)
      {&avxvnni_kernels, has_avxvnni()},
#endif
      {&avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#elif defined(__aarch64__)
      {&neon_kernels, has_dot_product()},
#endif
      {&portable_kernels, true},
  };
  *count = int(sizeof all / sizeof *all);
  return all;
}

const Kernels* best() {
  int count;
  const Choice* all = choices(&count);
  while (!all->runs) ++all;
  return all->table;
}

std::atomic<const Kernels*> chosen{nullptr};

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

// Zen 4 and 5 are fastest at the first pair; Granite Rapids reads 5 % more per second at the second.
const int64_t prefetch_ahead[2] = {is_intel() ? 4096 : 16384, is_intel() ? 4096 : 2048};

// Granite Rapids takes rows one after the other from memory by 33, 30, 20, 10 and 10 % faster with 2 to 6
// tokens than 16 at a time; elsewhere the work that is spared counts for more.
const int across_tokens = is_intel() ? 6 : 1;

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = best(), std::memory_order_relaxed);
  return *table;
}

}  // namespace coldstream

// Choose an instruction set by name ("" = the best this processor has).
COLDSTREAM_API int32_t cs_set_isa(const char* name) {
  using namespace coldstream;
  if (!*name) {
    chosen.store(best());
    return kOk;
  }
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(all[i].table->name, name)) {
      if (!all[i].runs) return kUnsupported;
      chosen.store(all[i].table);
      return kOk;
    }
  return kBadArgument;
}

COLDSTREAM_API const char* cs_isa() { return coldstream::kernels().name; }

// The name of the i-th instruction set this processor can run, best first; null past the last.
COLDSTREAM_API const char* cs_isa_at(int32_t index) {
  using namespace coldstream;
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs && index-- == 0) return all[i].table->name;
  return nullptr;
}
