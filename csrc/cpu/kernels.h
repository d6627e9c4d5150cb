// The interface that every instruction set implements: the arguments of each kernel, and the table of entry points.
//
// Pointers point to the first element, strides count elements, and the last stride is 1. `dtype` is the type behind
// every void pointer of a call. `threads` is the largest number of threads to use. Sums over rows are taken in an order
// that does not depend on it.
#pragma once
#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"

namespace phi_fast::cpu {

/// A matrix by its rows; data is null if an optional matrix is absent.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;

  template <class T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride;
  }
  explicit operator bool() const { return data != nullptr; }
};

struct LayerNormForward {
  DType dtype;
  int64_t rows, columns;
  Rows x, residual, summed, out;  // with residual: x + residual is written to summed and normalised
  Rows shifted;                   // with shift: what is normalised, plus shift
  const float *weight, *bias;     // (columns,)
  const float* shift;             // (columns,) or null
  float eps;
  float *mean, *rstd;  // (rows,)
  int threads;
};

struct LayerNormBackward {
  DType dtype;
  int64_t rows, columns;
  Rows dy, x, residual_grad, dx;
  const float *weight, *mean, *rstd;
  float *dweight, *dbias;  // (columns,)
  int threads;
};

enum class Gelu : int { kTanh, kErf };

struct BiasGeluForward {
  DType dtype;
  Gelu gelu;
  int64_t rows, columns;
  Rows x, out;
  const float* bias;  // (columns,) or null
  int threads;
};

struct BiasGeluBackward {
  DType dtype;
  Gelu gelu;
  int64_t rows, columns;
  Rows dout, x, dx, activation;
  const float* bias;  // (columns,) or null
  float* dbias;       // (columns,)
  int threads;
};

enum class Gate : int { kSilu, kGeluTanh };

struct GatedActivationForward {
  DType dtype;
  Gate activation;
  int64_t rows, columns;
  Rows gate, up, out;
  int threads;
};

struct GatedActivationBackward {
  DType dtype;
  Gate activation;
  int64_t rows, columns;
  Rows dout, gate, up, dgate, dup;
  int threads;
};

struct Rotary {
  DType dtype;
  int64_t batch, sequence, heads;
  void* x;
  int64_t batch_stride, sequence_stride, head_stride;
  const float *cos, *sin;  // (positions, half)
  int64_t half;
  const int64_t* positions;  // (batch, sequence) or null: row s is at offset + s
  int64_t offset;
  bool interleaved, inverse;
  int threads;
};

/// A (batch, sequence, heads, head_dim) tensor; data is null if it is absent.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, sequence_stride = 0, head_stride = 0;

  template <class T>
  T* row(int64_t batch, int64_t position, int64_t head) const {
    return static_cast<T*>(data) + batch * batch_stride + position * sequence_stride + head * head_stride;
  }
};

struct Attention {
  DType dtype;
  int64_t batch, sequence, keys, heads, key_heads, head_dim;  // keys: rows of k and v
  Heads q, k, v, out;
  float* lse;                // (batch, heads, sequence)
  const int32_t* documents;  // 0, then the end of each document, with batch 1; or null
  int64_t document_count;
  const float *cos, *sin;  // (positions, half) to rotate q and k by, or null
  int64_t half;
  float scale;
  int64_t least, most;  // row i of a document sees its key j where least <= j - i <= most
  int threads;
  Heads dout, dq, dk, dv;  // for the backward
};

struct CrossEntropy {
  DType dtype;
  int64_t rows, columns;
  Rows logits;
  const int64_t* labels;  // (rows,)
  const float* bias;      // (columns,) or null
  const float* weight;    // (columns,) or null: class weights
  float mean_weight;      // mean class weight; 1 if weight is null
  int64_t ignore_index;
  float label_smoothing, z_loss;
  float softcap;       // 0: none
  const float* scale;  // factor of the gradient: (rows,), or one for all
  bool scale_by_row;
  bool need_grad;
  float* dbias;   // (columns,) or null: the column sums are added to it
  float* losses;  // (rows,)
  int threads;
};

/// Cross entropy of the logits hidden · weightᵀ, for bf16 hidden (rows, width) and weight (columns, width). The logits
/// are never stored: loss.logits is null, and loss.need_grad says whether any gradient is given.
struct LinearCrossEntropy {
  CrossEntropy loss;
  int64_t width;
  Rows hidden, weight;
  float* dhidden;  // (rows, width) or null
  float* dweight;  // (columns, width) or null
  bool add;        // dweight += the gradient
};

/// out (a_columns, b_columns) = aᵀ · b (or += with `add`) for bf16 a (rows, a_columns) and b (rows, b_columns).
struct WeightGradient {
  int64_t rows, a_columns, b_columns;
  Rows a, b;
  DType out_dtype;
  Rows out;
  bool add;
  int threads;
};

/// out = x · factor (or += with `add`), element by element.
struct Scaled {
  DType from, to;
  int64_t size;
  const void* x;
  void* out;
  float factor;
  bool add;
  int threads;
};

/// One tensor of an Adam step. If master is not null, it is read instead of the parameter.
struct AdamTensor {
  int64_t size;
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq, *master;
};

struct Adam {
  DType param_dtype, grad_dtype;
  const AdamTensor* tensors;
  int64_t count;
  float grad_scale;
  float one_minus_beta1, beta2, one_minus_beta2;
  float step_size;      // lr / (1 - beta1^t)
  float inverse_root2;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float l2;    // weight decay added to the gradient
  float keep;  // 1 - lr · weight decay, or 1: the parameter is multiplied by it
  int threads;
};

struct GradNorm {
  DType dtype;
  const void* const* grads;
  const int64_t* sizes;
  int64_t count;
  int threads;
};

/// The elements of one tensor, or of a part of it.
struct MuonMomentum {
  int64_t size;
  DType grad_dtype, direction_dtype;
  const void* grad;
  float* momentum;
  void* direction;
  float grad_scale, one_minus_beta;
  bool nesterov;
  int threads;
};

/// If master is not null, it is read instead of the parameter. The momentum is read to see whether it is finite.
struct MuonUpdate {
  int64_t size;
  DType param_dtype, update_dtype;
  void* param;
  const void* update;
  const float* momentum;
  float* master;
  float rate;  // lr · scale
  float keep;  // 1 - lr · weight decay
  int threads;
};

struct Kernels {
  const char* name;
  void (*layer_norm_forward)(const LayerNormForward&);
  void (*layer_norm_backward)(const LayerNormBackward&);
  void (*bias_gelu_forward)(const BiasGeluForward&);
  void (*bias_gelu_backward)(const BiasGeluBackward&);
  void (*gated_activation_forward)(const GatedActivationForward&);
  void (*gated_activation_backward)(const GatedActivationBackward&);
  void (*rotary)(const Rotary&);
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
  void (*cross_entropy)(const CrossEntropy&);
  void (*linear_cross_entropy)(const LinearCrossEntropy&);  // null if the instruction set has no bf16 products
  void (*scaled)(const Scaled&);
  void (*weight_gradient)(const WeightGradient&);  // null if the instruction set has no tiles
  bool (*adam)(const Adam&);                       // returns whether every value it wrote is finite
  double (*grad_norm_squared)(const GradNorm&);
  void (*muon_momentum)(const MuonMomentum&);
  bool (*muon_update)(const MuonUpdate&);  // returns as adam does
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
// Weak symbols: their address is null if setup.py left them out of the build.
#define PHI_OPTIONAL __attribute__((weak))
namespace avx2 {
PHI_OPTIONAL extern const Kernels kernels;
}
namespace avx512 {
PHI_OPTIONAL extern const Kernels kernels;
}
namespace avx512_bf16 {
PHI_OPTIONAL extern const Kernels kernels;
}
namespace amx {
PHI_OPTIONAL extern const Kernels kernels;
}
#endif

/// Rows that are processed together, so that their column sums are added in registers before they are added in memory.
inline constexpr int kGroup = 4;

/// The division of rows into blocks, each with its own column sums. It depends only on the shape.
struct RowBlocks {
  int64_t rows, count;

  RowBlocks(int64_t all_rows, int64_t least_rows) : rows(all_rows), count(all_rows / least_rows) {
    if (count < 1) count = 1;
    if (count > 64) count = 64;
  }

  /// Calls fn(row) for each row of the block.
  template <class Fn>
  void by_row(int64_t block, Fn fn) const {
    for (int64_t r = rows * block / count; r < rows * (block + 1) / count; ++r) fn(r);
  }

  /// Calls fn(first row, number of rows) for the block's rows, kGroup at a time.
  template <class Fn>
  void by_group(int64_t block, Fn fn) const {
    const int64_t end = rows * (block + 1) / count;
    for (int64_t r = rows * block / count; r < end; r += kGroup) fn(r, int(end - r < kGroup ? end - r : kGroup));
  }
};

/// Calls fn(T{}) with the storage type T that `dtype` names.
template <class Fn>
void with_type(DType dtype, Fn fn) {
  if (dtype == DType::kFloat32) fn(float{});
  if (dtype == DType::kBFloat16) fn(BFloat16{});
  if (dtype == DType::kFloat16) fn(Float16{});
}

}  // namespace phi_fast::cpu
