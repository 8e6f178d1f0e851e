// The table of driver functions: what is looked up, and what is said when something is missing.
#include "device/cuda_driver.h"

#include <string>

#include "check.h"
#include "fake_cuda/fake_cuda_loader.h"

using mld::cuda::Driver;

TEST(cuda_driver_finds_every_function_in_its_present_version) {
  FAKE(fake_cuda_reset)(1, 1, FAKE_CUDA_STEPPED);
  std::string why = "not asked";
  const auto driver = Driver::load(MLD_FAKE_CUDA_LIBRARY, &why);
  REQUIRE(driver != nullptr);
  CHECK_EQ(why, "");
#define CHECK_FOUND(member, symbol, ...) \
  CHECK(reinterpret_cast<void*>(driver->member) == dlsym(fake_cuda::library(), symbol));
  MLD_CUDA_FUNCTIONS(CHECK_FOUND)
#undef CHECK_FOUND
  CHECK_EQ(FAKE(fake_cuda_calls)("cuInit"), 0);
  CHECK_EQ(driver->error_name(700), "CUDA_ERROR_ILLEGAL_ADDRESS");
}

TEST(cuda_driver_says_which_library_is_missing) {
  std::string why;
  CHECK(Driver::load("libno-such-driver.so.1", &why) == nullptr);
  CHECK(why.find("libno-such-driver.so.1") != std::string::npos);
}

TEST(cuda_driver_says_which_symbol_is_missing) {
  std::string why;
  CHECK(Driver::load("libc.so.6", &why) == nullptr);
  CHECK(why.find("cuGetErrorName") != std::string::npos);
}

TEST(cuda_driver_tells_lost_contexts_from_other_errors) {
  for (const int code : {4, 214, 700, 709, 710, 715, 716, 719, 999})
    CHECK(mld::cuda::is_sticky(code));
  for (const int code : {0, 1, 2, 3, 201, 400, 600, 712, 800, 801, 900, 906})
    CHECK(!mld::cuda::is_sticky(code));
}
