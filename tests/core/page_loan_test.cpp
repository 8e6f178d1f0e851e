// Memory lent to LMDB: it is written from where it lies, comes back whatever becomes of the
// transaction, and nothing but the value reaches the file.
#include "store/page_loan.h"

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "check.h"
#include "ring/record.h"
#include "store/segment.h"
#include "support.h"

namespace {

constexpr std::size_t kValueBytes = 3 * mld::kPageBytes - 1000;
constexpr std::size_t kRunBytes = 3 * mld::kPageBytes;
constexpr char kSecret = '\x5A';

mld::Segment make_segment(const support::TempDir& directory) {
  return mld::Segment(directory.path() + "/segment", {0, 0, 0, 0}, mld::Sync::kOnRequest,
                      std::size_t{1} << 20);
}

// A run as the ring holds it: what stood there before is all around the value.
std::vector<char> make_run(const std::string& value) {
  std::vector<char> run(kRunBytes, kSecret);
  std::memcpy(run.data() + mld::kPageHeaderBytes, value.data(), value.size());
  return run;
}

std::string_view value_in(const std::vector<char>& run) {
  return {run.data() + mld::kPageHeaderBytes, kValueBytes};
}

}  // namespace

TEST(page_loan_is_taken_once_and_given_back) {
  std::vector<std::byte> run(kRunBytes);
  mld::PageLoans loans;
  loans.offer(run.data(), run.size());
  void* other = mld_lmdb_malloc(kRunBytes - mld::kPageBytes);
  CHECK(other != run.data());
  CHECK(mld_lmdb_malloc(kRunBytes) == run.data());
  void* next = mld_lmdb_malloc(kRunBytes);
  CHECK(next != run.data());
  mld_lmdb_free(next);  // in no order
  mld_lmdb_free(run.data());
  mld_lmdb_free(other);
  loans.offer(run.data(), run.size());
  loans.withdraw();
  void* heap = mld_lmdb_malloc(kRunBytes);
  CHECK(heap != run.data());
  mld_lmdb_free(heap);
}

TEST(page_of_the_heap_is_zero) {
  for (const std::size_t bytes : {mld::kPageBytes, 2 * mld::kPageBytes}) {
    void* memory = mld_lmdb_malloc(bytes);
    std::memset(memory, kSecret, bytes);
    mld_lmdb_free(memory);
    auto* again = static_cast<char*>(mld_lmdb_malloc(bytes));
    for (std::size_t i = 0; i < bytes; ++i) REQUIRE(again[i] == 0);
    mld_lmdb_free(again);
  }
}

TEST(page_run_is_written_without_a_copy_and_with_nothing_around_it) {
  const support::TempDir directory;
  const std::string value = support::pattern(1, kValueBytes);
  std::vector<char> run = make_run(value);
  mld::Segment segment = make_segment(directory);
  {
    mld::Segment::Batch batch(segment);
    batch.append_run(7, value_in(run));
#ifndef MLD_LMDB_SYSTEM
    // Changed after the put, so it can only be in the file if LMDB writes from here.
    run[mld::kPageHeaderBytes] = static_cast<char>(~value[0]);
#endif
    batch.commit();
  }
  std::string stored(kValueBytes, '\0');
  REQUIRE(segment.read_chunk(7, stored.data(), stored.size()));
#ifndef MLD_LMDB_SYSTEM
  CHECK_EQ(stored[0], static_cast<char>(~value[0]));
#endif
  CHECK(stored.substr(1) == value.substr(1));
  segment.seal();
  const std::string file = support::read_file(segment.directory() + "/data.mdb");
  CHECK(file.find(std::string(8, kSecret)) == std::string::npos);
}

TEST(page_run_survives_a_batch_that_is_given_up_and_is_written_by_the_next) {
  const support::TempDir directory;
  const std::string value = support::pattern(2, kValueBytes);
  const std::vector<char> run = make_run(value);
  mld::Segment segment = make_segment(directory);
  {
    mld::Segment::Batch batch(segment);
    batch.append_run(7, value_in(run));
  }
  CHECK(value_in(run) == value);
  mld::Segment::Batch batch(segment);
  batch.append_run(7, value_in(run));
  batch.commit();
  std::string stored(kValueBytes, '\0');
  REQUIRE(segment.read_chunk(7, stored.data(), stored.size()));
  CHECK(stored == value);
}
