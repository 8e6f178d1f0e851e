// Filesystem steps that are safe against a power cut, and what is peculiar about a filesystem.
// Every failure is a StoreError.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "process.h"

namespace mld {

// An open file; closed at the end of its scope. Throws StoreError.
class Descriptor {
 public:
  Descriptor(const std::string& path, int flags, unsigned mode = 0);
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  [[nodiscard]] int get() const noexcept { return value_; }

 private:
  int value_;
};

// Makes a directory (0700) and its missing parents; an existing one is fine.
void make_directories(const std::string& path);
// Forces a directory's entries to disk.
void sync_directory(const std::string& path);
void sync_file(const std::string& path);
// Writes `content` to a file (0600) whole or not at all, also in a power cut: temp file beside it,
// fsync, rename, fsync of the directory.
void replace_file(const std::string& path, std::string_view content);
// Makes a file (0600) of `bytes` zeros whose blocks are taken: writing to it through a map cannot
// meet a full disk.
void allocate_file(const std::string& path, std::size_t bytes);
// Marks a directory as changed now; a failure changes nothing.
void touch(const std::string& path) noexcept;
void rename_path(const std::string& from, const std::string& to);
// Deletes a directory and all in it; what is gone already is fine.
void remove_tree(const std::string& path);
// Names in a directory, sorted, without `.` and `..`; empty if there is none.
std::vector<std::string> list_directory(const std::string& path);
bool path_exists(const std::string& path);
FileId file_id(const std::string& path);
std::uint64_t file_bytes(const std::string& path);     // length of a file; 0 if it is gone
std::uint64_t disk_bytes_of(const std::string& path);  // of one file; 0 if it is gone
// Free for ordinary users on the path's filesystem; UINT64_MAX if unknown.
std::uint64_t free_bytes_at(const std::string& path);
// The name of a network filesystem that LMDB must not write to, or empty.
std::string network_filesystem_at(const std::string& path);

[[noreturn]] void throw_store_error(int code, const std::string& what, const std::string& path);

}  // namespace mld
