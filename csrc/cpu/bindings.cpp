#include "cpu/bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"

// Tensors arrive as addresses (0 for None), matrices as (address, row stride).
// kernels/cpp/*.py has checked them.

namespace phi_fast::cpu {
namespace {

namespace py = pybind11;
using Address = uintptr_t;
using Matrix = std::pair<Address, int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_of(const Matrix& matrix) { return {pointer<void>(matrix.first), matrix.second}; }

void bind_layer_norm(py::module_& module) {
  module.def(
      "layer_norm_forward",
      [](int dtype, int64_t rows, int64_t columns, Matrix x, Matrix residual, Matrix summed, Matrix out, Matrix shifted,
         Address weight, Address bias, Address shift, float eps, Address mean, Address rstd, int threads) {
        kernels().layer_norm_forward({DType(dtype), rows, columns, rows_of(x), rows_of(residual), rows_of(summed),
                                      rows_of(out), rows_of(shifted), pointer<float>(weight), pointer<float>(bias),
                                      pointer<float>(shift), eps, pointer<float>(mean), pointer<float>(rstd), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "layer_norm_backward",
      [](int dtype, int64_t rows, int64_t columns, Matrix dy, Matrix x, Matrix residual_grad, Matrix dx, Address weight,
         Address mean, Address rstd, Address dweight, Address dbias, int threads) {
        kernels().layer_norm_backward({DType(dtype), rows, columns, rows_of(dy), rows_of(x), rows_of(residual_grad),
                                       rows_of(dx), pointer<float>(weight), pointer<float>(mean), pointer<float>(rstd),
                                       pointer<float>(dweight), pointer<float>(dbias), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_bias_gelu(py::module_& module) {
  module.def(
      "bias_gelu_forward",
      [](int dtype, bool tanh, int64_t rows, int64_t columns, Matrix x, Matrix out, Address bias, int threads) {
        kernels().bias_gelu_forward({DType(dtype), tanh ? Gelu::kTanh : Gelu::kErf, rows, columns, rows_of(x),
                                     rows_of(out), pointer<float>(bias), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "bias_gelu_backward",
      [](int dtype, bool tanh, int64_t rows, int64_t columns, Matrix dout, Matrix x, Matrix dx, Matrix activation,
         Address bias, Address dbias, int threads) {
        kernels().bias_gelu_backward({DType(dtype), tanh ? Gelu::kTanh : Gelu::kErf, rows, columns, rows_of(dout),
                                      rows_of(x), rows_of(dx), rows_of(activation), pointer<float>(bias),
                                      pointer<float>(dbias), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_rotary(py::module_& module) {
  module.def(
      "rotary",
      [](int dtype, std::tuple<int64_t, int64_t, int64_t> sizes, Address x,
         std::tuple<int64_t, int64_t, int64_t> strides, Address cos, Address sin, int64_t max_positions, int64_t half,
         Address positions, int64_t offset, bool interleaved, bool inverse, int threads) {
        const auto [batch, sequence, heads] = sizes;
        const auto [batch_stride, sequence_stride, head_stride] = strides;
        const int64_t* given = pointer<int64_t>(positions);
        for (int64_t i = 0; given != nullptr && i < batch * sequence; ++i) {
          if (given[i] < 0 || given[i] >= max_positions) {
            throw std::out_of_range("rotary: position " + std::to_string(given[i]) + " is not in the table of " +
                                    std::to_string(max_positions) + " positions; make it longer");
          }
        }
        kernels().rotary({DType(dtype), batch, sequence, heads, pointer<void>(x), batch_stride, sequence_stride,
                          head_stride, pointer<float>(cos), pointer<float>(sin), half, given, offset, interleaved,
                          inverse, threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

using Strided = std::tuple<Address, int64_t, int64_t, int64_t>;

Heads heads_of(const Strided& tensor) {
  const auto [address, batch_stride, sequence_stride, head_stride] = tensor;
  return {pointer<void>(address), batch_stride, sequence_stride, head_stride};
}

void check_documents(const int32_t* ends, int64_t count, int64_t sequence) {
  for (int64_t i = 0; i <= count; ++i) {
    const int64_t least = i == 0 ? 0 : ends[i - 1], most = i == 0 ? 0 : sequence;
    if (ends[i] < least || ends[i] > most || (i == count && ends[i] != sequence)) {
      throw std::invalid_argument("attention: cu_seqlens[" + std::to_string(i) + "] is " + std::to_string(ends[i]) +
                                  "; expected numbers that do not fall, from 0 to the sequence's " +
                                  std::to_string(sequence));
    }
  }
}

void bind_attention(py::module_& module) {
  module.def(
      "attention",
      [](int dtype, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> sizes,
         const std::vector<Strided>& tensors, Address lse, Address documents, int64_t document_count, Address cos,
         Address sin, int64_t half, float scale, int64_t least, int64_t most, int threads) {
        const auto [batch, sequence, keys, heads, key_heads, head_dim] = sizes;
        Attention a{};
        a.dtype = DType(dtype);
        a.batch = batch, a.sequence = sequence, a.keys = keys, a.heads = heads, a.key_heads = key_heads,
        a.head_dim = head_dim;
        a.lse = pointer<float>(lse);
        a.documents = pointer<int32_t>(documents), a.document_count = document_count;
        a.cos = pointer<float>(cos), a.sin = pointer<float>(sin), a.half = half;
        a.scale = scale, a.least = least, a.most = most, a.threads = threads;
        if (a.documents) check_documents(a.documents, document_count, sequence);
        Heads* const places[] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
        for (size_t i = 0; i < tensors.size(); ++i) *places[i] = heads_of(tensors[i]);
        (tensors.size() == 4 ? kernels().attention_forward : kernels().attention_backward)(a);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_cross_entropy(py::module_& module) {
  module.def(
      "cross_entropy",
      [](int dtype, int64_t rows, int64_t columns, Matrix logits, Address labels, Address bias, Address weight,
         float mean_weight, int64_t ignore_index, float label_smoothing, float z_loss, float softcap, Address scale,
         bool scale_by_row, bool need_grad, Address dbias, Address losses, int threads) {
        kernels().cross_entropy({DType(dtype), rows, columns, rows_of(logits), pointer<int64_t>(labels),
                                 pointer<float>(bias), pointer<float>(weight), mean_weight, ignore_index,
                                 label_smoothing, z_loss, softcap, pointer<float>(scale), scale_by_row, need_grad,
                                 pointer<float>(dbias), pointer<float>(losses), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_scaled(py::module_& module) {
  module.def(
      "scaled",
      [](int from, int to, int64_t size, Address x, Address out, float factor, bool add, int threads) {
        kernels().scaled({DType(from), DType(to), size, pointer<void>(x), pointer<void>(out), factor, add, threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_weight_gradient(py::module_& module) {
  module.def(
      "has_weight_gradient", [] { return kernels().weight_gradient != nullptr; },
      "Whether the instruction set in use has weight_gradient");
  module.def(
      "weight_gradient",
      [](int64_t rows, int64_t a_columns, int64_t b_columns, Matrix a, Matrix b, int out_dtype, Matrix out, bool add,
         int threads) {
        if (kernels().weight_gradient == nullptr) {
          throw std::runtime_error(std::string("weight_gradient: not with the instruction set ") + kernels().name);
        }
        kernels().weight_gradient(
            {rows, a_columns, b_columns, rows_of(a), rows_of(b), DType(out_dtype), rows_of(out), add, threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

using AdamAddresses = std::tuple<int64_t, Address, Address, Address, Address, Address>;

void bind_adam(py::module_& module) {
  module.def(
      "adam",
      [](int param_dtype, int grad_dtype, const std::vector<AdamAddresses>& addresses, float grad_scale, double beta1,
         double beta2, double step_size, double inverse_root2, double eps, double l2, double keep, int threads) {
        std::vector<AdamTensor> tensors;
        tensors.reserve(addresses.size());
        for (const auto& [size, param, grad, exp_avg, exp_avg_sq, master] : addresses) {
          tensors.push_back({size, pointer<void>(param), pointer<void>(grad), pointer<float>(exp_avg),
                             pointer<float>(exp_avg_sq), pointer<float>(master)});
        }
        return kernels().adam({DType(param_dtype), DType(grad_dtype), tensors.data(), int64_t(tensors.size()),
                               grad_scale, float(1 - beta1), float(beta2), float(1 - beta2), float(step_size),
                               float(inverse_root2), float(eps), float(l2), float(keep), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "grad_norm_squared",
      [](int dtype, const std::vector<std::pair<Address, int64_t>>& grads, int threads) {
        std::vector<const void*> data;
        std::vector<int64_t> sizes;
        for (const auto& [address, size] : grads) {
          data.push_back(pointer<void>(address));
          sizes.push_back(size);
        }
        return kernels().grad_norm_squared({DType(dtype), data.data(), sizes.data(), int64_t(data.size()), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind(py::module_& module) {
  module.def(
      "isa", [] { return kernels().name; }, "The instruction set in use: PHI_FAST_ISA, or the best this machine has");
  module.def("supported_isas", &supported_isas, "Instruction sets this machine can run, the best first");
  module.def("force_isa", &force_isa, py::arg("name"),
             "Use the named instruction set; \"\" for the default. For tests");
  module.def("keep_freed_memory", &keep_freed_memory, "Make malloc keep what is freed; whether it can");
  module.def("parallel_backend", &parallel_backend, "\"openmp\" (torch's own threads) or \"std::thread\"");
  bind_layer_norm(module);
  bind_bias_gelu(module);
  bind_rotary(module);
  bind_attention(module);
  bind_cross_entropy(module);
  bind_scaled(module);
  bind_weight_gradient(module);
  bind_adam(module);
}

}  // namespace phi_fast::cpu
