// One partition, stepped by hand: what a commit puts where, and what an outsider finds on disk
// afterwards.
#include "store/partition.h"

#include <string>

#include "check.h"
#include "store/files.h"
#include "support.h"

namespace {

using mld::CommitOutcome;
using support::Bench;
using support::pattern;
using support::TempDir;

mld::PartitionOptions options_in(const TempDir& directory,
                                 std::size_t map_bytes = std::size_t{64} << 20) {
  return {directory / "epoch-3",    1, 2, 3, mld::Sync::kOnRequest, map_bytes,
          std::chrono::seconds(300)};
}

mld::CommitResult commit(mld::Partition& partition) { return partition.commit(mld::Clock::now()); }

// Puts one call of `sizes.size()` captures into the partition.
void add_call(Bench& bench, mld::Partition& partition, std::uint64_t call,
              const std::vector<std::size_t>& sizes) {
  std::uint64_t bytes = 0;
  for (std::uint32_t capture = 0; capture < sizes.size(); ++capture) {
    bench.chunk(1, 3, call, capture, pattern(call * 100 + capture, sizes[capture]));
    partition.add(bench.take());
    bytes += sizes[capture];
  }
  bench.call(1, 3, call, 4, bytes, 4);
  partition.add(bench.take());
}

void check_call(const support::StoredPartition& stored, std::uint64_t call,
                const std::vector<std::size_t>& sizes) {
  const auto found = stored.calls.find({2, call});
  REQUIRE(found != stored.calls.end());
  CHECK_EQ(found->second.captures.size(), sizes.size());
  for (std::uint32_t capture = 0; capture < sizes.size(); ++capture) {
    CHECK(found->second.captures.at(capture) == pattern(call * 100 + capture, sizes[capture]));
  }
}

}  // namespace

TEST(partition_returns_what_was_put_in) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  CHECK(!partition.has_pending());
  add_call(bench, partition, 0, {10, 5000, 4096, 4097});
  add_call(bench, partition, 1, {1});
  CHECK(partition.has_pending());
  CHECK_EQ(partition.oldest_position().value(), 0);
  const mld::CommitResult result = commit(partition);
  CHECK(result.outcome == CommitOutcome::kCommitted);
  CHECK_EQ(result.committed.rows, 8);
  CHECK_EQ(result.committed.bytes, 10 + 5000 + 4096 + 4097 + 1);
  CHECK_EQ(result.written_bytes, result.committed.bytes);
  CHECK(result.grown_bytes >= result.written_bytes);
  CHECK(!partition.has_pending());
  CHECK(!partition.oldest_position().has_value());

  const support::StoredPartition stored = support::read_partition(directory / "epoch-3");
  CHECK_EQ(stored.calls.size(), 2);
  check_call(stored, 0, {10, 5000, 4096, 4097});
  check_call(stored, 1, {1});
  const mld::CallIdentity& identity = stored.calls.at({2, 1}).identity;
  CHECK_EQ(identity.rank, 1);
  CHECK_EQ(identity.attempt, 2);
  CHECK_EQ(identity.epoch, 3);
  CHECK_EQ(identity.rows, 4);
  CHECK_EQ(identity.ground_truth_rows, 4);
  CHECK_EQ(identity.first_row, 1000);
}

TEST(partition_stores_small_pieces_inline_and_large_ones_as_chunks) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  add_call(bench, partition, 7, {4096, 4097});
  CHECK(commit(partition).outcome == CommitOutcome::kCommitted);
  const auto chunks = support::read_partition(directory / "epoch-3").calls.at({2, 7}).chunks;
  REQUIRE(chunks.size() == 2);
  CHECK_EQ(chunks[0].segment, mld::ChunkRef::kInline);
  CHECK_EQ(chunks[1].segment, 0);
}

// A small piece whose call goes on in a later batch must not hold its ring slot: it becomes an
// ordinary chunk.
TEST(partition_writes_leftovers_and_keeps_the_order_of_pieces) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  std::string first_capture, second_capture;
  for (int piece = 0; piece < 6; ++piece) {
    const std::string text =
        pattern(static_cast<std::uint64_t>(piece), piece % 2 == 0 ? 100 : 6000);
    bench.chunk(1, 3, 0, 0, text);
    partition.add(bench.take());
    first_capture += text;
    bench.chunk(1, 3, 0, 1, "x" + text);
    partition.add(bench.take());
    second_capture += "x" + text;
    if (piece % 3 != 2) continue;
    const mld::CommitResult result = commit(partition);
    CHECK_EQ(result.committed.rows, 0);
    CHECK(!partition.oldest_position().has_value());
    CHECK(support::read_partition(directory / "epoch-3")
              .calls.empty());  // invisible until its header
  }
  bench.chunk(1, 3, 0, 1, "end");
  partition.add(bench.take());
  second_capture += "end";
  bench.call(1, 3, 0, 9, first_capture.size() + second_capture.size());
  partition.add(bench.take());
  CHECK_EQ(commit(partition).committed.rows, 9);
  const auto stored = support::read_partition(directory / "epoch-3");
  REQUIRE(stored.calls.size() == 1);
  CHECK(stored.calls.at({2, 0}).captures.at(0) == first_capture);
  CHECK(stored.calls.at({2, 0}).captures.at(1) == second_capture);
}

TEST(partition_reads_back_open_and_finished_calls) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  std::string out(6000, '\0');
  CHECK(!partition.read_piece(0, 0, 0, out.data(), 6000));  // nothing here yet
  bench.chunk(1, 3, 0, 0, pattern(1, 100));
  bench.chunk(1, 3, 0, 0, pattern(2, 6000));
  partition.add(bench.take());
  partition.add(bench.take());
  commit(partition);
  const auto check_pieces = [&] {
    CHECK(partition.read_piece(0, 0, 0, out.data(), 100));
    CHECK(out.substr(0, 100) == pattern(1, 100));
    CHECK(partition.read_piece(0, 0, 1, out.data(), 6000));
    CHECK(out == pattern(2, 6000));
    CHECK(!partition.read_piece(0, 0, 2, out.data(), 100));
    CHECK(!partition.read_piece(0, 1, 0, out.data(), 100));
    CHECK(!partition.read_piece(0, 0, 0, out.data(), 101));
    CHECK(!partition.read_piece(1, 0, 0, out.data(), 100));
  };
  check_pieces();
  bench.chunk(1, 3, 0, 1, "inline");
  bench.call(1, 3, 0, 2, 6106);
  partition.add(bench.take());
  partition.add(bench.take());
  commit(partition);
  CHECK(partition.read_piece(0, 1, 0, out.data(), 6));
  CHECK_EQ(out.substr(0, 6), "inline");
  CHECK(partition.read_piece(0, 0, 1, out.data(), 6000));
  CHECK(out == pattern(2, 6000));
  partition.seal();
  partition.close_environment();
  CHECK(partition.read_piece(0, 0, 1, out.data(), 6000));
}

TEST(partition_counts_its_totals_in_the_transaction_of_the_rows) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  for (std::uint64_t call = 0; call < 5; ++call) {
    add_call(bench, partition, call, {100, 5000});
    partition.add_gap({call + 100, call + 100, 3, 30, "stall"});
    commit(partition);
    const auto stored = support::read_partition(directory / "epoch-3");
    CHECK_EQ(stored.meta_rows, 4 * (call + 1));
    CHECK_EQ(stored.meta_calls, call + 1);
    CHECK_EQ(stored.meta_payload_bytes, 5100 * (call + 1));
    CHECK_EQ(stored.meta_discarded_rows, 3 * (call + 1));
  }
}

TEST(partition_merges_gaps_that_follow_one_another) {
  const TempDir directory;
  mld::Partition partition(options_in(directory));
  for (std::uint64_t call = 10; call < 15; ++call)
    partition.add_gap({call, call, 8, 80, "ring_full"});
  partition.add_gap({15, 15, 8, 80, "stall"});
  partition.add_gap({20, 20, 8, 80, "stall"});
  CHECK(partition.has_pending());
  CHECK(!partition.oldest_position().has_value());  // a gap holds no ring memory
  commit(partition);
  const auto gaps = support::read_partition(directory / "epoch-3").gaps;
  REQUIRE(gaps.size() == 3);
  CHECK_EQ(gaps[0].first_call, 10);
  CHECK_EQ(gaps[0].last_call, 14);
  CHECK_EQ(gaps[0].rows, 40);
  CHECK_EQ(gaps[0].bytes, 400);
  CHECK_EQ(gaps[0].cause, "ring_full");
  CHECK_EQ(gaps[1].first_call, 15);
  CHECK_EQ(gaps[1].cause, "stall");
  CHECK_EQ(gaps[2].first_call, 20);
}

TEST(partition_that_is_full_goes_on_in_a_successor) {
  const TempDir directory;
  Bench bench(std::size_t{8} << 20);
  mld::Partition partition(options_in(directory, std::size_t{1} << 20));
  for (std::uint64_t call = 0; call < 12; ++call) {
    add_call(bench, partition, call, {200000, 50});
    CHECK(commit(partition).outcome == CommitOutcome::kCommitted);
    bench.ring().release(bench.ring().read_position());
  }
  partition.seal();
  const auto stored = support::read_partition(directory / "epoch-3");
  CHECK(stored.segments >= 3);
  CHECK_EQ(stored.sealed, stored.segments);
  CHECK_EQ(stored.headers, 12);
  CHECK_EQ(stored.meta_rows, 48);
  for (std::uint64_t call = 0; call < 12; ++call) check_call(stored, call, {200000, 50});
}

// One call whose pieces spread over segments: its references name the segment of each.
TEST(partition_spreads_a_long_call_over_segments) {
  const TempDir directory;
  Bench bench(std::size_t{8} << 20);
  mld::Partition partition(options_in(directory, std::size_t{1} << 20));
  std::string whole;
  for (std::uint64_t piece = 0; piece < 10; ++piece) {
    const std::string text = pattern(piece, 300000);
    bench.chunk(1, 3, 0, 0, text);
    partition.add(bench.take());
    whole += text;
    CHECK(commit(partition).outcome == CommitOutcome::kCommitted);
    bench.ring().release(bench.ring().read_position());
  }
  bench.call(1, 3, 0, 1, whole.size());
  partition.add(bench.take());
  CHECK_EQ(commit(partition).committed.rows, 1);
  const auto stored = support::read_partition(directory / "epoch-3");
  CHECK(stored.segments >= 3);
  CHECK(stored.calls.at({2, 0}).captures.at(0) == whole);
}

// What waits behind a full disk may be more than a segment takes: the successor is made as large as
// it must be.
TEST(partition_takes_a_batch_that_is_larger_than_a_segment) {
  const TempDir directory;
  Bench bench(std::size_t{8} << 20);
  mld::Partition partition(options_in(directory, std::size_t{1} << 20));
  for (std::uint64_t call = 0; call < 10; ++call) add_call(bench, partition, call, {400000, 10});
  const mld::CommitResult result = commit(partition);
  CHECK(result.outcome == CommitOutcome::kCommitted);
  CHECK_EQ(result.committed.rows, 40);
  const auto stored = support::read_partition(directory / "epoch-3");
  for (std::uint64_t call = 0; call < 10; ++call) check_call(stored, call, {400000, 10});
}

TEST(partition_goes_on_in_the_same_segment_after_its_environment_was_closed) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  for (std::uint64_t call = 0; call < 4; ++call) {
    add_call(bench, partition, call, {5000});
    CHECK(commit(partition).outcome == CommitOutcome::kCommitted);
    CHECK(partition.is_open());
    partition.close_environment();
    CHECK(!partition.is_open());
    partition.sync();
    partition.close_environment();
  }
  const auto stored = support::read_partition(directory / "epoch-3");
  CHECK_EQ(stored.segments, 1);
  CHECK_EQ(stored.calls.size(), 4);
  CHECK_EQ(stored.meta_calls, 4);
}

TEST(partition_begins_a_segment_after_a_seal) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  partition.seal();  // nothing to seal
  add_call(bench, partition, 0, {10});
  commit(partition);
  partition.seal();
  add_call(bench, partition, 1, {10});
  commit(partition);
  const auto stored = support::read_partition(directory / "epoch-3");
  CHECK_EQ(stored.segments, 2);
  CHECK_EQ(stored.sealed, 1);
  CHECK_EQ(stored.calls.size(), 2);
}

// A call that is open when its partition is dropped has lost chunks: its header must not make a
// torn call visible.
TEST(partition_counts_a_call_that_was_open_at_a_drop_as_dropped) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  bench.chunk(1, 3, 0, 0, pattern(1, 6000));
  partition.add(bench.take());
  commit(partition);
  bench.chunk(1, 3, 1, 0, pattern(2, 100));  // pending at the drop
  partition.add(bench.take());
  add_call(bench, partition, 2, {50});  // complete at the drop
  const mld::Tally dropped = partition.drop();
  CHECK_EQ(dropped.rows, 4);
  CHECK_EQ(dropped.bytes, 50);
  CHECK(!partition.has_pending());
  mld::remove_tree(directory / "epoch-3");

  bench.chunk(1, 3, 0, 1, pattern(3, 7000));
  bench.call(1, 3, 0, 5, 13000);
  bench.call(1, 3, 1, 6, 100);
  for (int record = 0; record < 3; ++record) partition.add(bench.take());
  add_call(bench, partition, 3, {60});
  const mld::CommitResult result = commit(partition);
  CHECK_EQ(result.dropped.rows, 11);
  CHECK_EQ(result.dropped.bytes, 13100);
  CHECK_EQ(result.committed.rows, 4);
  const auto stored = support::read_partition(directory / "epoch-3");
  CHECK_EQ(stored.calls.size(), 1);
  CHECK(stored.calls.count({2, 3}) == 1);
  CHECK_EQ(stored.meta_rows, 4);
}

// An aborted call leaves nothing behind: neither a visible row, nor chunks that are still to come,
// nor memory.
TEST(partition_forgets_a_call_whose_pieces_are_pending) {
  const TempDir directory;
  Bench bench;
  mld::Partition partition(options_in(directory));
  bench.chunk(1, 3, 0, 0, pattern(1, 6000));
  partition.add(bench.take());
  commit(partition);
  bench.chunk(1, 3, 0, 0, pattern(2, 6000));
  partition.add(bench.take());
  partition.forget_call(0);
  add_call(bench, partition, 1, {10});
  const mld::CommitResult result = commit(partition);
  CHECK_EQ(result.committed.rows, 4);
  CHECK_EQ(result.written_bytes, 10);  // the dead piece was not written
  std::string out(6000, '\0');
  CHECK(!partition.read_piece(0, 0, 0, out.data(), 6000));  // nothing of it is remembered
  partition.drop();
  mld::remove_tree(directory / "epoch-3");
  add_call(bench, partition, 0, {20});  // so its number means nothing any more
  CHECK_EQ(commit(partition).committed.rows, 4);
}
