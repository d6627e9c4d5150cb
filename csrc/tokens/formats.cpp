#include "tokens/formats.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "tokens/guarded_copy.h"

namespace phi_fast::tokens {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little-endian");

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// An index is a mapped file, which may be truncated while it is read, so every read of it is guarded.
template <typename T>
T load(Bytes bytes, uint64_t at) {
  if (at > bytes.size || bytes.size - at < sizeof(T)) {
    refuse("the header is cut short: it has " + std::to_string(bytes.size) + " bytes. Copy it again");
  }
  T value;
  if (!guarded_copy(&value, bytes.data + at, sizeof(T))) {
    refuse("it was cut short while it was read: byte " + std::to_string(at) + " is gone. Copy it again");
  }
  return value;
}

// The tokens must fill the file to its end. Otherwise the copy was interrupted, or the header belongs to another file.
Layout whole_file(Layout layout, uint64_t file_size) {
  const uint64_t room = file_size < layout.offset ? 0 : (file_size - layout.offset) / layout.width;
  if (layout.tokens > room) {
    refuse("the header says " + std::to_string(layout.tokens) + " tokens of " + std::to_string(layout.width) +
           " bytes, the file has room for " + std::to_string(room) + ": it was cut short. Copy or make it again");
  }
  if (layout.offset + layout.tokens * layout.width != file_size) {
    refuse("the header says " + std::to_string(layout.tokens) + " tokens of " + std::to_string(layout.width) +
           " bytes, the file has " + std::to_string(file_size) + " bytes: it was not closed properly. Make it again");
  }
  if (layout.tokens == 0) refuse("the header says 0 tokens: it is empty");
  return layout;
}

}  // namespace

Layout parse_llmc(Bytes head, uint64_t file_size) {
  const auto magic = load<int32_t>(head, 0), version = load<int32_t>(head, 4), tokens = load<int32_t>(head, 8);
  int width = 0;
  if (magic == 20240520 && version == 1) width = 2;
  if (magic == 20240801 && version == 7) width = 4;
  if (!width) {
    refuse("llm.c magic " + std::to_string(magic) + " with version " + std::to_string(version) +
           ", expected 20240520 with 1 or 20240801 with 7");
  }
  if (tokens < 0) refuse("the header says " + std::to_string(tokens) + " tokens");
  return whole_file({width, 256 * sizeof(int32_t), static_cast<uint64_t>(tokens), 0}, file_size);
}

namespace {

// The text after 'key': in the header's Python dictionary.
std::string_view value_of(std::string_view header, const std::string& key) {
  for (const char quote : {'\'', '"'}) {
    const size_t at = header.find(quote + key + quote);
    if (at == std::string_view::npos) continue;
    const size_t value = header.find_first_not_of(" :", at + key.size() + 2);
    if (value != std::string_view::npos) return header.substr(value);
  }
  refuse("the NPY header has no '" + key + "'");
}

uint64_t one_dimension(std::string_view shape) {
  const size_t close = shape.find(')');
  if (shape.empty() || shape[0] != '(' || close == std::string_view::npos) refuse("the NPY header's shape is no tuple");
  uint64_t length = 0;
  size_t i = 1;
  for (; i < close && shape[i] >= '0' && shape[i] <= '9'; ++i) {
    if (length > UINT64_MAX / 20) refuse("the NPY header's shape is too large");
    length = length * 10 + static_cast<uint64_t>(shape[i] - '0');
  }
  const bool digits = i > 1, comma = i < close && shape[i] == ',';
  if (!digits || !comma || shape.substr(i + 1, close - i - 1).find_first_not_of(' ') != std::string_view::npos) {
    refuse("the NPY array's shape is " + std::string(shape.substr(0, std::min<size_t>(close + 1, 40))) +
           ", expected one dimension: save it flattened");
  }
  return length;
}

}  // namespace

Layout parse_npy(Bytes head, uint64_t file_size) {
  static constexpr unsigned char kMagic[] = {0x93, 'N', 'U', 'M', 'P', 'Y'};
  if (head.size < 8 || std::memcmp(head.data, kMagic, sizeof kMagic) != 0) refuse("it has no NPY magic");
  const int version = head.data[6];
  if (version < 1 || version > 3) refuse("NPY version " + std::to_string(version) + ", expected 1, 2 or 3");
  const uint64_t start = version == 1 ? 10 : 12;
  const uint64_t length = version == 1 ? load<uint16_t>(head, 8) : load<uint32_t>(head, 8);
  if (start > head.size || length > head.size - start) {
    refuse("the NPY header says it has " + std::to_string(length) + " bytes, there are " + std::to_string(head.size) +
           ": it was cut short. Copy it again");
  }
  const std::string_view header(reinterpret_cast<const char*>(head.data + start), length);
  const std::string_view descr = value_of(header, "descr");
  int width = 0;
  if (descr.substr(1, 3) == "<u2") width = 2;
  if (descr.substr(1, 3) == "<u4") width = 4;
  if (!width) {
    refuse("the NPY array's dtype is " + std::string(descr.substr(0, 5)) +
           ", expected '<u2' or '<u4': save it as uint16 or uint32");
  }
  return whole_file({width, start + length, one_dimension(value_of(header, "shape")), 0}, file_size);
}

Layout parse_megatron(Bytes index, uint64_t file_size) {
  static constexpr std::array<char, 9> kMagic = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
  static constexpr uint64_t kHeader = 34;
  if (index.size < 9 || load<std::array<char, 9>>(index, 0) != kMagic) refuse("it has no Megatron magic, MMIDIDX");
  const auto version = load<uint64_t>(index, 9);
  if (version != 1) refuse("Megatron index version " + std::to_string(version) + ", expected 1");
  const auto code = load<uint8_t>(index, 17);
  if (code != 4 && code != 8) {
    refuse("Megatron dtype code " + std::to_string(code) + ", expected 4 (int32) or 8 (uint16)");
  }
  const int width = code == 8 ? 2 : 4;
  const auto sequences = load<uint64_t>(index, 18), starts = load<uint64_t>(index, 26);
  const uint64_t room = index.size - kHeader;
  if (sequences == 0 || starts < 2) refuse("the Megatron index has no documents: it is empty");
  if (sequences > room / 12 || starts > (room - sequences * 12) / 8) {
    refuse("the Megatron index says " + std::to_string(sequences) + " sequences and " + std::to_string(starts - 1) +
           " documents, more than its " + std::to_string(index.size) + " bytes hold: it was cut short. Copy it again");
  }
  const uint64_t pointers = kHeader + sequences * 4;
  // Tokens are read as one stream, so each sequence must start where the last one ended, as Megatron writes them. A few
  // thousand are checked, including the last one: checking 10^8 would take seconds.
  uint64_t end = 0;
  for (uint64_t k = 0, checks = std::min<uint64_t>(sequences, 4096); k < checks; ++k) {
    const uint64_t i = checks > 1 ? k * ((sequences - 1) / (checks - 1)) : 0;
    const uint64_t at = k + 1 == checks ? sequences - 1 : i;
    const auto length = load<int32_t>(index, kHeader + at * 4);
    const auto pointer = load<int64_t>(index, pointers + at * 8);
    const uint64_t before = at == 0 ? 0
                                    : load<uint64_t>(index, pointers + (at - 1) * 8) +
                                          static_cast<uint64_t>(load<uint32_t>(index, kHeader + (at - 1) * 4)) * width;
    if (length < 0 || pointer < 0 || static_cast<uint64_t>(pointer) != before) {
      refuse("Megatron sequence " + std::to_string(at) + " has " + std::to_string(length) + " tokens from byte " +
             std::to_string(pointer) + ", expected from byte " + std::to_string(before) +
             ": the sequences do not follow each other. Merge them with Megatron's own tools");
    }
    end = static_cast<uint64_t>(pointer) + static_cast<uint64_t>(length) * width;
  }
  return whole_file({width, 0, end / width, starts - 1}, file_size);
}

Layout parse_datatrove(Bytes index, uint64_t file_size) {
  if (index.size == 0 || index.size % 8) {
    refuse("the document index has " + std::to_string(index.size) + " bytes, expected 8 a document: it was cut short");
  }
  const uint64_t documents = index.size / 8, tokens = load<uint64_t>(index, index.size - 8);
  const uint64_t first = load<uint64_t>(index, 0);
  if (first > tokens) refuse("the document index does not ascend: it is not a .ds.index");
  for (const int width : {2, 4}) {
    if (tokens && file_size / width == tokens && file_size % width == 0) return {width, 0, tokens, documents};
  }
  refuse("the document index ends at token " + std::to_string(tokens) + ", and the token file has " +
         std::to_string(file_size) + " bytes, neither 2 nor 4 a token: one of them was cut short. Copy both again");
}

}  // namespace phi_fast::tokens
