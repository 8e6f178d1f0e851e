// The harness itself: a check that cannot fail would make every other test worthless.
#include "check.h"

#include <cstdint>
#include <stdexcept>

namespace {

// Runs `body` quietly and returns how many checks failed in it, without failing the test around it.
template <typename Body>
int failures_of(Body body) {
  const int before = check::failures.exchange(0);
  std::FILE* const output = std::exchange(check::output, nullptr);
  try {
    body();
  } catch (const check::Stop&) {
  }
  check::output = output;
  return check::failures.exchange(before);
}

}  // namespace

TEST(check_counts_what_is_false) {
  CHECK_EQ(failures_of([] { CHECK(1 == 1); }), 0);
  CHECK_EQ(failures_of([] { CHECK(1 == 2); }), 1);
  CHECK_EQ(failures_of([] { CHECK_EQ(std::string("a"), "b"); }), 1);
  CHECK_EQ(failures_of([] { CHECK_THROWS(std::runtime_error, 1 + 1); }), 1);
  CHECK_EQ(failures_of([] { CHECK_THROWS(std::runtime_error, throw std::logic_error("x")); }), 1);
  CHECK_EQ(failures_of([] {
             REQUIRE(false);
             CHECK(false);
           }),
           1);
}

TEST(equality_compares_values_across_signs) {
  CHECK_EQ(std::size_t{3}, 3);
  CHECK_EQ(failures_of([] { CHECK_THROWS(std::logic_error, throw std::logic_error("x")); }), 0);
  CHECK(!std::cmp_equal(-1, ~0u));
}

TEST(values_are_shown_readably) {
  CHECK_EQ(check::show(std::uint8_t{7}), "7");
  CHECK_EQ(check::show(std::vector<int>{1, 2}), "{1, 2}");
  CHECK_EQ(check::show(std::string("a")), "\"a\"");
  CHECK_EQ(check::show(true), "true");
}
