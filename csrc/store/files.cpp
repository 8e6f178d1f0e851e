#include "store/files.h"

#include <dirent.h>
#include <fcntl.h>
#include <lmdb.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <limits>
#include <memory>

#include "errors.h"

namespace mld {
namespace {

void write_all(int descriptor, std::string_view content, const std::string& path) {
  while (!content.empty()) {
    const ssize_t written = write(descriptor, content.data(), content.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_store_error(errno, "cannot write", path);
    content.remove_prefix(static_cast<std::size_t>(written));
  }
}

std::string hint_for(int code) {
  switch (code) {
    case ENOSPC:
    case EDQUOT:
      return "free disk space, or choose another TracerConfig.data_dir";
    case EACCES:
    case EPERM:
    case EROFS:
      return "choose a TracerConfig.data_dir that this user may write to";
    case EMFILE:
    case ENFILE:
      return "raise the limit of open files (ulimit -n)";
    case EFBIG:
      return "raise the limit of the file size (ulimit -f)";
    default:
      return "look at the disk and the kernel log, or choose another TracerConfig.data_dir";
  }
}

}  // namespace

Descriptor::Descriptor(const std::string& path, int flags, unsigned mode)
    : value_(open(path.c_str(), flags | O_CLOEXEC, mode)) {
  if (value_ < 0) throw_store_error(errno, "cannot open", path);
}

Descriptor::~Descriptor() { close(value_); }

void throw_store_error(int code, const std::string& what, const std::string& path) {
  throw StoreError(code, what + " " + path + ": " + mdb_strerror(code), hint_for(code));
}

void make_directories(const std::string& path) {
  for (std::size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
    const std::string part = path.substr(0, slash);
    if (mkdir(part.c_str(), 0700) != 0 && errno != EEXIST) {
      const int code = errno;
      // A parent that exists but may not be written to reports EACCES or EROFS before EEXIST on
      // some filesystems.
      struct stat status{};
      if (stat(part.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
        throw_store_error(code, "cannot make directory", part);
      }
    }
    if (slash == std::string::npos) return;
  }
}

void sync_directory(const std::string& path) {
  const Descriptor directory(path, O_RDONLY | O_DIRECTORY);
  if (fsync(directory.get()) != 0) throw_store_error(errno, "cannot sync directory", path);
}

void sync_file(const std::string& path) {
  const Descriptor file(path, O_RDWR);
  if (fdatasync(file.get()) != 0) throw_store_error(errno, "cannot sync", path);
}

void replace_file(const std::string& path, std::string_view content) {
  const std::string temporary = path + ".tmp";
  {
    const Descriptor file(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    write_all(file.get(), content, temporary);
    if (fdatasync(file.get()) != 0) throw_store_error(errno, "cannot sync", temporary);
  }
  rename_path(temporary, path);
  sync_directory(path.substr(0, path.rfind('/')));
}

void allocate_file(const std::string& path, std::size_t bytes) {
  const Descriptor file(path, O_RDWR | O_CREAT, 0600);
  const int code = posix_fallocate(file.get(), 0, static_cast<off_t>(bytes));
  if (code != 0) throw_store_error(code, "cannot allocate", path);
}

void touch(const std::string& path) noexcept { utimensat(AT_FDCWD, path.c_str(), nullptr, 0); }

void rename_path(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0)
    throw_store_error(errno, "cannot rename to " + to + " the path", from);
}

void remove_tree(const std::string& path) {
  for (const std::string& name : list_directory(path)) {
    const std::string child = path + "/" + name;
    struct stat status{};
    if (lstat(child.c_str(), &status) != 0) continue;
    if (S_ISDIR(status.st_mode)) {
      remove_tree(child);
    } else if (unlink(child.c_str()) != 0 && errno != ENOENT) {
      throw_store_error(errno, "cannot delete", child);
    }
  }
  if (rmdir(path.c_str()) == 0 || errno == ENOENT) return;
  if (errno != ENOTDIR || (unlink(path.c_str()) != 0 && errno != ENOENT))
    throw_store_error(errno, "cannot delete", path);
}

std::vector<std::string> list_directory(const std::string& path) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir(path.c_str()), &closedir);
  if (directory == nullptr) {
    if (errno == ENOENT || errno == ENOTDIR) return names;
    throw_store_error(errno, "cannot list", path);
  }
  while (const dirent* entry = readdir(directory.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool path_exists(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0;
}

FileId file_id(const std::string& path) {
  struct stat status{};
  if (stat(path.c_str(), &status) != 0) throw_store_error(errno, "cannot look at", path);
  return {status.st_dev, status.st_ino};
}

std::uint64_t file_bytes(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : 0;
}

std::uint64_t disk_bytes_of(const std::string& path) {
  struct stat status{};
  if (stat(path.c_str(), &status) != 0) return 0;
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

std::uint64_t free_bytes_at(const std::string& path) {
  struct statvfs status{};
  std::string existing = path;
  while (statvfs(existing.c_str(), &status) != 0) {
    const std::size_t slash = existing.rfind('/');
    if (errno != ENOENT || slash == std::string::npos || slash == 0)
      return std::numeric_limits<std::uint64_t>::max();
    existing.resize(slash);
  }
  return static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize;
}

std::string network_filesystem_at(const std::string& path) {
  struct Known {
    std::uint32_t magic;
    const char* name;
  };
  // f_type values of statfs(2) and of the filesystems' own headers.
  static constexpr Known kKnown[] = {
      {0x6969, "NFS"},        {0xFF534D42, "CIFS"},   {0xFE534D42, "SMB2"},  {0x517B, "SMB"},
      {0x0BD00BD0, "Lustre"}, {0x00C36400, "Ceph"},   {0x01021997, "9P"},    {0x5346414F, "AFS"},
      {0x47504653, "GPFS"},   {0x19830326, "BeeGFS"}, {0x013111A8, "IBRIX"}, {0xAAD7AAEA, "PanFS"},
  };
  struct statfs status{};
  if (statfs(path.c_str(), &status) != 0) return {};
  const auto magic = static_cast<std::uint32_t>(status.f_type);
  for (const Known& known : kKnown) {
    if (known.magic == magic) return known.name;
  }
  return {};
}

}  // namespace mld
