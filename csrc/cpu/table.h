// Defines PHI_ISA::kernels: includes the kernels' source, compiled for the Vec that the including file has defined.
#pragma once
#include "cpu/adam.h"
#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/bias_gelu.h"
#include "cpu/cross_entropy.h"
#include "cpu/gated_activation.h"
#include "cpu/layer_norm.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/muon.h"
#include "cpu/rotary.h"
#include "cpu/scaled.h"
#include "cpu/weight_gradient.h"

#define PHI_STRING(x) #x
#define PHI_NAME(x) PHI_STRING(x)

namespace phi_fast::cpu::PHI_ISA {

extern const Kernels kernels = {
    PHI_NAME(PHI_ISA),
    layer_norm_forward,
    layer_norm_backward,
    bias_gelu_forward,
    bias_gelu_backward,
    gated_activation_forward,
    gated_activation_backward,
    rotary,
    attention_forward,
    attention_backward,
    cross_entropy,
#if defined(PHI_AVX512_BF16)
    linear_cross_entropy,
#else
    nullptr,
#endif
    scaled,
#if defined(PHI_AMX)
    weight_gradient,
#else
    nullptr,
#endif
    adam,
    grad_norm_squared,
    muon_momentum,
    muon_update,
};

}  // namespace phi_fast::cpu::PHI_ISA
