// A commit whose last pages LMDB never writes: whoever dies right after it leaves a whole file.
#include "store/meta_write.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <string>

#include "check.h"
#include "store/environment.h"
#include "store/files.h"
#include "store/record_format.h"
#include "store/segment.h"
#include "store/segment_reader.h"
#include "support.h"

namespace {

using support::TempDir;

constexpr std::size_t kMapBytes = std::size_t{16} << 20;

std::string partition_in(const TempDir& directory) { return directory / mld::partition_name(0); }

void commit_row(mld::Segment& segment, std::uint64_t call) {
  mld::Segment::Batch batch(segment);
  std::string header;
  mld::encode_call({0, 0, call, 0, 1, 0, static_cast<std::int64_t>(call)}, {}, "\xC0", "", &header);
  batch.put_header(call, header);
  batch.totals().rows += 1;
  batch.totals().calls += 1;
  batch.commit();
}

// Takes pages at the end of the file and gives them back, with pages of earlier commits at hand, as
// LMDB has them when it forgets the new ones. Only LMDB itself runs between this and the return.
void commit_with_unwritten_pages(const mld::Environment& environment) {
  mld::Transaction transaction(environment, false);
  mld::Key key = mld::encode_key(1 << 20);
  MDB_val key_value{key.size(), key.data()};
  std::string bytes(200 << 10, 'x');
  MDB_val value{std::size_t{10}, bytes.data()};
  CHECK_EQ(mdb_put(transaction.get(), environment.headers(), &key_value, &value, 0), 0);
  value.mv_size = bytes.size();
  CHECK_EQ(mdb_put(transaction.get(), environment.chunks(), &key_value, &value, 0), 0);
  CHECK_EQ(mdb_del(transaction.get(), environment.chunks(), &key_value, nullptr), 0);
  CHECK_EQ(mdb_del(transaction.get(), environment.headers(), &key_value, nullptr), 0);
  transaction.commit();
}

std::uint64_t claimed_bytes(const mld::Environment& environment) {
  MDB_envinfo info{};
  mdb_env_info(environment.get(), &info);
  return (info.me_last_pgno + 1) * environment.page_bytes();
}

}  // namespace

TEST(kill_right_after_a_commit_with_unwritten_pages_leaves_a_file_that_readers_and_restarts_take) {
  for (const mld::Sync sync : {mld::Sync::kEveryCommit, mld::Sync::kOnRequest}) {
    const TempDir directory;
    const std::string segment_path = partition_in(directory) + "/" + mld::segment_name(0, 0);
    const int status = support::in_child([&] {
      mld::Segment segment(segment_path, {0, 0, 0, 0}, sync, kMapBytes);
      for (std::uint64_t call = 0; call < 20; ++call) commit_row(segment, call);
      const auto environment =
          mld::Environment::open(segment_path, mld::Access::kWrite, sync, kMapBytes);
      const std::uint64_t before = claimed_bytes(*environment);
      commit_with_unwritten_pages(*environment);
      // The fault has fired: LMDB claims more pages than it ever wrote.
      if (claimed_bytes(*environment) < before + (200 << 10)) return 1;
      raise(SIGKILL);
      return 2;
    });
    CHECK_EQ(status, 128 + SIGKILL);
    CHECK_EQ(mld::SegmentReader(segment_path, false).headers(std::nullopt, 100).size(), 20);
    {
      mld::StoreOptions options;
      options.sync = sync;
      const mld::StoreUse next_run(directory.path(), options);
      CHECK(mld::path_exists(segment_path + "/" + mld::kSealedFile));
    }
    CHECK_EQ(mld::SegmentReader(segment_path, true).headers(std::nullopt, 100).size(), 20);
  }
}

TEST(meta_page_is_not_written_where_its_file_cannot_be_made_long_enough) {
  const TempDir directory;
  const int file = open((directory / "file").c_str(), O_CREAT | O_RDWR, 0600);
  CHECK(file >= 0);
  std::string meta(120, '\0');
  const std::uint32_t page_bytes = 4096;
  const std::uint64_t last_page = 300;
  std::memcpy(meta.data() + 8, &page_bytes, sizeof page_bytes);
  std::memcpy(meta.data() + 104, &last_page, sizeof last_page);
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{1 << 20, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &limit);
  errno = 0;
  CHECK_EQ(mld_lmdb_pwrite(file, meta.data(), meta.size(), 16), -1);
  CHECK_EQ(errno, EFBIG);
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK_EQ(mld::file_bytes(directory / "file"), 0);
  CHECK_EQ(mld_lmdb_pwrite(file, meta.data(), meta.size(), 16), 120);
  CHECK_EQ(mld::file_bytes(directory / "file"), 301 * 4096);
  close(file);
}
