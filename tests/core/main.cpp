// `core_tests [FILTER]`: runs the tests whose names contain FILTER. The exit status is 0 if all
// passed; no test at all is a failure, too.
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include "check.h"

namespace {

bool passes(const check::Test& test) {
  check::failures.store(0, std::memory_order_relaxed);
  try {
    test.body();
  } catch (const check::Stop&) {
  } catch (const std::exception& error) {
    check::fail(test.file, test.line, std::string("unexpected exception: ") + error.what());
  }
  if (check::failures.load(std::memory_order_relaxed) == 0) return true;
  std::fprintf(stderr, "FAILED %s\n", test.name);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view filter = argc > 1 ? argv[1] : "";
  int passed = 0;
  int failed = 0;
  for (const check::Test& test : check::tests()) {
    if (std::string_view(test.name).find(filter) == std::string_view::npos) continue;
    ++(passes(test) ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
