// The law of the counters, at every moment that anybody can see.
#include "ledger.h"

#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "support.h"

using mld::Ledger;
using mld::LossCause;

TEST(ledger_moves_a_call_from_flight_to_where_it_ended) {
  Ledger ledger;
  ledger.submit(8, 800);
  ledger.submit(4, 400);
  ledger.submit(2, 200);
  CHECK_EQ(ledger.snapshot().rows_in_flight, 14);
  ledger.commit(8, 800);
  ledger.fail(4, 400);
  ledger.drop(2, 200);
  ledger.submit_discarded(16, 1600, LossCause::kStall);
  ledger.submit_discarded(1, 100, LossCause::kRingFull);
  ledger.submit_failed(32, 3200);
  const mld::Counters c = ledger.snapshot();
  CHECK_EQ(c.rows_submitted, 63);
  CHECK_EQ(c.rows_committed, 8);
  CHECK_EQ(c.rows_failed, 36);
  CHECK_EQ(c.rows_discarded, 19);
  CHECK_EQ(c.rows_in_flight, 0);
  CHECK_EQ(c.bytes_in_flight, 0);
  CHECK_EQ(c.bytes_discarded, 1900);
  CHECK_EQ(c.rows_discarded_by_cause[0], 1);
  CHECK_EQ(c.rows_discarded_by_cause[1], 16);
  CHECK_EQ(c.rows_discarded_by_cause[2], 2);
  CHECK(support::is_conserved(c));
}

TEST(ledger_obeys_its_law_at_every_moment_under_threads) {
  Ledger ledger;
  std::atomic<bool> stop{false};
  std::atomic<int> looks{0};
  std::thread watcher([&] {
    do {
      if (!support::is_conserved(ledger.snapshot()))
        check::fail(__FILE__, __LINE__, "the law was broken");
      ++looks;
    } while (!stop);
  });
  std::vector<std::thread> workers;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    workers.emplace_back([&ledger, seed] {
      support::Random random(seed);
      for (int i = 0; i < 20000; ++i) {
        const std::uint64_t rows = random.below(100), bytes = random.below(10000);
        const std::uint64_t fate = random.below(6);
        if (fate < 4) ledger.submit(rows, bytes);
        if (fate == 0) ledger.commit(rows, bytes);
        if (fate == 1) ledger.fail(rows, bytes);
        if (fate == 2) ledger.drop(rows, bytes);
        if (fate == 4) ledger.submit_discarded(rows, bytes, LossCause::kRingFull);
        if (fate == 5) ledger.submit_failed(rows, bytes);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  stop = true;
  watcher.join();
  CHECK(looks > 0);
  CHECK(support::is_conserved(ledger.snapshot()));
  CHECK(ledger.snapshot().rows_in_flight > 0);
}
