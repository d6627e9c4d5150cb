// One file of little-endian tokens, mapped or read.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace phi_fast::tokens {

enum class Mode { kMmap, kPread };

// Mapped pages of one file that may count as the process's before they are handed back.
constexpr uint64_t kMappedLimit = uint64_t{256} << 20;

class TokenFile {
 public:
  // `tokens` tokens of `width` bytes (2 or 4) from byte `offset` on. Throws std::system_error where the file cannot be
  // opened, std::runtime_error where it is not a file or too short.
  TokenFile(std::string path, int width, uint64_t offset, uint64_t tokens, Mode mode);
  ~TokenFile();
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;

  // Throws std::out_of_range where the file does not have these tokens.
  void check_bounds(uint64_t first, uint64_t count) const;
  // Copies `count` tokens from token `first` on. Throws std::runtime_error where the file has been cut short since.
  void read(uint64_t first, uint64_t count, void* out) const;
  // Asks the system to bring the tokens into memory, without waiting.
  void will_need(uint64_t first, uint64_t count) const;
  // Throws std::runtime_error if the file's size or time of change are not what they were when it was opened, or when
  // its content was last found to be the same.
  void check_unchanged() const;
  // The time of the file's last change, in nanoseconds. Throws std::runtime_error where its size is another by now.
  int64_t change_stamp() const;
  // The file's content was compared and is the same: its time of change may be `stamp` from now on.
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
  int width_, descriptor_ = -1;
  uint64_t offset_, tokens_, size_ = 0;
  std::atomic<int64_t> changed_{0};  // ns
  const std::byte* map_ = nullptr;
  mutable std::atomic<uint64_t> mapped_{0};  // an upper bound, since the last release
};

}  // namespace phi_fast::tokens
