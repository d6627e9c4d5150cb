// Headers of other programs' token files. Each parser gets the header's bytes and trusts none of them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace phi_fast::tokens {

struct Layout {
  int width;           // bytes per token
  uint64_t offset;     // bytes before the first token
  uint64_t tokens;     // in the file
  uint64_t documents;  // 0 if the format does not record them
};

struct Bytes {
  const unsigned char* data;
  uint64_t size;
};

// All parsers throw std::invalid_argument for a header that cannot be read; the message says what was found and
// expected.

// llm.c: 256 int32 [magic, version, tokens, ...], then tokens: magic 20240520 version 1 uint16, 20240801 version 7
// uint32.
Layout parse_llmc(Bytes head, uint64_t file_size);
// NumPy's .npy, versions 1 to 3, one dimension, '<u2' or '<u4'.
Layout parse_npy(Bytes head, uint64_t file_size);
// Megatron's .idx of a .bin of `file_size` bytes: "MMIDIDX\0\0", u64 version 1, u8 dtype (4 int32, 8 uint16),
// u64 sequences, u64 documents + 1, then int32 lengths, int64 byte pointers and int64 document starts, unaligned.
Layout parse_megatron(Bytes index, uint64_t file_size);
// datatrove's .ds.index of a .ds of `file_size` bytes: u64 cumulative document ends.
Layout parse_datatrove(Bytes index, uint64_t file_size);

}  // namespace phi_fast::tokens
