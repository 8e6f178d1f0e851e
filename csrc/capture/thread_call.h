// A thread's current call: what it has captured so far. Each thread has its own for each tracer, so
// calls of threads never meet, and a hook finds its call without a lock.
//
// Thread safety: a ThreadCall belongs to its thread.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "ledger.h"
#include "store/record_format.h"

namespace mld {

class Runtime;

struct CaptureInfo {
  std::uint32_t column;
  const char* dtype;              // static text: the torch name
  std::uint32_t first_dim, ndim;  // in ThreadCall::dims
  std::uint32_t first_piece, pieces;
  std::uint64_t bytes;
  int device;  // where the tensor lay: the CUDA device's index, or -1 for the host
};

struct CapturePiece {
  std::uint64_t position;  // in the ring
  std::uint64_t bytes;
  int device = -1;                  // whose copy brings the bytes; -1: they are there
  std::uint64_t copy_sequence = 0;  // its number
};

struct ThreadCall {
  enum class State { kNone, kOpen, kEnded };
  enum class Fate { kStored, kDiscarded, kFailed, kBroken };

  State state = State::kNone;
  Fate fate = Fate::kStored;
  LossCause cause = LossCause::kRingFull;  // when discarded
  bool is_ending = false;                  // in end_call()
  std::uint64_t number = 0;
  std::int64_t epoch = kNoEpoch;
  std::uint32_t batch_size = 0;
  std::uint64_t bytes = 0;
  std::exception_ptr trouble;  // when broken: what a capture threw, perhaps unseen by us since
  std::shared_ptr<Runtime> runtime;  // while open: another thread may close the recorder meanwhile
  // Keep their capacity from call to call.
  std::vector<CaptureInfo> captures;
  std::vector<std::int64_t> dims;
  std::vector<CapturePiece> pieces;

  void begin(std::shared_ptr<Runtime> new_runtime, std::uint64_t new_number, std::int64_t new_epoch,
             std::uint32_t new_batch_size);
  void end(State new_state);
  [[nodiscard]] bool can_be_read_back() const noexcept {
    return state != State::kNone && fate == Fate::kStored;
  }
};

// The calling thread's call of the recorder with this id; null if it never made one.
[[nodiscard]] ThreadCall* find_thread_call(std::uint32_t recorder_id) noexcept;
// The same, made if it is missing. `recorder` tells later when the entry is of no use any more.
[[nodiscard]] ThreadCall& make_thread_call(std::uint32_t recorder_id,
                                           const std::shared_ptr<const void>& recorder);

}  // namespace mld
