// Tensors as kernels/cpp/_tensors.py passes them: each address comes with the dtype, sizes and strides of the data
// there, and every entry compares these with what its kernel reads and writes.
#pragma once
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace phi_fast::cpu {

using Sizes = std::vector<int64_t>;

/// Sizes and strides are torch's, in elements. dtype is a code of kernels/cpp/_tensors.py, whose first codes are
/// DType's.
struct Tensor {
  uintptr_t address = 0;
  int dtype = 0;
  Sizes sizes, strides;

  int64_t numel() const;
};

using MaybeTensor = std::optional<Tensor>;

template <class T>
inline constexpr int kCode = -1;
template <>
inline constexpr int kCode<float> = int(DType::kFloat32);
template <>
inline constexpr int kCode<int64_t> = 3;
template <>
inline constexpr int kCode<int32_t> = 4;

/// The checks of one call. Each throws std::invalid_argument (ValueError in Python) with the op, the argument, its
/// value and what was expected.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  /// The storage type of a tensor with `dims` dims. Fails for a type that the kernels do not compute with.
  DType dtype(const char* name, const Tensor& x, size_t dims) const;
  /// (rows, columns) with last stride 1; null if there is no tensor.
  Rows rows(const char* name, const Tensor& x, DType dtype, int64_t rows, int64_t columns) const;
  Rows rows(const char* name, const MaybeTensor& x, DType dtype, int64_t rows, int64_t columns) const {
    return x ? this->rows(name, *x, dtype, rows, columns) : Rows{};
  }
  /// (batch, sequence, heads, head_dim) with last stride 1.
  Heads heads(const char* name, const Tensor& x, DType dtype, const Sizes& sizes) const;
  /// Contiguous data of type T and these sizes; null if there is no tensor.
  template <class T>
  T* whole(const char* name, const Tensor& x, const Sizes& sizes) const {
    return static_cast<T*>(contiguous(name, x, kCode<T>, sizes));
  }
  template <class T>
  T* whole(const char* name, const MaybeTensor& x, const Sizes& sizes) const {
    return x ? whole<T>(name, *x, sizes) : nullptr;
  }
  /// `count` contiguous elements of any shape.
  void* flat(const char* name, const Tensor& x, int dtype, int64_t count) const;
  /// Fails with `message` unless `holds`.
  void expect(bool holds, const std::string& message) const;
  int threads(int count) const;

 private:
  void* contiguous(const char* name, const Tensor& x, int dtype, const Sizes& sizes) const;
  void check(const char* name, const Tensor& x, int dtype, const Sizes& sizes, bool holds, const char* strides) const;

  const char* op_;
};

/// The sizes as text, such as "(2, 3)".
std::string shown(const Sizes& sizes);

}  // namespace phi_fast::cpu

template <>
struct pybind11::detail::type_caster<phi_fast::cpu::Tensor> {
  using Tensor = phi_fast::cpu::Tensor;
  using Parts = std::tuple<uintptr_t, int, phi_fast::cpu::Sizes, phi_fast::cpu::Sizes>;
  PYBIND11_TYPE_CASTER(Tensor, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]]"));

  bool load(handle from, bool convert) {
    make_caster<Parts> parts;
    if (!parts.load(from, convert)) return false;
    auto [address, dtype, sizes, strides] = cast_op<Parts>(std::move(parts));
    value = {address, dtype, std::move(sizes), std::move(strides)};
    return true;
  }
};
