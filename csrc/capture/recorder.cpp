#include "capture/recorder.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "ring/record.h"
#include "ring/slot_copy.h"
#include "writer/runtime.h"

namespace mld {
namespace {

// After its deadline a close still tries this long, so that close(0) of an idle tracer succeeds.
constexpr auto kLeastWait = std::chrono::milliseconds(200);
// The writer gives up on a full disk after stall_timeout too, counted from its first failure; its
// verdict says more than that of a waiter, so the waiter lets it come first.
constexpr auto kVerdictGrace = std::chrono::seconds(1);
constexpr auto kCopyPoll = std::chrono::microseconds(200);

std::int64_t compose_row_id(std::uint64_t rank, std::uint64_t attempt, std::uint64_t row) noexcept {
  return static_cast<std::int64_t>(rank << (kAttemptBits + kRowBits) | attempt << kRowBits | row);
}

Error closed_error() {
  return Error(ErrorKind::kTracerClosed, "the tracer is closed", "make a new tracer");
}

Error stream_capture_error() {
  return Error(ErrorKind::kStreamCapture,
               "a traced layer ran on a CUDA stream that is being captured into a graph",
               "call the model itself while capturing, and the tracer outside of it");
}

// Holds a count up while it lives. seq_cst on both sides PAIRS WITH close(): either close() sees
// the count, or the counted one sees closed_.
class CountGuard {
 public:
  explicit CountGuard(std::atomic<std::uint32_t>& count) : count_(count) {
    count_.fetch_add(1, std::memory_order_seq_cst);
  }
  ~CountGuard() { count_.fetch_sub(1, std::memory_order_seq_cst); }
  CountGuard(const CountGuard&) = delete;
  CountGuard& operator=(const CountGuard&) = delete;

 private:
  std::atomic<std::uint32_t>& count_;
};

// Counts the time of a wait however it ends.
class StallClock {
 public:
  explicit StallClock(Ledger& ledger) : ledger_(ledger) { ledger_.add_stall(); }
  ~StallClock() { ledger_.add_stall_time(static_cast<std::uint64_t>(elapsed().count())); }
  StallClock(const StallClock&) = delete;
  StallClock& operator=(const StallClock&) = delete;
  [[nodiscard]] std::chrono::nanoseconds elapsed() const { return Clock::now() - begin_; }

 private:
  Ledger& ledger_;
  const Clock::time_point begin_ = Clock::now();
};

}  // namespace

std::shared_ptr<Recorder> Recorder::open(const StoreUse& store, const RecorderOptions& options) {
  auto runtime = Runtime::acquire(options.ring_bytes, options.device);
  auto attempt = std::make_shared<AttemptState>(Runtime::next_attempt_id(), store, options);
  runtime->attach(attempt);
  return std::make_shared<Recorder>(std::move(runtime), std::move(attempt));
}

std::shared_ptr<Runtime> Recorder::runtime() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (runtime_ == nullptr) throw closed_error();
  return runtime_;
}

ThreadCall* Recorder::current_call() const noexcept {
  ThreadCall* call = last_call();
  return call != nullptr && call->state == ThreadCall::State::kOpen ? call : nullptr;
}

std::uint64_t Recorder::begin_call(std::int64_t epoch, std::uint32_t batch_size) {
  if (closed_.load(std::memory_order_acquire)) throw closed_error();
  auto ring_owner = runtime();
  if (attempt_->is_failed() && attempt_->options().on_error == OnError::kRaise) {
    attempt_->raise_failure();
  }
  ThreadCall& call = make_thread_call(attempt_->id(), shared_from_this());
  if (call.state == ThreadCall::State::kOpen) {
    throw Error(ErrorKind::kInvalidInput, "this thread is inside another call of the same tracer",
                "do not call a tracer from within the model that it traces");
  }
  call.begin(std::move(ring_owner), next_call_.fetch_add(1, std::memory_order_relaxed), epoch,
             batch_size);
  if (attempt_->is_failed()) call.fate = ThreadCall::Fate::kFailed;
  return call.number;
}

void Recorder::capture(ThreadCall& call, std::uint32_t column, const char* dtype,
                       const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes,
                       ByteSource& source, WaitHooks& hooks) {
  add_capture(call, column, dtype, dims, ndim, bytes);
  try {
    copy_pieces(call, bytes, source, hooks);
  } catch (...) {
    break_call(call);
    throw;
  }
}

// The user's forward may swallow what a capture threw; a call with half a capture must not be
// stored all the same.
void Recorder::break_call(ThreadCall& call) noexcept {
  call.fate = ThreadCall::Fate::kBroken;
  call.trouble = std::current_exception();
}

void Recorder::copy_pieces(ThreadCall& call, std::uint64_t bytes, ByteSource& source,
                           WaitHooks& hooks) {
  RecordHeader header = chunk_header(call);
  Runtime& runtime = *call.runtime;
  const std::uint64_t max_piece = runtime.max_piece_bytes();
  for (std::uint64_t offset = 0; offset < bytes && call.fate == ThreadCall::Fate::kStored;
       offset += max_piece) {
    header.payload_bytes = std::min(max_piece, bytes - offset);
    check_budget(call, header.payload_bytes, 0);
    Ring::Slot slot;
    if (!reserve(call, chunk_slot_bytes(header.payload_bytes), &slot, hooks)) return;
    Reservation<std::uint64_t> reservation(runtime.ring(), slot);
    const std::byte* from = source.borrow() + offset;
    std::memcpy(slot.data, &header, sizeof header);
    copy_to_slot(slot.data + sizeof header, from, header.payload_bytes);
    reservation.publish();
    runtime.note_published();
    call.pieces.push_back({slot.position, header.payload_bytes});
    ++call.captures[header.capture].pieces;
  }
}

bool Recorder::capture_device(ThreadCall& call, std::uint32_t column, const char* dtype,
                              const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes,
                              const DevicePlace& place, ByteSource& source, WaitHooks& hooks) {
  const StageResult result = call.runtime->stager().open(place);
  if (result == StageResult::kCapturing) throw stream_capture_error();
  if (result == StageResult::kUnavailable) return false;
  add_capture(call, column, dtype, dims, ndim, bytes);
  if (result == StageResult::kLost) call.fate = ThreadCall::Fate::kFailed;
  try {
    stage_pieces(call, bytes, place, source, hooks);
  } catch (...) {
    break_call(call);
    throw;
  }
  return true;
}

void Recorder::stage_pieces(ThreadCall& call, std::uint64_t bytes, const DevicePlace& place,
                            ByteSource& source, WaitHooks& hooks) {
  Runtime& runtime = *call.runtime;
  RecordHeader header = chunk_header(call);
  header.copy_device = static_cast<std::uint32_t>(place.device) + 1;
  const std::uint64_t max_piece = runtime.max_piece_bytes();
  for (std::uint64_t offset = 0; offset < bytes && call.fate == ThreadCall::Fate::kStored;
       offset += max_piece) {
    header.payload_bytes = std::min(max_piece, bytes - offset);
    check_budget(call, header.payload_bytes, 0);
    Ring::Slot slot;
    if (!reserve(call, chunk_slot_bytes(header.payload_bytes), &slot, hooks)) return;
    Reservation<std::uint64_t> reservation(runtime.ring(), slot);
    const std::byte* from = source.borrow() + offset;
    const StageResult result = runtime.stager().stage(place, from, slot.data + sizeof header,
                                                      header.payload_bytes, &header.copy_sequence);
    if (result == StageResult::kCapturing) throw stream_capture_error();
    if (result != StageResult::kStaged) {
      call.fate = ThreadCall::Fate::kFailed;
      return;
    }
    std::memcpy(slot.data, &header, sizeof header);
    reservation.publish();
    runtime.note_published();
    call.pieces.push_back(
        {slot.position, header.payload_bytes, place.device, header.copy_sequence});
    ++call.captures[header.capture].pieces;
  }
}

void Recorder::add_capture(ThreadCall& call, std::uint32_t column, const char* dtype,
                           const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes) {
  call.captures.push_back({column, dtype, static_cast<std::uint32_t>(call.dims.size()), ndim,
                           static_cast<std::uint32_t>(call.pieces.size()), 0, bytes});
  call.dims.insert(call.dims.end(), dims, dims + ndim);
  call.bytes += bytes;  // counted for lost calls too
}

RecordHeader Recorder::chunk_header(const ThreadCall& call) const noexcept {
  RecordHeader header{};
  header.kind = RecordKind::kChunk;
  header.attempt = attempt_->id();
  header.call = call.number;
  header.epoch = call.epoch;
  header.capture = static_cast<std::uint32_t>(call.captures.size() - 1);
  return header;
}

bool Recorder::reserve(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                       WaitHooks& hooks) {
  Ring& ring = call.runtime->ring();
  if (!ring.try_reserve(slot_bytes, slot) && !reserve_slow(call, slot_bytes, slot, hooks))
    return false;
  note_high_water(ring);
  return true;
}

bool Recorder::reserve_slow(ThreadCall& call, std::size_t slot_bytes, Ring::Slot* slot,
                            WaitHooks& hooks) {
  Runtime& runtime = *call.runtime;
  Ring& ring = runtime.ring();
  const RecorderOptions& options = attempt_->options();
  if (options.overflow == OverflowPolicy::kDiscard) {
    runtime.wake();
    return lose(call, LossCause::kRingFull);
  }
  if (options.overflow == OverflowPolicy::kRaise) {
    runtime.wake();
    throw Error(ErrorKind::kRingOverflow,
                "the ring of " + std::to_string(ring.capacity_bytes()) +
                    " bytes is full: " + std::to_string(ring.used_bytes()) +
                    " wait to be written and " + std::to_string(slot_bytes) + " more came",
                "raise TracerConfig.ring_bytes, or choose overflow=\"block\" or \"discard\"");
  }
  const StallClock stall(attempt_->ledger());
  for (;;) {
    const std::uint64_t seen = runtime.progress();
    if (ring.try_reserve(slot_bytes, slot)) return true;
    if (attempt_->is_failed()) {
      call.fate = ThreadCall::Fate::kFailed;
      return false;
    }
    if (stall.elapsed() >= attempt_->options().stall_timeout) {
      if (attempt_->options().on_error == OnError::kWarn) return lose(call, LossCause::kStall);
      throw Error(
          ErrorKind::kTraceStall,
          "the ring stayed full for stall_timeout_s=" +
              std::to_string(
                  std::chrono::duration<double>(attempt_->options().stall_timeout).count()) +
              ": the disk does not take what is recorded",
          "look at the disk, raise TracerConfig.stall_timeout_s, or choose overflow=\"discard\"");
    }
    runtime.wait_slice(seen, hooks);
  }
}

bool Recorder::lose(ThreadCall& call, LossCause cause) noexcept {
  call.fate = ThreadCall::Fate::kDiscarded;
  call.cause = cause;
  return false;
}

void Recorder::note_high_water(Ring& ring) noexcept {
  // relaxed: a statistic.
  const std::uint64_t used = ring.used_bytes();
  std::uint64_t seen = high_water_bytes_.load(std::memory_order_relaxed);
  while (used > seen &&
         !high_water_bytes_.compare_exchange_weak(seen, used, std::memory_order_relaxed)) {
  }
}

// Bytes of the call that the writer has stored already are part of disk_bytes().
void Recorder::check_budget(const ThreadCall& call, std::uint64_t more_bytes,
                            std::uint64_t other_bytes) const {
  const auto& max_bytes = attempt_->store().options().max_bytes;
  if (!max_bytes) return;
  const std::uint64_t tail = call.runtime->ring().tail();
  std::uint64_t own_bytes = more_bytes;
  for (const CapturePiece& piece : call.pieces) {
    if (piece.position >= tail) own_bytes += piece.bytes;
  }
  const std::uint64_t used = attempt_->store().disk_bytes() + other_bytes;
  if (used + own_bytes <= *max_bytes) return;
  throw Error(ErrorKind::kDiskBudget,
              "the trace takes " + std::to_string(used) + " bytes and this call " +
                  std::to_string(own_bytes) +
                  " more, above max_bytes=" + std::to_string(*max_bytes),
              "raise TracerConfig.max_bytes, set keep_epochs, or drop an epoch");
}

bool Recorder::end_call(std::string_view description, std::uint32_t rows,
                        std::uint32_t ground_truth_rows, WaitHooks& hooks) {
  ThreadCall* call = current_call();
  if (call == nullptr)
    throw Error(ErrorKind::kInvalidInput, "end_call without begin_call in this thread");
  const CountGuard ending(ending_);
  if (closed_.load(std::memory_order_seq_cst)) throw closed_error();
  Runtime& runtime = *call->runtime;
  const std::size_t slot_bytes = sizeof(RecordHeader) + description.size();
  if (slot_bytes > runtime.ring().max_slot_bytes() / 2) {
    throw Error(ErrorKind::kInvalidInput,
                "the description of the call takes " + std::to_string(description.size()) +
                    " bytes, too many for the ring",
                "record fewer columns a call, or raise TracerConfig.ring_bytes");
  }
  if (call->fate == ThreadCall::Fate::kBroken) std::rethrow_exception(call->trouble);
  if (call->fate == ThreadCall::Fate::kStored) {
    check_budget(*call, 0, attempt_->ledger().snapshot().bytes_in_flight);
  }
  Ring::Slot slot;
  if (call->fate != ThreadCall::Fate::kStored || !reserve(*call, slot_bytes, &slot, hooks)) {
    count_lost(*call, rows);
    return false;
  }
  Reservation<std::uint64_t> reservation(runtime.ring(), slot);
  RecordHeader header{};
  header.kind = RecordKind::kCall;
  header.attempt = attempt_->id();
  header.call = call->number;
  header.epoch = call->epoch;
  header.payload_bytes = description.size();
  header.rows = rows;
  header.ground_truth_rows = ground_truth_rows;
  header.first_row = compose_row_id(attempt_->store().options().rank, attempt_->options().attempt,
                                    next_row_.fetch_add(rows, std::memory_order_relaxed));
  header.call_bytes = call->bytes;
  std::memcpy(slot.data, &header, sizeof header);
  std::memcpy(slot.data + sizeof header, description.data(), description.size());
  attempt_->ledger().submit(rows, call->bytes);  // before the writer can count it as committed
  reservation.publish();
  runtime.note_published();
  call->end(ThreadCall::State::kEnded);
  return true;
}

void Recorder::count_lost(ThreadCall& call, std::uint64_t rows) {
  if (call.fate == ThreadCall::Fate::kFailed) {
    // With a device lost, and not the storage, earlier pieces may be stored.
    if (!call.pieces.empty() && !attempt_->is_failed()) note_loss(call, 0);
    attempt_->ledger().submit_failed(rows, call.bytes);
    call.end(ThreadCall::State::kEnded);
    if (attempt_->options().on_error == OnError::kRaise) attempt_->raise_failure();
    return;
  }
  note_loss(call, rows);
  attempt_->ledger().submit_discarded(rows, call.bytes, call.cause);
  call.end(ThreadCall::State::kEnded);
}

void Recorder::abort_call() {
  ThreadCall* call = current_call();
  if (call == nullptr) return;
  if (!call->pieces.empty()) note_loss(*call, 0);
  call->end(ThreadCall::State::kNone);
}

void Recorder::note_loss(const ThreadCall& call, std::uint64_t rows) {
  const Gap gap{call.number, call.number, rows, rows == 0 ? 0 : call.bytes,
                kLossCauseNames[static_cast<std::size_t>(call.cause)]};
  attempt_->note_loss({call.runtime->ring().head(), call.epoch, gap});
}

std::string Recorder::read_back(std::uint32_t capture, WaitHooks& hooks) {
  const ThreadCall* call = last_call();
  if (is_inert() || call == nullptr || !call->can_be_read_back() ||
      capture >= call->captures.size()) {
    throw Error(ErrorKind::kNotFound, "nothing was captured in this thread's last call");
  }
  const CaptureInfo& info = call->captures[capture];
  struct Result {
    std::string bytes;
    bool found = true;
  };
  const auto runtime = this->runtime();
  wait_for_copies(*call, info, *runtime, hooks);
  auto result = std::make_shared<Result>();
  result->bytes.resize(info.bytes);
  const auto first = call->pieces.begin() + info.first_piece;
  std::vector<CapturePiece> pieces(first, first + info.pieces);
  runtime->run_on_writer(
      [result, pieces = std::move(pieces), id = attempt_->id(), number = call->number,
       epoch = call->epoch, capture](Writer& writer) {
        std::size_t offset = 0;
        for (std::size_t piece = 0; piece < pieces.size() && result->found; ++piece) {
          result->found = writer.read_piece(id, epoch, number, capture, piece, pieces[piece],
                                            result->bytes.data() + offset);
          offset += pieces[piece].bytes;
        }
      },
      attempt_->options().stall_timeout, "reading back a capture", hooks);
  if (!result->found)
    throw Error(ErrorKind::kNotFound, "the last call's rows are gone: they were dropped or lost");
  return std::move(result->bytes);
}

// Until the bytes of a capture are in the ring.
void Recorder::wait_for_copies(const ThreadCall& call, const CaptureInfo& info, Runtime& runtime,
                               WaitHooks& hooks) const {
  const auto deadline = Clock::now() + attempt_->options().stall_timeout;
  const DeviceStager& stager = runtime.stager();
  for (std::uint32_t number = 0; number < info.pieces; ++number) {
    const CapturePiece& piece = call.pieces[info.first_piece + number];
    while (piece.device >= 0 && !stager.has_arrived(piece.device, piece.copy_sequence)) {
      if (stager.is_lost(piece.device) && !stager.has_arrived(piece.device, piece.copy_sequence)) {
        throw Error(ErrorKind::kNotFound, "the capture was lost with its CUDA device");
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

void Recorder::flush(std::optional<std::chrono::nanoseconds> timeout, WaitHooks& hooks) {
  const auto runtime = this->runtime();
  const std::uint64_t target = runtime->ring().head();
  const auto begin = Clock::now();
  auto last_progress = begin;
  std::uint64_t settled_before = attempt_->settled();
  for (;;) {
    const std::uint64_t seen = runtime->progress();
    const std::uint64_t settled = attempt_->settled();
    if (settled >= target || attempt_->is_failed()) break;
    const auto now = Clock::now();
    if (settled != settled_before) last_progress = now, settled_before = settled;
    const bool late =
        timeout ? now - begin >= *timeout
                : now - last_progress >= attempt_->options().stall_timeout + kVerdictGrace;
    if (late) {
      const Counters counters = attempt_->ledger().snapshot();
      throw Error(ErrorKind::kTraceStall,
                  "flush: " + std::to_string(counters.rows_in_flight) +
                      " rows are not committed after " +
                      std::to_string(std::chrono::duration<double>(now - begin).count()) + " s",
                  "look whether the disk is full or stalled, or give flush() more time");
    }
    runtime->wait_slice(seen, hooks);
  }
  attempt_->raise_failure();
  runtime->run_on_writer(
      [store = attempt_->shared_store()](Writer& writer) {
        writer.drain_all();  // gaps hold no ring memory, so nothing above has waited for them
        writer.write_status(*store, true);
      },
      timeout ? std::max<std::chrono::nanoseconds>(begin + *timeout - Clock::now(), kLeastWait)
              : attempt_->options().stall_timeout,
      "flush", hooks);
}

bool Recorder::close(std::chrono::nanoseconds timeout, WaitHooks& hooks) {
  if (is_inert() || closed_.exchange(true, std::memory_order_seq_cst)) return true;
  const auto deadline = Clock::now() + timeout;
  const auto left = [deadline] {
    return std::max<std::chrono::nanoseconds>(deadline - Clock::now(), kLeastWait);
  };
  try {
    wait_for_ending_calls(deadline, hooks);
    try {
      flush(left(), hooks);
    } catch (const StoreError&) {
      // Failed before: counted, and raised to whoever asks. What is left is to let go.
    }
    runtime()->run_on_writer([id = attempt_->id()](Writer& writer) { writer.detach(id); }, left(),
                             "close", hooks);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kTraceStall) {
      let_go();
      throw;
    }
    // The thread may sit in the kernel for ever; what it uses must outlive it.
    static_cast<void>(new std::shared_ptr<Recorder>(shared_from_this()));
    return false;
  } catch (...) {
    // A signal ended the wait: the next close() does it all.
    closed_.store(false, std::memory_order_release);
    throw;
  }
  let_go();
  return true;
}

// Other threads that were past their look at closed_ still hand their call over; it must come
// before the last flush.
void Recorder::wait_for_ending_calls(Clock::time_point deadline, WaitHooks& hooks) {
  const auto runtime = this->runtime();
  while (ending_.load(std::memory_order_seq_cst) != 0 && Clock::now() < deadline) {
    runtime->wait_slice(runtime->progress(), hooks);
  }
}

void Recorder::let_go() {
  // Destroyed at the end, without a lock: the last one stops the thread and unmaps the ring.
  std::shared_ptr<Runtime> runtime;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    runtime = std::move(runtime_);
  }
  attempt_->release_store();
}

}  // namespace mld
