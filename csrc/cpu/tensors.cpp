#include "cpu/tensors.h"

#include <stdexcept>

namespace phi_fast::cpu {
namespace {

constexpr int kMostThreads = 4096;
constexpr int64_t kFarthest = int64_t{1} << 47;
const char* const kNames[] = {"torch.float32", "torch.bfloat16", "torch.float16", "torch.int64", "torch.int32"};

std::string dtype_name(int code) { return code >= 0 && code < 5 ? kNames[code] : "dtype " + std::to_string(code); }

/// Whether the tensor can come from torch: it has memory if it has elements, a stride for each dim, and no element
/// beyond a process's address space.
bool is_sound(const Tensor& x) {
  if (x.sizes.size() != x.strides.size()) return false;
  int64_t count = 1, last = 0;
  for (size_t i = 0; i < x.sizes.size(); ++i) {
    int64_t reach = 0;
    if (x.sizes[i] < 0 || x.strides[i] < 0 || __builtin_mul_overflow(count, x.sizes[i], &count)) return false;
    if (__builtin_mul_overflow(x.sizes[i] > 0 ? x.sizes[i] - 1 : 0, x.strides[i], &reach)) return false;
    if (__builtin_add_overflow(last, reach, &last)) return false;
  }
  return count == 0 || (x.address != 0 && last < kFarthest);
}

bool is_contiguous(const Tensor& x) {
  if (x.numel() == 0) return true;
  int64_t expected = 1;
  for (size_t i = x.sizes.size(); i-- > 0;) {
    if (x.sizes[i] != 1 && x.strides[i] != expected) return false;
    expected *= x.sizes[i];
  }
  return true;
}

/// Whether elements of a row are adjacent. The last stride does not matter for rows of one element, or without rows.
bool has_whole_rows(const Tensor& x) { return x.strides.back() == 1 || x.sizes.back() <= 1 || x.numel() == 0; }

}  // namespace

std::string shown(const Sizes& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

int64_t Tensor::numel() const {
  uint64_t count = 1;  // may wrap; is_sound refuses sizes that are too large
  for (const int64_t size : sizes) count *= uint64_t(size);
  return int64_t(count);
}

void Call::expect(bool holds, const std::string& message) const {
  if (!holds) throw std::invalid_argument(std::string(op_) + ": " + message);
}

int Call::threads(int count) const {
  expect(count >= 1 && count <= kMostThreads, std::to_string(count) + " threads; expected 1 to 4096");
  return count;
}

DType Call::dtype(const char* name, const Tensor& x, size_t dims) const {
  expect(x.sizes.size() == dims,
         std::string(name) + " is " + shown(x.sizes) + "; expected " + std::to_string(dims) + " dims");
  expect(x.dtype >= 0 && x.dtype <= int(DType::kFloat16),
         std::string(name) + " is " + dtype_name(x.dtype) + "; expected float32, bfloat16 or float16");
  return DType(x.dtype);
}

void Call::check(const char* name, const Tensor& x, int dtype, const Sizes& sizes, bool holds,
                 const char* strides) const {
  if (holds && x.dtype == dtype && x.sizes == sizes) return;
  expect(false, std::string(name) + " is " + dtype_name(x.dtype) + " " + shown(x.sizes) + " with strides " +
                    shown(x.strides) + (x.address ? "" : " at no address") + "; expected " + dtype_name(dtype) + " " +
                    shown(sizes) + " " + strides + " on the CPU");
}

Rows Call::rows(const char* name, const Tensor& x, DType dtype, int64_t rows, int64_t columns) const {
  const bool holds = is_sound(x) && x.sizes.size() == 2 && has_whole_rows(x);
  check(name, x, int(dtype), {rows, columns}, holds, "with last stride 1");
  return {reinterpret_cast<void*>(x.address), x.strides[0]};
}

Heads Call::heads(const char* name, const Tensor& x, DType dtype, const Sizes& sizes) const {
  const bool holds = is_sound(x) && x.sizes.size() == 4 && has_whole_rows(x);
  check(name, x, int(dtype), sizes, holds, "with last stride 1");
  return {reinterpret_cast<void*>(x.address), x.strides[0], x.strides[1], x.strides[2]};
}

void* Call::contiguous(const char* name, const Tensor& x, int dtype, const Sizes& sizes) const {
  check(name, x, dtype, sizes, is_sound(x) && is_contiguous(x), "contiguous");
  return reinterpret_cast<void*>(x.address);
}

void* Call::flat(const char* name, const Tensor& x, int dtype, int64_t count) const {
  expect(is_sound(x) && is_contiguous(x), std::string(name) + " is " + shown(x.sizes) + " with strides " +
                                              shown(x.strides) + "; expected contiguous on the CPU");
  expect(x.numel() == count, std::string(name) + " has " + std::to_string(x.numel()) + " elements and its parameter " +
                                 std::to_string(count));
  expect(x.dtype == dtype, std::string(name) + " is " + dtype_name(x.dtype) + "; expected " + dtype_name(dtype));
  return reinterpret_cast<void*>(x.address);
}

}  // namespace phi_fast::cpu
