// The writes that LMDB hands over: the bytes lie where a writev would have put them, and each error
// and each short write comes back as the system gave it.
#include "store/early_write_back.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>
#include <vector>

#include "check.h"
#include "support.h"

namespace {

class File {
 public:
  explicit File(int flags) : file_(open((directory_.path() + "/file").c_str(), flags, 0600)) {
    CHECK(file_ >= 0);
  }
  ~File() { close(file_); }
  int get() const { return file_; }
  std::string contents() const {
    std::string bytes(static_cast<std::size_t>(lseek(file_, 0, SEEK_END)), '\0');
    CHECK_EQ(pread(file_, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
    return bytes;
  }

 private:
  support::TempDir directory_;
  int file_;
};

std::vector<iovec> parts_of(std::vector<std::string>& values) {
  std::vector<iovec> parts;
  for (std::string& value : values) parts.push_back({value.data(), value.size()});
  return parts;
}

}  // namespace

TEST(early_write_back_puts_every_part_behind_the_one_before) {
  const mld::EarlyWriteBack early;
  // Below, at and above the stride of 4 MiB, and many small ones.
  std::vector<std::string> values{std::string(5 << 20, 'a'), std::string(1, 'b'),
                                  std::string(4 << 20, 'c')};
  for (char letter = 'd'; letter < 'z'; ++letter) values.emplace_back(300 << 10, letter);
  std::string expected(123, '\0');
  for (const std::string& value : values) expected += value;
  File file(O_CREAT | O_RDWR);
  std::vector<iovec> parts = parts_of(values);
  CHECK_EQ(lseek(file.get(), 123, SEEK_SET), 123);
  const ssize_t written = mld_lmdb_writev(file.get(), parts.data(), static_cast<int>(parts.size()));
  CHECK_EQ(written, static_cast<ssize_t>(expected.size() - 123));
  CHECK(file.contents() == expected);
}

TEST(early_write_back_returns_the_error_of_the_system) {
  std::vector<std::string> values{"abc"};
  std::vector<iovec> parts = parts_of(values);
  const File read_only(O_CREAT | O_RDONLY);
  errno = 0;
  CHECK_EQ(mld_lmdb_writev(read_only.get(), parts.data(), 1), -1);
  CHECK_EQ(errno, EBADF);
  errno = 0;
  CHECK_EQ(mld_lmdb_writev(-1, parts.data(), 1), -1);
  CHECK_EQ(errno, EBADF);
}

TEST(early_write_back_stops_at_a_short_write) {
  const mld::EarlyWriteBack early;
  constexpr rlim_t kLimit = (4 << 20) + (1 << 20);  // inside of the second stride
  std::vector<std::string> values(6, std::string(2 << 20, 'x'));
  std::vector<iovec> parts = parts_of(values);
  const File file(O_CREAT | O_RDWR);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{kLimit, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &limit);
  const ssize_t written = mld_lmdb_writev(file.get(), parts.data(), static_cast<int>(parts.size()));
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_EQ(written, static_cast<ssize_t>(kLimit));
}
