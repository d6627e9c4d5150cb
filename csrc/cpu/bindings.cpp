#include "cpu/bindings.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/tensors.h"
#include "gil.h"

namespace phi_fast::cpu {
namespace {

namespace py = pybind11;

void bind_layer_norm(py::module_& module) {
  module.def(
      "layer_norm_forward",
      [](const Tensor& x, const MaybeTensor& residual, const MaybeTensor& summed, const Tensor& out,
         const MaybeTensor& shifted, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& shift, float eps,
         const MaybeTensor& mean, const Tensor& rstd, int threads) {
        const Call call("layer_norm");
        const DType dtype = call.dtype("x", x, 2);
        const int64_t rows = x.sizes[0], columns = x.sizes[1];
        call.expect(!residual || summed, "a residual, and nothing that the sum goes to");
        call.expect(!shift || shifted, "a shift, and nothing that the shifted rows go to");
        call.expect(!bias == !mean, "one of bias and mean; LayerNorm has both and RMSNorm neither");
        const auto matrix = [&](const char* name, const auto& given) {
          return call.rows(name, given, dtype, rows, columns);
        };
        kernels().layer_norm_forward(
            {dtype, rows, columns, matrix("x", x), matrix("residual", residual), matrix("summed", summed),
             matrix("out", out), matrix("shifted", shifted), call.whole<float>("weight", weight, {columns}),
             call.whole<float>("bias", bias, {columns}), call.whole<float>("shift", shift, {columns}), eps,
             call.whole<float>("mean", mean, {rows}), call.whole<float>("rstd", rstd, {rows}), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
  module.def(
      "layer_norm_backward",
      [](const Tensor& dy, const Tensor& x, const MaybeTensor& residual_grad, const Tensor& dx, const Tensor& weight,
         const MaybeTensor& mean, const Tensor& rstd, const Tensor& dweight, const MaybeTensor& dbias, int threads) {
        const Call call("layer_norm");
        const DType dtype = call.dtype("x", x, 2);
        const int64_t rows = x.sizes[0], columns = x.sizes[1];
        call.expect(!mean == !dbias, "one of mean and dbias; LayerNorm has both and RMSNorm neither");
        const auto matrix = [&](const char* name, const auto& given) {
          return call.rows(name, given, dtype, rows, columns);
        };
        kernels().layer_norm_backward(
            {dtype, rows, columns, matrix("dy", dy), matrix("x", x), matrix("residual_grad", residual_grad),
             matrix("dx", dx), call.whole<float>("weight", weight, {columns}), call.whole<float>("mean", mean, {rows}),
             call.whole<float>("rstd", rstd, {rows}), call.whole<float>("dweight", dweight, {columns}),
             call.whole<float>("dbias", dbias, {columns}), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

void bind_bias_gelu(py::module_& module) {
  module.def(
      "bias_gelu_forward",
      [](bool tanh, const Tensor& x, const Tensor& out, const MaybeTensor& bias, int threads) {
        const Call call("bias_gelu");
        const DType dtype = call.dtype("x", x, 2);
        const int64_t rows = x.sizes[0], columns = x.sizes[1];
        kernels().bias_gelu_forward({dtype, tanh ? Gelu::kTanh : Gelu::kErf, rows, columns,
                                     call.rows("x", x, dtype, rows, columns),
                                     call.rows("out", out, dtype, rows, columns),
                                     call.whole<float>("bias", bias, {columns}), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
  module.def(
      "bias_gelu_backward",
      [](bool tanh, const Tensor& dout, const Tensor& x, const Tensor& dx, const MaybeTensor& activation,
         const MaybeTensor& bias, const Tensor& dbias, int threads) {
        const Call call("bias_gelu");
        const DType dtype = call.dtype("x", x, 2);
        const int64_t rows = x.sizes[0], columns = x.sizes[1];
        const auto matrix = [&](const char* name, const auto& given) {
          return call.rows(name, given, dtype, rows, columns);
        };
        kernels().bias_gelu_backward({dtype, tanh ? Gelu::kTanh : Gelu::kErf, rows, columns, matrix("dout", dout),
                                      matrix("x", x), matrix("dx", dx), matrix("activation", activation),
                                      call.whole<float>("bias", bias, {columns}),
                                      call.whole<float>("dbias", dbias, {columns}), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

void bind_gated_activation(py::module_& module) {
  module.def(
      "gated_activation_forward",
      [](bool silu, const Tensor& gate, const Tensor& up, const Tensor& out, int threads) {
        const Call call("gated_activation");
        const DType dtype = call.dtype("gate", gate, 2);
        const int64_t rows = gate.sizes[0], columns = gate.sizes[1];
        const auto matrix = [&](const char* name, const Tensor& given) {
          return call.rows(name, given, dtype, rows, columns);
        };
        kernels().gated_activation_forward({dtype, silu ? Gate::kSilu : Gate::kGeluTanh, rows, columns,
                                            matrix("gate", gate), matrix("up", up), matrix("out", out),
                                            call.threads(threads)});
      },
      py::call_guard<GilReleased>());
  module.def(
      "gated_activation_backward",
      [](bool silu, const Tensor& dout, const Tensor& gate, const Tensor& up, const Tensor& dgate, const Tensor& dup,
         int threads) {
        const Call call("gated_activation");
        const DType dtype = call.dtype("gate", gate, 2);
        const int64_t rows = gate.sizes[0], columns = gate.sizes[1];
        const auto matrix = [&](const char* name, const Tensor& given) {
          return call.rows(name, given, dtype, rows, columns);
        };
        kernels().gated_activation_backward({dtype, silu ? Gate::kSilu : Gate::kGeluTanh, rows, columns,
                                             matrix("dout", dout), matrix("gate", gate), matrix("up", up),
                                             matrix("dgate", dgate), matrix("dup", dup), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

/// The sizes (positions, half) of both tables, with half <= head_dim / 2.
Sizes table_sizes(const Call& call, const Tensor& cos, int64_t head_dim) {
  call.expect(cos.sizes.size() == 2 && cos.sizes[1] <= head_dim / 2,
              "cos is " + shown(cos.sizes) + "; expected two tables (positions, rotary_dim / 2) with rotary_dim <= " +
                  std::to_string(head_dim) + ", the head_dim");
  return cos.sizes;
}

void bind_rotary(py::module_& module) {
  module.def(
      "rotary",
      [](const Tensor& x, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions, int64_t offset,
         bool interleaved, bool inverse, int threads) {
        const Call call("rotary");
        const DType dtype = call.dtype("x", x, 4);
        const int64_t batch = x.sizes[0], sequence = x.sizes[1], heads = x.sizes[2];
        const Sizes table = table_sizes(call, cos, x.sizes[3]);
        const Heads rows = call.heads("x", x, dtype, x.sizes);
        const float* cosines = call.whole<float>("cos", cos, table);
        const float* sines = call.whole<float>("sin", sin, table);
        const int64_t* given = call.whole<int64_t>("positions", positions, {batch, sequence});
        for (int64_t i = 0; given != nullptr && i < batch * sequence; ++i) {
          if (given[i] < 0 || given[i] >= table[0]) {
            throw std::out_of_range("rotary: position " + std::to_string(given[i]) + " is not in the table of " +
                                    std::to_string(table[0]) + " positions; make it longer");
          }
        }
        if (!positions && (offset < 0 || offset > table[0] - sequence)) {
          throw std::out_of_range("rotary: " + std::to_string(sequence) + " rows from position " +
                                  std::to_string(offset) + " on reach past the table's " + std::to_string(table[0]) +
                                  " positions");
        }
        kernels().rotary({dtype, batch, sequence, heads, rows.data, rows.batch_stride, rows.sequence_stride,
                          rows.head_stride, cosines, sines, table[1], given, offset, interleaved, inverse,
                          call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

/// The length of the longest document, after checking the ends.
int64_t check_documents(const Call& call, const int32_t* ends, int64_t count, int64_t sequence) {
  int64_t longest = 0;
  for (int64_t i = 0; i <= count; ++i) {
    const int64_t least = i == 0 ? 0 : ends[i - 1], most = i == 0 ? 0 : sequence;
    call.expect(ends[i] >= least && ends[i] <= most && (i < count || ends[i] == sequence),
                "cu_seqlens[" + std::to_string(i) + "] is " + std::to_string(ends[i]) +
                    "; expected numbers that do not fall, from 0 to the sequence's " + std::to_string(sequence));
    longest = std::max(longest, ends[i] - least);
  }
  return longest;
}

/// Sets the documents and tables of a call whose sizes are set.
void set_positions(const Call& call, Attention& a, const MaybeTensor& documents, const MaybeTensor& cos,
                   const MaybeTensor& sin) {
  int64_t longest = a.keys;
  if (documents) {
    call.expect(a.batch == 1 && a.keys == a.sequence && documents->sizes.size() == 1 && documents->sizes[0] > 0,
                "cu_seqlens is " + shown(documents->sizes) + " with batch " + std::to_string(a.batch) + ", sequence " +
                    std::to_string(a.sequence) + " and " + std::to_string(a.keys) +
                    " keys; expected (documents + 1,), batch 1 and as many keys");
    a.documents = call.whole<int32_t>("cu_seqlens", *documents, documents->sizes);
    a.document_count = documents->sizes[0] - 1;
    longest = check_documents(call, a.documents, a.document_count, a.sequence);
  }
  call.expect(cos.has_value() == sin.has_value(), "one of cos and sin; expected both or neither");
  if (!cos) return;
  const Sizes table = table_sizes(call, *cos, a.head_dim);
  a.cos = call.whole<float>("cos", *cos, table), a.sin = call.whole<float>("sin", *sin, table), a.half = table[1];
  call.expect(a.sequence <= a.keys && table[0] >= longest,
              "cos and sin have " + std::to_string(table[0]) + " positions for " + std::to_string(a.sequence) +
                  " rows and " + std::to_string(longest) +
                  " keys; expected no more rows than keys, and a longer table");
}

void bind_attention(py::module_& module) {
  module.def(
      "attention",
      [](const std::vector<Tensor>& tensors, const Tensor& lse, const MaybeTensor& documents, const MaybeTensor& cos,
         const MaybeTensor& sin, float scale, int64_t least, int64_t most, int threads) {
        const Call call("attention");
        call.expect(tensors.size() == 4 || tensors.size() == 8,
                    std::to_string(tensors.size()) + " tensors; expected q, k, v, out, or with dout, dq, dk, dv");
        Attention a{};
        a.dtype = call.dtype("q", tensors[0], 4);
        call.dtype("k", tensors[1], 4);
        const Sizes &q = tensors[0].sizes, &k = tensors[1].sizes;
        a.batch = q[0], a.sequence = q[1], a.heads = q[2], a.head_dim = q[3], a.keys = k[1], a.key_heads = k[2];
        call.expect(
            a.heads == 0 || (a.key_heads > 0 && a.heads % a.key_heads == 0),
            std::to_string(a.heads) + " heads and " + std::to_string(a.key_heads) + " key heads; expected a multiple");
        const char* const names[] = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"};
        Heads* const places[] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
        for (size_t i = 0; i < tensors.size(); ++i) {
          const bool of_keys = i % 4 == 2 || i == 1 || i == 7;
          *places[i] =
              call.heads(names[i], tensors[i], a.dtype,
                         {a.batch, of_keys ? a.keys : a.sequence, of_keys ? a.key_heads : a.heads, a.head_dim});
        }
        a.lse = call.whole<float>("lse", lse, {a.batch, a.heads, a.sequence});
        set_positions(call, a, documents, cos, sin);
        call.expect(
            -a.sequence <= least && least <= a.keys - a.sequence && a.keys - a.sequence <= most && most <= a.keys,
            "rows see keys " + std::to_string(least) + " to " + std::to_string(most) +
                " from their own number on; expected a band around the key that each stands at");
        a.scale = scale, a.least = least, a.most = most, a.threads = call.threads(threads);
        (tensors.size() == 4 ? kernels().attention_forward : kernels().attention_backward)(a);
      },
      py::call_guard<GilReleased>());
}

void bind_cross_entropy(py::module_& module) {
  module.def(
      "cross_entropy",
      [](const Tensor& logits, const Tensor& labels, const MaybeTensor& bias, const MaybeTensor& weight,
         float mean_weight, int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
         const Tensor& scale, bool need_grad, const MaybeTensor& dbias, const Tensor& losses, int threads) {
        const Call call("linear_cross_entropy");
        const DType dtype = call.dtype("logits", logits, 2);
        const int64_t rows = logits.sizes[0], columns = logits.sizes[1];
        const bool by_row = !scale.sizes.empty();
        // The kernel itself checks each label before it indexes with it, and gives NaN for a label out of range.
        kernels().cross_entropy(
            {dtype, rows, columns, call.rows("logits", logits, dtype, rows, columns),
             call.whole<int64_t>("labels", labels, {rows}), call.whole<float>("bias", bias, {columns}),
             call.whole<float>("class_weight", weight, {columns}), mean_weight, ignore_index, label_smoothing, z_loss,
             softcap, call.whole<float>("scale", scale, by_row ? Sizes{rows} : Sizes{}), by_row, need_grad,
             need_grad ? call.whole<float>("dbias", dbias, {columns}) : nullptr,
             call.whole<float>("losses", losses, {rows}), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

void bind_linear_cross_entropy(py::module_& module) {
  module.def(
      "has_linear_cross_entropy", [] { return kernels().linear_cross_entropy != nullptr; },
      "Whether the instruction set in use has linear_cross_entropy");
  module.def(
      "linear_cross_entropy",
      [](const Tensor& hidden, const Tensor& head, const Tensor& labels, const MaybeTensor& bias,
         const MaybeTensor& weight, float mean_weight, int64_t ignore_index, float label_smoothing, float z_loss,
         float softcap, const Tensor& scale, const MaybeTensor& dhidden, const MaybeTensor& dhead, bool add,
         const MaybeTensor& dbias, const Tensor& losses, int threads) {
        const Call call("linear_cross_entropy");
        call.dtype("hidden", hidden, 2), call.dtype("weight", head, 2);
        const int64_t rows = hidden.sizes[0], width = hidden.sizes[1], columns = head.sizes[0];
        const bool by_row = !scale.sizes.empty();
        const LinearCrossEntropy given{
            {DType::kBFloat16, rows, columns, Rows{}, call.whole<int64_t>("labels", labels, {rows}),
             call.whole<float>("bias", bias, {columns}), call.whole<float>("class_weight", weight, {columns}),
             mean_weight, ignore_index, label_smoothing, z_loss, softcap,
             call.whole<float>("scale", scale, by_row ? Sizes{rows} : Sizes{}), by_row, dhidden || dhead || dbias,
             call.whole<float>("dbias", dbias, {columns}), call.whole<float>("losses", losses, {rows}),
             call.threads(threads)},
            width,
            call.rows("hidden", hidden, DType::kBFloat16, rows, width),
            call.rows("weight", head, DType::kBFloat16, columns, width),
            call.whole<float>("dhidden", dhidden, {rows, width}),
            call.whole<float>("dweight", dhead, {columns, width}),
            add};
        if (kernels().linear_cross_entropy == nullptr) {
          throw std::runtime_error(std::string("linear_cross_entropy: not with the instruction set ") + kernels().name);
        }
        kernels().linear_cross_entropy(given);
      },
      py::call_guard<GilReleased>());
}

void bind_scaled(py::module_& module) {
  module.def(
      "scaled",
      [](const Tensor& x, const Tensor& out, float factor, bool add, int threads) {
        const Call call("linear_cross_entropy");
        const DType from = call.dtype("x", x, x.sizes.size()), to = call.dtype("out", out, x.sizes.size());
        call.expect(x.sizes == out.sizes,
                    shown(x.sizes) + " and " + shown(out.sizes) + "; expected contiguous tensors of one shape");
        kernels().scaled({from, to, x.numel(), call.flat("x", x, x.dtype, x.numel()),
                          call.flat("out", out, out.dtype, x.numel()), factor, add, call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

void bind_weight_gradient(py::module_& module) {
  module.def(
      "has_weight_gradient", [] { return kernels().weight_gradient != nullptr; },
      "Whether the instruction set in use has weight_gradient");
  module.def(
      "weight_gradient",
      [](const Tensor& a, const Tensor& b, const Tensor& out, bool add, int threads) {
        const Call call("weight_gradient");
        call.dtype("a", a, 2), call.dtype("b", b, 2);
        const int64_t rows = a.sizes[0], m = a.sizes[1], n = b.sizes[1];
        call.expect(b.sizes[0] == rows && out.sizes == Sizes{m, n}, "a " + shown(a.sizes) + ", b " + shown(b.sizes) +
                                                                        " and " + shown(out.sizes) +
                                                                        "; expected (rows, m), (rows, n) and (m, n)");
        const WeightGradient given{rows,
                                   m,
                                   n,
                                   call.rows("a", a, DType::kBFloat16, rows, m),
                                   call.rows("b", b, DType::kBFloat16, rows, n),
                                   call.dtype("out", out, 2),
                                   call.rows("out", out, DType(out.dtype), m, n),
                                   add,
                                   call.threads(threads)};
        if (kernels().weight_gradient == nullptr) {
          throw std::runtime_error(std::string("weight_gradient: not with the instruction set ") + kernels().name);
        }
        kernels().weight_gradient(given);
      },
      py::call_guard<GilReleased>());
}

/// (param, grad, exp_avg, exp_avg_sq, master).
using AdamGiven = std::tuple<Tensor, Tensor, Tensor, Tensor, MaybeTensor>;

void bind_adam(py::module_& module) {
  module.def(
      "adam",
      [](const std::vector<AdamGiven>& given, float grad_scale, double beta1, double beta2, double step_size,
         double inverse_root2, double eps, double l2, double keep, int threads) {
        const Call call("adam");
        if (given.empty()) return true;
        const int param_dtype = std::get<0>(given[0]).dtype, grad_dtype = std::get<1>(given[0]).dtype;
        std::vector<AdamTensor> tensors;
        tensors.reserve(given.size());
        constexpr int kFloat = int(DType::kFloat32);
        for (const auto& [param, grad, exp_avg, exp_avg_sq, master] : given) {
          call.dtype("param", param, param.sizes.size()), call.dtype("grad", grad, grad.sizes.size());
          const int64_t size = param.numel();
          const auto moment = [&](const char* name, const Tensor& x) {
            return static_cast<float*>(call.flat(name, x, kFloat, size));
          };
          tensors.push_back({size, call.flat("param", param, param_dtype, size),
                             call.flat("grad", grad, grad_dtype, size), moment("exp_avg", exp_avg),
                             moment("exp_avg_sq", exp_avg_sq), master ? moment("master", *master) : nullptr});
        }
        return kernels().adam({DType(param_dtype), DType(grad_dtype), tensors.data(), int64_t(tensors.size()),
                               grad_scale, float(1 - beta1), float(beta2), float(1 - beta2), float(step_size),
                               float(inverse_root2), float(eps), float(l2), float(keep), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
  module.def(
      "grad_norm_squared",
      [](const std::vector<Tensor>& grads, int threads) {
        const Call call("adam");
        if (grads.empty()) return 0.0;
        std::vector<const void*> data;
        std::vector<int64_t> sizes;
        for (const Tensor& grad : grads) {
          call.dtype("grads", grad, grad.sizes.size());
          sizes.push_back(grad.numel());
          data.push_back(call.flat("grads", grad, grads[0].dtype, sizes.back()));
        }
        return kernels().grad_norm_squared(
            {DType(grads[0].dtype), data.data(), sizes.data(), int64_t(data.size()), call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

void bind_muon(py::module_& module) {
  constexpr int kFloat = int(DType::kFloat32);
  module.def(
      "muon_momentum",
      [](const Tensor& grad, const Tensor& momentum, const Tensor& direction, float grad_scale, double beta,
         bool nesterov, int threads) {
        const Call call("muon");
        const int64_t size = momentum.numel();
        const DType from = call.dtype("grad", grad, grad.sizes.size());
        const DType to = call.dtype("direction", direction, direction.sizes.size());
        kernels().muon_momentum({size, from, to, call.flat("grad", grad, grad.dtype, size),
                                 static_cast<float*>(call.flat("momentum", momentum, kFloat, size)),
                                 call.flat("direction", direction, direction.dtype, size), grad_scale, float(1 - beta),
                                 nesterov, call.threads(threads)});
      },
      py::call_guard<GilReleased>());
  module.def(
      "muon_update",
      [](const Tensor& param, const Tensor& update, const Tensor& momentum, const MaybeTensor& master, float rate,
         float keep, int threads) {
        const Call call("muon");
        const int64_t size = param.numel();
        const DType to = call.dtype("param", param, param.sizes.size());
        const DType from = call.dtype("update", update, update.sizes.size());
        const auto floats = [&](const char* name, const Tensor& x) {
          return static_cast<float*>(call.flat(name, x, kFloat, size));
        };
        return kernels().muon_update({size, to, from, call.flat("param", param, param.dtype, size),
                                      call.flat("update", update, update.dtype, size), floats("momentum", momentum),
                                      master ? floats("master", *master) : nullptr, rate, keep, call.threads(threads)});
      },
      py::call_guard<GilReleased>());
}

}  // namespace

void bind(py::module_& module) {
  module.def(
      "isa", [] { return kernels().name; }, "The instruction set in use: PHI_FAST_ISA, or the best this machine has");
  module.def("supported_isas", &supported_isas, "Instruction sets this machine can run, the best first");
  module.def("omitted_isas", &omitted_isas, "Instruction sets that the compiler of this build did not know");
  module.def("force_isa", &force_isa, py::arg("name"),
             "Use the named instruction set; \"\" for the default. For tests");
  module.def("keep_freed_memory", &keep_freed_memory, "Make malloc keep what is freed; whether it can");
  module.def("parallel_backend", &parallel_backend, "\"openmp\" (torch's own threads) or \"std::thread\"");
  bind_layer_norm(module);
  bind_bias_gelu(module);
  bind_gated_activation(module);
  bind_rotary(module);
  bind_attention(module);
  bind_cross_entropy(module);
  bind_linear_cross_entropy(module);
  bind_scaled(module);
  bind_weight_gradient(module);
  bind_adam(module);
  bind_muon(module);
}

}  // namespace phi_fast::cpu
