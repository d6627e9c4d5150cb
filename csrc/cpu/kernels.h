// What every instruction set's kernels implement: the arguments of each kernel,
// and the table of entry points.
//
// Pointers are to the first element, strides count elements, the last stride
// is 1. One `dtype` holds for every void pointer of a call. `threads` is the
// most to use. Sums over rows are taken in an order that does not depend on the
// thread count.
#pragma once
#include <cstdint>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"

namespace phi_fast::cpu {

/// A matrix by rows; null where optional.
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
  Rows x, residual, summed, out;  // with residual: x + residual goes to summed,
                                  // and is what is normalised
  Rows shifted;                   // with shift: what is normalised + shift
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

/// A (batch, sequence, heads, head_dim) tensor; null where there is none.
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
  const int32_t* documents;  // ends of documents, 0 first, with batch 1; or null
  int64_t document_count;
  const float *cos, *sin;  // (positions, half), or null: q and k are rotated
  int64_t half;
  float scale;
  int64_t least, most;  // row i of a document sees its key j where least <= j - i <= most
  int threads;
  Heads dout, dq, dk, dv;  // of the backward
};

struct CrossEntropy {
  DType dtype;
  int64_t rows, columns;
  Rows logits;
  const int64_t* labels;  // (rows,)
  const float* bias;      // (columns,) or null
  const float* weight;    // (columns,) or null: a class's
  float mean_weight;      // of all classes; 1 where weight is null
  int64_t ignore_index;
  float label_smoothing, z_loss;
  float softcap;       // 0: none
  const float* scale;  // of the gradient: (rows,), or one for all
  bool scale_by_row;
  bool need_grad;
  float* dbias;   // (columns,) or null: column sums are added
  float* losses;  // (rows,)
  int threads;
};

/// out (a_columns, b_columns) (+)= aᵀ · b of bf16 a (rows, a_columns) and b
/// (rows, b_columns).
struct WeightGradient {
  int64_t rows, a_columns, b_columns;
  Rows a, b;
  DType out_dtype;
  Rows out;
  bool add;
  int threads;
};

/// out (+)= x · factor, element by element.
struct Scaled {
  DType from, to;
  int64_t size;
  const void* x;
  void* out;
  float factor;
  bool add;
  int threads;
};

/// One tensor of an Adam step. master is null where the parameter is its own;
/// else it is read in the parameter's place.
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
  float keep;  // 1 - lr · weight decay, or 1: multiplied onto the parameter
  int threads;
};

struct GradNorm {
  DType dtype;
  const void* const* grads;
  const int64_t* sizes;
  int64_t count;
  int threads;
};

struct Kernels {
  const char* name;
  void (*layer_norm_forward)(const LayerNormForward&);
  void (*layer_norm_backward)(const LayerNormBackward&);
  void (*bias_gelu_forward)(const BiasGeluForward&);
  void (*bias_gelu_backward)(const BiasGeluBackward&);
  void (*rotary)(const Rotary&);
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
  void (*cross_entropy)(const CrossEntropy&);
  void (*scaled)(const Scaled&);
  void (*weight_gradient)(const WeightGradient&);  // null where the processor has no tiles
  bool (*adam)(const Adam&);                       // whether every value it wrote is finite
  double (*grad_norm_squared)(const GradNorm&);
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
// Weak: at null where setup.py left them out of the build.
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

/// Rows that are taken together, so that their column sums meet in registers
/// before they meet memory.
inline constexpr int kGroup = 4;

/// How rows are cut into blocks, each with its own column sums. It depends on
/// the shape alone.
struct RowBlocks {
  int64_t rows, count;

  RowBlocks(int64_t all_rows, int64_t least_rows) : rows(all_rows), count(all_rows / least_rows) {
    if (count < 1) count = 1;
    if (count > 64) count = 64;
  }

  /// fn(row) for each of the block's rows.
  template <class Fn>
  void by_row(int64_t block, Fn fn) const {
    for (int64_t r = rows * block / count; r < rows * (block + 1) / count; ++r) fn(r);
  }

  /// fn(first row, how many) for the block's rows, kGroup at a time.
  template <class Fn>
  void by_group(int64_t block, Fn fn) const {
    const int64_t end = rows * (block + 1) / count;
    for (int64_t r = rows * block / count; r < end; r += kGroup) fn(r, int(end - r < kGroup ? end - r : kGroup));
  }
};

/// fn(T{}) with the storage type that `dtype` names.
template <class Fn>
void with_type(DType dtype, Fn fn) {
  if (dtype == DType::kFloat32) fn(float{});
  if (dtype == DType::kBFloat16) fn(BFloat16{});
  if (dtype == DType::kFloat16) fn(Float16{});
}

}  // namespace phi_fast::cpu
