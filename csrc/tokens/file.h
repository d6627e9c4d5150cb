// One file of little-endian tokens, or of their marks, either mapped or read.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace phi_fast::tokens {

enum class Mode { kMmap, kPread };

// kCache: the file is filled in and emptied by parts while it is read, by someone who knows which parts are there. Its
// size stays the same, and its modification time says nothing about its content.
enum class Content { kFixed, kCache };

// Bytes of one file's mapped pages that may count as the process's memory before they are released.
constexpr uint64_t kMappedLimit = uint64_t{256} << 20;

class TokenFile {
 public:
  // Opens `tokens` tokens of `width` bytes (2 or 4; marks: 1) from byte `offset` on. Throws std::system_error if the
  // file cannot be opened, std::runtime_error if it is not a regular file or is too short.
  TokenFile(std::string path, int width, uint64_t offset, uint64_t tokens, Mode mode,
            Content content = Content::kFixed);
  ~TokenFile();
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;

  // Throws std::out_of_range if the file does not have these tokens.
  void check_bounds(uint64_t first, uint64_t count) const;
  // Copies `count` tokens from token `first` on. Throws std::runtime_error if the file has been truncated since.
  void read(uint64_t first, uint64_t count, void* out) const;
  // Asks the system to bring the tokens into memory, without waiting.
  void will_need(uint64_t first, uint64_t count) const;
  // Throws std::runtime_error if the file's size or modification time differs from when it was opened or accepted.
  void check_unchanged() const;
  // The file's modification time, in nanoseconds; 0 for a cache. Throws std::runtime_error if its size has changed.
  int64_t change_stamp() const;
  // Accepts `stamp` as the file's modification time, after its content was compared and found to be the same.
  void accept(int64_t stamp) { changed_.store(stamp, std::memory_order_relaxed); }

  const std::string& path() const { return path_; }
  int width() const { return width_; }
  uint64_t tokens() const { return tokens_; }

 private:
  void copy_mapped(uint64_t byte, uint64_t bytes, void* out) const;
  void read_all(uint64_t byte, uint64_t bytes, void* out) const;
  [[noreturn]] void cut_short(uint64_t byte) const;
  [[noreturn]] void was_changed(uint64_t size) const;

  std::string path_;
  Content content_;
  int width_, descriptor_ = -1;
  uint64_t offset_, tokens_, size_ = 0;
  std::atomic<int64_t> changed_{0};  // ns
  const std::byte* map_ = nullptr;
  mutable std::atomic<uint64_t> mapped_{0};  // bytes since the last release; an upper bound
};

}  // namespace phi_fast::tokens
