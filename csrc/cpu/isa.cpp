#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace phi_fast::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

// The best first.
std::vector<Candidate> candidates() {
  std::vector<Candidate> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&avx512_bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
  all.push_back({&avx512::kernels, avx512});
  all.push_back({&avx2::kernels, avx2});
#endif
  all.push_back({&portable::kernels, true});
  return all;
}

const Kernels& find(const std::string& name) {
  std::string known;
  for (const Candidate& candidate : candidates()) {
    if (name.empty() && candidate.supported) return *candidate.kernels;
    if (name == candidate.kernels->name) {
      if (candidate.supported) return *candidate.kernels;
      throw std::invalid_argument(
          "PHI_FAST_ISA=" + name +
          ": this processor does not have these instructions; best here: " + supported_isas().front());
    }
    known += (known.empty() ? "" : ", ") + std::string(candidate.kernels->name);
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

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) names.emplace_back(candidate.kernels->name);
  }
  return names;
}

}  // namespace phi_fast::cpu
