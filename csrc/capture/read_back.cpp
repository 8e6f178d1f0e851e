#include "capture/read_back.h"

#include <chrono>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "clock.h"
#include "writer/runtime.h"

namespace mld {
namespace {

constexpr auto kCopyPoll = std::chrono::microseconds(200);

// Until the bytes are in the ring.
void wait_for_copies(const std::vector<CapturePiece>& pieces, const DeviceStager& stager,
                     std::chrono::nanoseconds patience, WaitHooks& hooks) {
  const auto deadline = Clock::now() + patience;
  for (const CapturePiece& piece : pieces) {
    while (piece.device >= 0 && !stager.has_arrived(piece.device, piece.copy_sequence)) {
      if (stager.is_lost(piece.device) && !stager.has_arrived(piece.device, piece.copy_sequence)) {
        throw Error(ErrorKind::kNotFound, "the capture was lost with its CUDA device",
                    "look at the device's own error");
      }
      if (Clock::now() >= deadline) {
        throw Error(ErrorKind::kTraceStall, "a capture has not arrived from its CUDA device",
                    "look whether the device still works, or raise TracerConfig.stall_timeout_s");
      }
      hooks.before_slice();
      std::this_thread::sleep_for(kCopyPoll);
      hooks.after_slice();
    }
  }
}

}  // namespace

std::string read_capture(Runtime& runtime, const AttemptState& attempt, const ThreadCall& call,
                         std::uint32_t capture, WaitHooks& hooks) {
  const CaptureInfo& info = call.captures[capture];
  const std::chrono::nanoseconds patience = attempt.options().stall_timeout;
  const auto first = call.pieces.begin() + info.first_piece;
  std::vector<CapturePiece> pieces(first, first + info.pieces);
  wait_for_copies(pieces, runtime.stager(), patience, hooks);
  struct Result {
    std::string bytes;
    bool found = true;
  };
  auto result = std::make_shared<Result>();
  result->bytes.resize(info.bytes);
  runtime.run_on_writer(
      [result, pieces = std::move(pieces), id = attempt.id(), number = call.number,
       epoch = call.epoch, capture](Writer& writer) {
        std::size_t offset = 0;
        for (std::size_t piece = 0; piece < pieces.size() && result->found; ++piece) {
          result->found = writer.read_piece(id, epoch, number, capture, piece, pieces[piece],
                                            result->bytes.data() + offset);
          offset += pieces[piece].bytes;
        }
      },
      patience, "reading back a capture", hooks);
  if (!result->found)
    throw Error(ErrorKind::kNotFound, "the last call's rows are gone: they were dropped or lost",
                "ask before the drop, or look at stats() for lost rows");
  return std::move(result->bytes);
}

}  // namespace mld
