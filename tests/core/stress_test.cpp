// All of it at once, seeded: four producers, two recorders on two stores, alternating epochs, sizes
// from nothing to three pieces, aborts, drops in between; then every byte is read back against what
// the producers remember.
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "store/crc32c.h"
#include "support.h"
#include "trace_fixture.h"

namespace {

using namespace std::chrono_literals;
using support::pattern;
using support::Random;
using support::Trace;

constexpr std::int64_t kEpochs = 5;
constexpr std::int64_t kDroppedEpoch = 4;  // the last one is dropped again and again

struct Sent {
  std::int64_t epoch = 0;
  std::uint32_t rows = 0;
  std::vector<std::pair<std::uint64_t, std::uint32_t>> captures;  // bytes, crc
};

// One store with its recorder, and what was handed over to it.
struct Side {
  explicit Side(const mld::RecorderOptions& options) : trace(options) {}

  void remember(std::uint64_t call, Sent sent) {
    const std::lock_guard<std::mutex> lock(mutex);
    taken.emplace(call, std::move(sent));
  }

  Trace trace;
  std::mutex mutex;
  std::map<std::uint64_t, Sent> taken;  // protected by mutex; by call number
};

void one_call(Side& side, Random& random, std::uint64_t largest_piece, std::uint64_t* aborted) {
  mld::Recorder& recorder = *side.trace.recorder;
  Sent sent;
  sent.epoch = static_cast<std::int64_t>(random.below(kEpochs));
  sent.rows = static_cast<std::uint32_t>(1 + random.below(9));
  const std::uint64_t number = recorder.begin_call(sent.epoch, sent.rows);
  for (std::uint64_t captures = random.below(5); captures > 0; --captures) {
    const std::uint64_t scale = random.below(8) == 0   ? 3 * largest_piece
                                : random.below(2) == 0 ? 200
                                                       : 9000;
    const std::string bytes = pattern(random.next(), random.below(scale + 1));
    sent.captures.emplace_back(bytes.size(), mld::crc32c(bytes.data(), bytes.size()));
    support::capture(recorder, static_cast<std::uint32_t>(sent.captures.size()), bytes);
  }
  if (random.below(10) == 0) {
    recorder.abort_call();
    ++*aborted;
  } else if (support::end_call(recorder, sent.rows, random.below(2) == 0 ? sent.rows : 0)) {
    side.remember(number, std::move(sent));
  }
}

void check_call(const support::StoredCall& stored, const Sent& sent) {
  CHECK_EQ(stored.identity.epoch, sent.epoch);
  CHECK_EQ(stored.identity.rows, sent.rows);
  for (std::uint32_t capture = 0; capture < sent.captures.size(); ++capture) {
    const auto& [bytes, crc] = sent.captures[capture];
    const auto found = stored.captures.find(capture);
    const std::string& text = found == stored.captures.end() ? std::string() : found->second;
    CHECK_EQ(text.size(), bytes);
    CHECK_EQ(mld::crc32c(text.data(), text.size()), crc);
  }
}

// Every taken call is on disk once, or was dropped and counted; nothing else is there.
void check_side(Side& side, std::uint64_t dropped_from_disk) {
  const mld::Counters counters = side.trace.counters();
  CHECK(support::is_conserved(counters));
  CHECK_EQ(counters.rows_in_flight, 0);
  CHECK_EQ(counters.rows_failed, 0);
  std::uint64_t rows_on_disk = 0, rows_in_totals = 0, gap_rows = 0;
  std::set<std::uint64_t> found;
  for (const auto& [name, partition] : support::read_rank(side.trace.directory.path())) {
    for (const auto& [key, call] : partition.calls) {
      const auto sent = side.taken.find(key.second);
      if (sent == side.taken.end()) {
        check::fail(__FILE__, __LINE__,
                    "a call that nobody handed over: " + std::to_string(key.second));
        continue;
      }
      CHECK(found.insert(key.second).second);
      check_call(call, sent->second);
      rows_on_disk += call.identity.rows;
    }
    rows_in_totals += partition.meta_rows;
    for (const support::StoredGap& gap : partition.gaps) gap_rows += gap.rows;
    if (name != "epoch-" + std::to_string(kDroppedEpoch))
      CHECK_EQ(partition.headers, partition.calls.size() + partition.gaps.size());
  }
  for (const auto& [number, sent] : side.taken) {
    if (sent.epoch != kDroppedEpoch) CHECK_EQ(found.count(number), 1);
  }
  CHECK_EQ(rows_in_totals, rows_on_disk);
  CHECK_EQ(counters.rows_committed, rows_on_disk + dropped_from_disk);
  const std::uint64_t ring_full =
      counters.rows_discarded_by_cause[static_cast<std::size_t>(mld::LossCause::kRingFull)];
  CHECK(gap_rows <= ring_full);  // gaps of the dropped epoch went with it
  if (side.trace.recorder->attempt().options().overflow == mld::OverflowPolicy::kBlock)
    CHECK_EQ(ring_full, 0);
}

void run(std::uint64_t seed, std::chrono::milliseconds duration) {
  mld::RecorderOptions blocking = Trace::eager(), discarding = Trace::eager();
  blocking.ring_bytes = std::size_t{256} << 10;
  blocking.commit_interval = 5ms;
  discarding.overflow = mld::OverflowPolicy::kDiscard;
  discarding.attempt = 3;
  std::vector<std::unique_ptr<Side>> sides;
  sides.push_back(std::make_unique<Side>(blocking));
  sides.push_back(std::make_unique<Side>(discarding));
  const std::uint64_t largest_piece = mld::Runtime::current()->max_piece_bytes();

  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> aborted{0};
  std::vector<std::thread> producers;
  for (std::uint64_t producer = 0; producer < 4; ++producer) {
    producers.emplace_back([&, producer] {
      Random random(seed * 100 + producer);
      std::uint64_t aborts = 0;
      while (!stop) one_call(*sides[random.below(2)], random, largest_piece, &aborts);
      aborted += aborts;
    });
  }
  std::uint64_t dropped_from_disk[2] = {0, 0};
  const auto end = mld::Clock::now() + duration;
  for (std::size_t turn = 0; mld::Clock::now() < end; ++turn) {
    std::this_thread::sleep_for(40ms);
    CHECK(support::is_conserved(sides[turn % 2]->trace.counters()));
    dropped_from_disk[turn % 2] += sides[turn % 2]->trace.drop(kDroppedEpoch).rows;
  }
  stop = true;
  for (std::thread& producer : producers) producer.join();
  CHECK(aborted > 0);
  for (std::size_t i = 0; i < sides.size(); ++i) {
    support::flush(*sides[i]->trace.recorder);
    CHECK(sides[i]->trace.counters().rows_committed > 100);
    check_side(*sides[i], dropped_from_disk[i]);
    CHECK(support::close(*sides[i]->trace.recorder));
    check_side(*sides[i], dropped_from_disk[i]);
  }
}

}  // namespace

TEST(stress_everything_at_once_and_every_byte_is_accounted_for) {
  for (const std::uint64_t seed : {1, 2}) {
    run(seed, 1500ms);
    std::fprintf(
        stderr, "%s",
        check::failures == 0 ? "" : ("stress seed " + std::to_string(seed) + "\n").c_str());
  }
  CHECK_EQ(support::core_threads(), 0);
}
