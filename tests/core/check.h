// The test harness of the core: tests register themselves by name, a failed check prints where and
// with which values.
//
//   TEST(ring_wraps_at_every_offset) { CHECK_EQ(ring.used_bytes(), 0); }
//
// CHECK, CHECK_EQ and CHECK_THROWS count a failure and go on; REQUIRE ends the test, so it belongs
// to the test's own thread only. The others may be used from any thread.
#pragma once

#include <atomic>
#include <concepts>
#include <cstdio>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
  const char* file;
  int line;
};

struct Stop {};  // thrown by REQUIRE

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline std::atomic<int> failures{0};  // failed checks of the running test
inline std::FILE* output = stderr;    // where they are reported; nullptr: nowhere

struct Registration {
  explicit Registration(const Test& test) { tests().push_back(test); }
};

template <typename T>
std::string show(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_same_v<T, bool>) {
    out << (value ? "true" : "false");
  } else if constexpr (std::is_enum_v<T>) {
    out << +static_cast<std::underlying_type_t<T>>(value);
  } else if constexpr (std::is_convertible_v<T, std::string_view>) {
    out << '"' << std::string_view(value) << '"';
  } else if constexpr (std::is_integral_v<T>) {
    out << +value;  // a byte is a number here, not a character
  } else if constexpr (requires { out << value; }) {
    out << value;
  } else if constexpr (requires { value.begin() != value.end(); }) {
    for (const auto& item : value) out << (out.tellp() > 0 ? ", " : "{") << show(item);
    out << (out.tellp() > 0 ? "}" : "{}");
  } else {
    out << "(" << sizeof(value) << " bytes)";
  }
  return out.str();
}

inline void fail(const char* file, int line, const std::string& what) {
  failures.fetch_add(
      1, std::memory_order_relaxed);  // relaxed: read after the test's threads were joined
  if (output) std::fprintf(output, "%s:%d: %s\n", file, line, what.c_str());
}

[[noreturn]] inline void stop(const char* file, int line, const std::string& what) {
  fail(file, line, what);
  throw Stop();
}

template <typename T>
concept Number = std::integral<T> && !std::same_as<T, bool> && !std::same_as<T, char>;

template <typename A, typename B>
void check_equal(const A& actual, const B& expected, const char* text, const char* file, int line) {
  bool equal = false;
  if constexpr (Number<A> && Number<B>) {
    equal = std::cmp_equal(actual, expected);  // compares values, whatever the signs of the types
  } else {
    equal = actual == expected;
  }
  if (equal) return;
  fail(file, line, std::string(text) + " is " + show(actual) + ", expected " + show(expected));
}

template <typename Expected, typename Body>
void check_throws(Body body, const char* text, const char* file, int line) {
  try {
    body();
    fail(file, line, std::string("nothing thrown: ") + text);
  } catch (const Expected&) {
  } catch (...) {
    fail(file, line, std::string("another type thrown: ") + text);
  }
}

}  // namespace check

#define TEST(name)                                                                             \
  static void test_##name();                                                                   \
  static const check::Registration register_##name({#name, &test_##name, __FILE__, __LINE__}); \
  static void test_##name()
#define CHECK(condition) \
  ((condition) ? void() : check::fail(__FILE__, __LINE__, "CHECK(" #condition ")"))
#define REQUIRE(condition) \
  ((condition) ? void() : check::stop(__FILE__, __LINE__, "REQUIRE(" #condition ")"))
#define CHECK_EQ(actual, expected) \
  check::check_equal((actual), (expected), #actual, __FILE__, __LINE__)
#define CHECK_THROWS(type, expression)                                                      \
  check::check_throws<type>([&] { static_cast<void>(expression); }, #expression ", " #type, \
                            __FILE__, __LINE__)
