#include "store/page_loan.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace mld {
namespace {

thread_local PageLoans* t_loans = nullptr;

}  // namespace

PageLoans::PageLoans() noexcept { t_loans = this; }
PageLoans::~PageLoans() { t_loans = nullptr; }

void* PageLoans::take(std::size_t bytes) noexcept {
  if (offered_ == nullptr || bytes != offered_bytes_) return nullptr;
  try {
    lent_.push_back(offered_);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  return std::exchange(offered_, nullptr);
}

bool PageLoans::give_back(const void* memory) noexcept {
  if (returned_ < lent_.size() && lent_[returned_] == memory) {
    ++returned_;
    return true;
  }
  const auto found = std::find(lent_.begin(), lent_.end(), memory);
  if (found == lent_.end()) return false;
  *found = nullptr;
  return true;
}

}  // namespace mld

void* mld_lmdb_malloc(std::size_t bytes) {
  if (mld::t_loans != nullptr) {
    if (void* run = mld::t_loans->take(bytes)) return run;
  }
  return std::calloc(1, bytes);
}

void mld_lmdb_free(void* memory) {
  if (memory != nullptr && mld::t_loans != nullptr && mld::t_loans->give_back(memory)) return;
  std::free(memory);
}
