#include "tokens/bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

#include "gil.h"
#include "tokens/file.h"
#include "tokens/formats.h"
#include "tokens/guarded_copy.h"
#include "tokens/order.h"
#include "tokens/permutation.h"
#include "tokens/prefetcher.h"
#include "tokens/reader.h"

namespace py = pybind11;

namespace phi_fast::tokens {
namespace {

// A buffer to write to. Its length, item size and strides are checked before its address is used.
struct Memory {
  void* address;
  uint64_t size;  // items
};

Memory memory_of(const char* name, const py::buffer& buffer, py::ssize_t itemsize) {
  const py::buffer_info info = buffer.request(true);  // BufferError if it is read-only
  py::ssize_t expected = info.itemsize;
  bool contiguous = true;
  for (py::ssize_t dim = info.ndim; dim-- > 0; expected *= info.shape[dim]) {
    contiguous = contiguous && (info.shape[dim] <= 1 || info.strides[dim] == expected);
  }
  if (info.itemsize != itemsize || !contiguous) {
    throw py::value_error(std::string(name) + " has items of " + std::to_string(info.itemsize) + " bytes" +
                          (contiguous ? "" : " that do not lie side by side") + "; expected " +
                          std::to_string(itemsize) + " bytes, side by side");
  }
  return {info.ptr, static_cast<uint64_t>(info.size)};
}

template <typename Item>
Item* items_of(const char* name, const py::buffer& buffer, uint64_t least) {
  const Memory memory = memory_of(name, buffer, sizeof(Item));
  if (memory.size < least) {
    throw py::value_error(std::string(name) + " has room for " + std::to_string(memory.size) + " items; expected " +
                          std::to_string(least));
  }
  return static_cast<Item*>(memory.address);
}

constexpr uint64_t kLargestBatch = uint64_t{1} << 31;  // tokens: cu_seqlens counts them in 32 bits

Batch batch_of(uint64_t first_row, uint64_t rows, uint64_t length, const py::buffer& input_ids,
               const py::buffer& labels, const py::buffer& corpora, const std::optional<py::buffer>& positions,
               const std::optional<py::buffer>& cu_seqlens) {
  if (positions.has_value() != cu_seqlens.has_value()) {
    throw py::value_error("one of positions and cu_seqlens; expected both or neither");
  }
  if (rows > kLargestBatch / length) throw py::value_error(std::to_string(rows) + " rows: expected fewer");
  const uint64_t tokens = rows * length;
  return {first_row,
          rows,
          items_of<int64_t>("input_ids", input_ids, tokens),
          items_of<int64_t>("labels", labels, tokens),
          items_of<int32_t>("corpora", corpora, rows),
          positions ? items_of<int64_t>("positions", *positions, tokens) : nullptr,
          cu_seqlens ? items_of<int32_t>("cu_seqlens", *cu_seqlens, tokens + 1) : nullptr};
}

py::tuple take(Prefetcher& prefetcher) {
  for (;;) {
    std::optional<Batch> batch;
    {
      const GilReleased released;
      batch = prefetcher.take(std::chrono::milliseconds(200));
    }
    if (batch) return py::make_tuple(batch->segments, batch->trained);
    if (PyErr_CheckSignals()) throw py::error_already_set();  // Ctrl-C, even while a disk hangs
  }
}

py::object message_of(const std::exception& error) {
  return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
}

void bind_parser(py::module_& module, const char* name, Layout (*parse)(Bytes, uint64_t)) {
  module.def(
      name,
      [parse](const py::buffer& buffer, uint64_t file_size) {
        const py::buffer_info info = buffer.request();
        install_guard();
        if (info.itemsize != 1 || info.ndim != 1 || (info.size > 1 && info.strides[0] != 1)) {
          throw py::value_error("a header is a buffer of bytes, side by side");
        }
        const Layout layout =
            parse({static_cast<const unsigned char*>(info.ptr), static_cast<uint64_t>(info.size)}, file_size);
        return py::make_tuple(layout.width, layout.offset, layout.tokens, layout.documents);
      },
      py::arg("header"), py::arg("file_size"), "(bytes per token, offset, tokens, documents or 0)");
}

}  // namespace

void bind(py::module_& module) {
  module.def(
      "permutation",
      [](uint64_t n, uint64_t key, const py::buffer& out) {
        uint64_t* images = items_of<uint64_t>("out", out, n);
        const Permutation permutation(n, key);
        for (uint64_t i = 0; i < n; ++i) images[i] = permutation(i);
      },
      py::arg("n"), py::arg("key"), py::arg("out"), "Writes the images of 0 ... n - 1 to the u64 buffer `out`");
  module.def("chairman", &chairman, py::arg("weights"), "Corpus of each slot of one period");

  py::class_<TokenFile, std::shared_ptr<TokenFile>>(module, "TokenFile")
      .def(py::init([](std::string path, int width, uint64_t offset, uint64_t tokens, bool mapped, bool cache) {
             return std::make_shared<TokenFile>(std::move(path), width, offset, tokens,
                                                mapped ? Mode::kMmap : Mode::kPread,
                                                cache ? Content::kCache : Content::kFixed);
           }),
           py::arg("path"), py::arg("width"), py::arg("offset"), py::arg("tokens"), py::arg("mapped"),
           py::arg("cache") = false)
      .def("check_unchanged", &TokenFile::check_unchanged)
      .def("change_stamp", &TokenFile::change_stamp)
      .def("accept", &TokenFile::accept, py::arg("stamp"))
      .def(
          "read",
          [](const TokenFile& file, uint64_t first, uint64_t count, const py::buffer& out) {
            file.check_bounds(first, count);
            const Memory memory = memory_of("out", out, file.width());
            if (count > memory.size) {
              throw py::value_error("out has room for " + std::to_string(memory.size) + " tokens; asked for " +
                                    std::to_string(count));
            }
            const GilReleased released;
            file.read(first, count, memory.address);
          },
          py::arg("first"), py::arg("count"), py::arg("out"), "Copies tokens to `out`, a buffer of the file's width");

  py::class_<Order, std::shared_ptr<Order>>(module, "Order")
      .def(py::init([](const std::vector<std::pair<uint64_t, uint64_t>>& corpora,
                       const std::vector<std::pair<uint64_t, std::vector<uint64_t>>>& stages, uint64_t sequence_length,
                       uint64_t seed, const std::vector<bool>& packed) {
             if (!packed.empty() && packed.size() != corpora.size()) {
               throw std::invalid_argument("packed is needed for each corpus, or for none");
             }
             std::vector<Corpus> corpora_;
             std::vector<Stage> stages_;
             for (const auto& [key, tokens] : corpora) {
               corpora_.push_back({key, tokens, !packed.empty() && packed[corpora_.size()]});
             }
             for (const auto& [start_row, weights] : stages) stages_.push_back({start_row, weights});
             return std::make_shared<Order>(std::move(corpora_), std::move(stages_), sequence_length, seed);
           }),
           py::arg("corpora"), py::arg("stages"), py::arg("sequence_length"), py::arg("seed"),
           py::arg("packed") = std::vector<bool>())
      .def("rows", &Order::rows)
      .def("at", [](const Order& order, uint64_t row) {
        const Place place = order.at(row);
        return py::make_tuple(place.corpus, place.rank, place.epoch, place.row, place.token);
      });

  py::class_<Reader, std::shared_ptr<Reader>>(module, "Reader")
      .def(py::init<std::vector<std::shared_ptr<TokenFile>>, std::shared_ptr<Order>, uint64_t, std::vector<int64_t>,
                    std::vector<std::shared_ptr<TokenFile>>>(),
           py::arg("files"), py::arg("order").none(false), py::arg("id_limit"), py::arg("delimiters"),
           py::arg("marks") = std::vector<std::shared_ptr<TokenFile>>());

  py::class_<Prefetcher>(module, "Prefetcher")
      .def(py::init<std::shared_ptr<Reader>, int, uint64_t, uint64_t>(), py::arg("reader").none(false),
           py::arg("threads"), py::arg("stride"), py::arg("lookahead"))
      .def(
          "submit",
          [](Prefetcher& prefetcher, uint64_t first_row, uint64_t rows, const py::buffer& input_ids,
             const py::buffer& labels, const py::buffer& corpora, const std::optional<py::buffer>& positions,
             const std::optional<py::buffer>& cu_seqlens) {
            const Batch batch = batch_of(first_row, rows, prefetcher.sequence_length(), input_ids, labels, corpora,
                                         positions, cu_seqlens);
            const GilReleased released;
            prefetcher.submit(batch);
          },
          py::arg("first_row"), py::arg("rows"), py::arg("input_ids"), py::arg("labels"), py::arg("corpora"),
          py::arg("positions") = py::none(), py::arg("cu_seqlens") = py::none(),
          "Queues a batch; the buffers must live until it was taken or close() has returned")
      .def("take", &take, "Waits for the oldest batch; returns its number of segments, and of labels that train")
      .def("close", &Prefetcher::close, py::call_guard<GilReleased>());

  bind_parser(module, "parse_llmc", &parse_llmc);
  bind_parser(module, "parse_npy", &parse_npy);
  bind_parser(module, "parse_megatron", &parse_megatron);
  bind_parser(module, "parse_datatrove", &parse_datatrove);

  // OSError's own subclasses: FileNotFoundError, PermissionError, ... Messages name paths, which need not be UTF-8.
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      const auto arguments = py::make_tuple(error.code().value(), message_of(error));
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const py::builtin_exception&) {
      throw;
    } catch (const std::runtime_error& error) {
      PyErr_SetObject(PyExc_RuntimeError, message_of(error).ptr());
    } catch (const std::out_of_range& error) {
      PyErr_SetObject(PyExc_IndexError, message_of(error).ptr());
    } catch (const std::invalid_argument& error) {
      PyErr_SetObject(PyExc_ValueError, message_of(error).ptr());
    }
  });
}

}  // namespace phi_fast::tokens
