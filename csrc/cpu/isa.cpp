#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace phi_fast::cpu {
namespace {

/// Whether tiles with bf16 products can be used. The system must permit it, since it has to save 8 KB more per thread.
bool amx() {
#if defined(PHI_EMULATE_TILES)
  return true;
#elif defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h's ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBFloat16) || !(d & kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Candidate {
  const char* name;
  const Kernels* kernels;  // null if the compiler did not know the instructions
  bool supported;          // whether the processor has the instructions
};

/// All instruction sets, the best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(PHI_WITHOUT_AVX512_BF16)
  const bool bf16 = false;  // a compiler without these instructions may not know the processor's flag either
#else
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  all.push_back({"amx", &amx::kernels, bf16 && amx()});
  all.push_back({"avx512_bf16", &avx512_bf16::kernels, bf16});
  all.push_back({"avx512", &avx512::kernels, avx512});
  all.push_back({"avx2", &avx2::kernels, avx2});
#endif
  all.push_back({"portable", &portable::kernels, true});
  return all;
}

const Kernels& find(const std::string& name) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    const bool usable = candidate.supported && candidate.kernels != nullptr;
    if (usable && (name.empty() || name == candidate.name)) return *candidate.kernels;
    if (name == candidate.name) {
      const char* reason = candidate.kernels == nullptr
                               ? "not compiled in: the compiler that built phi_fast does not know these instructions"
                               : "this processor does not have these instructions";
      throw std::invalid_argument("PHI_FAST_ISA=" + name + ": " + reason + "; best here: " + supported_isas().front());
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::invalid_argument("PHI_FAST_ISA=" + name + ": expected one of " + known + ", or unset");
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() {
  if (in_use.load() == nullptr) force_isa("");
  return *in_use.load();
}

void force_isa(const std::string& name) {
  const char* environment = std::getenv("PHI_FAST_ISA");
  in_use.store(&find(name.empty() && environment != nullptr ? environment : name));
}

std::vector<std::string> omitted_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.kernels == nullptr) names.emplace_back(candidate.name);
  }
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported && candidate.kernels != nullptr) names.emplace_back(candidate.name);
  }
  return names;
}

}  // namespace phi_fast::cpu
