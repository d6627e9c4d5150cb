#include "tokens/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "tokens/guarded_copy.h"

namespace phi_fast::tokens {
namespace {

int64_t change_time(const struct stat& status) {
#ifdef __APPLE__
  const timespec time = status.st_mtimespec;
#else
  const timespec time = status.st_mtim;
#endif
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

[[noreturn]] void fail(const std::string& path) { throw std::system_error(errno, std::generic_category(), path); }

}  // namespace

TokenFile::TokenFile(std::string path, int width, uint64_t offset, uint64_t tokens, Mode mode, Content content)
    : path_(std::move(path)), content_(content), width_(width), offset_(offset), tokens_(tokens) {
  if (width != 1 && width != 2 && width != 4) throw std::invalid_argument("tokens are 2 or 4 bytes wide, marks 1");
  if (path_.find('\0') != std::string::npos) throw std::invalid_argument("a path has no NUL in it");
  descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) fail(path_);
  struct stat status;
  try {
    if (fstat(descriptor_, &status)) fail(path_);
    if (!S_ISREG(status.st_mode)) throw std::runtime_error(path_ + " is not a regular file");
    size_ = static_cast<uint64_t>(status.st_size);
    changed_ = content == Content::kCache ? 0 : change_time(status);
    if (offset > size_ || tokens > (size_ - offset) / static_cast<uint64_t>(width)) {
      throw std::runtime_error(path_ + " has " + std::to_string(size_) + " bytes, too few for " +
                               std::to_string(tokens) + " tokens of " + std::to_string(width) + " bytes after byte " +
                               std::to_string(offset) + ": it was cut short. Copy or prepare it again");
    }
    if (mode == Mode::kMmap && size_) {
      void* map = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
      if (map == MAP_FAILED) fail(path_);
      map_ = static_cast<const std::byte*>(map);
      install_guard();
      madvise(map, size_, MADV_RANDOM);  // rows are shuffled, so the row after this one is not read next
    }
  } catch (...) {
    close(descriptor_);
    throw;
  }
}

TokenFile::~TokenFile() {
  if (map_) munmap(const_cast<std::byte*>(map_), size_);
  close(descriptor_);
}

void TokenFile::check_bounds(uint64_t first, uint64_t count) const {
  if (first > tokens_ || count > tokens_ - first) {
    throw std::out_of_range(path_ + " has " + std::to_string(tokens_) + " tokens; asked for " + std::to_string(count) +
                            " from token " + std::to_string(first));
  }
}

void TokenFile::read(uint64_t first, uint64_t count, void* out) const {
  check_bounds(first, count);
  const uint64_t byte = offset_ + first * width_, bytes = count * width_;
  map_ ? copy_mapped(byte, bytes, out) : read_all(byte, bytes, out);
}

void TokenFile::copy_mapped(uint64_t byte, uint64_t bytes, void* out) const {
  if (!guarded_copy(out, map_ + byte, bytes)) cut_short(byte);
  if (size_ <= kMappedLimit) return;
  // A fault maps up to 64 KB around it. Released pages stay in the page cache, and other threads simply fault again.
  const uint64_t touched = bytes + (uint64_t{64} << 10);
  if (mapped_.fetch_add(touched, std::memory_order_relaxed) + touched > kMappedLimit) {
    mapped_.store(0, std::memory_order_relaxed);
    madvise(const_cast<std::byte*>(map_), size_, MADV_DONTNEED);
  }
}

void TokenFile::read_all(uint64_t byte, uint64_t bytes, void* out) const {
  auto* to = static_cast<std::byte*>(out);
  while (bytes) {
    const ssize_t got = pread(descriptor_, to, bytes, static_cast<off_t>(byte));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_);
    if (got == 0) cut_short(byte);
    to += got;
    byte += got;
    bytes -= got;
  }
}

void TokenFile::cut_short(uint64_t byte) const {
  throw std::runtime_error(path_ + " no longer has byte " + std::to_string(byte) + ", it had " + std::to_string(size_) +
                           " bytes when it was opened: it was cut short while in use. Restore it and resume from a "
                           "checkpoint");
}

void TokenFile::will_need(uint64_t first, uint64_t count) const {
  check_bounds(first, count);
#ifdef POSIX_FADV_WILLNEED
  posix_fadvise(descriptor_, static_cast<off_t>(offset_ + first * width_), static_cast<off_t>(count * width_),
                POSIX_FADV_WILLNEED);
#endif
}

void TokenFile::check_unchanged() const {
  if (change_stamp() != changed_.load(std::memory_order_relaxed)) was_changed(size_);
}

int64_t TokenFile::change_stamp() const {
  struct stat status;
  if (fstat(descriptor_, &status)) fail(path_);
  if (static_cast<uint64_t>(status.st_size) != size_) was_changed(static_cast<uint64_t>(status.st_size));
  return content_ == Content::kCache ? 0 : change_time(status);
}

void TokenFile::was_changed(uint64_t size) const {
  const std::string found = size == size_ ? "its content is another, with the same " + std::to_string(size) + " bytes"
                                          : "it has " + std::to_string(size) + " bytes, it had " +
                                                std::to_string(size_) + " when it was opened";
  throw std::runtime_error(path_ + " was changed while in use: " + found +
                           ". Stop whatever writes to it and resume from a checkpoint");
}

}  // namespace phi_fast::tokens
