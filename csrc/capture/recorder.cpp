#include "capture/recorder.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "capture/read_back.h"
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

// Counts a call as one that ends, while it lives. seq_cst on both sides PAIRS WITH close(): either
// close() sees the count, or the counted one sees closed_.
class EndingCall {
 public:
  EndingCall(std::atomic<std::uint32_t>& count, ThreadCall& call) : count_(count), call_(call) {
    count_.fetch_add(1, std::memory_order_seq_cst);
    call_.is_ending = true;
  }
  ~EndingCall() {
    call_.is_ending = false;
    count_.fetch_sub(1, std::memory_order_seq_cst);
  }
  EndingCall(const EndingCall&) = delete;
  EndingCall& operator=(const EndingCall&) = delete;

 private:
  std::atomic<std::uint32_t>& count_;
  ThreadCall& call_;
};

// The ways of a piece into its slot. Where the host waits in between, leave() comes before and
// enter() after; false ends the call.
struct HostWay {
  void leave() const noexcept {}
  [[nodiscard]] bool enter() const noexcept { return true; }
  [[nodiscard]] bool copy(const std::byte* from, std::byte* to,
                          const RecordHeader* header) const noexcept {
    copy_to_slot(to, from, header->payload_bytes);
    return true;
  }
};

// Enqueues, and says in the header which copy brings the payload.
class DeviceWay {
 public:
  explicit DeviceWay(StageSession& session) noexcept : session_(session) {}
  void leave() const noexcept { session_.leave(); }
  [[nodiscard]] bool enter() const {
    const StageResult result = session_.enter();
    if (result == StageResult::kCapturing) throw stream_capture_error();
    return result == StageResult::kStaged;
  }
  [[nodiscard]] bool copy(const std::byte* from, std::byte* to,
                          RecordHeader* header) const noexcept {
    header->copy_device = static_cast<std::uint32_t>(session_.device()) + 1;
    return session_.stage(from, to, header->payload_bytes, &header->copy_sequence) ==
           StageResult::kStaged;
  }

 private:
  StageSession& session_;
};

}  // namespace

std::shared_ptr<Recorder> Recorder::open(const StoreUse& store, const RecorderOptions& options) {
  auto runtime = Runtime::acquire(options.ring_bytes, options.device);
  auto attempt = std::make_shared<AttemptState>(Runtime::next_attempt_id(), store, options);
  auto recorder = std::make_shared<Recorder>(runtime, attempt);
  // If that takes too long it may still come later, and then what ~Recorder posts comes after it.
  runtime->attach(attempt);
  return recorder;
}

Recorder::~Recorder() {
  if (is_inert() || closed_.load(std::memory_order_acquire)) return;
  try {
    runtime_->post([id = attempt_->id()](Writer& writer) { writer.detach(id); });
  } catch (const std::bad_alloc&) {
    // The store stays locked until the process ends; close() is there to do better.
  }
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
                       ByteSource& source, WaitHooks& hooks, int device) {
  try {
    add_capture(call, column, dtype, dims, ndim, bytes, device);
    copy_pieces(call, bytes, source.borrow(), HostWay{}, source, hooks);
  } catch (...) {
    break_call(call);
    throw;
  }
}

bool Recorder::capture_device(ThreadCall& call, std::uint32_t column, const char* dtype,
                              const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes,
                              const DevicePlace& place, ByteSource& source, WaitHooks& hooks) {
  try {
    StageSession session(call.runtime->stager(), place);
    const std::byte* from = source.borrow();  // runs code of torch's, so before the session
    const DeviceWay way(session);
    const StageResult result = session.enter();
    if (result == StageResult::kUnavailable) return false;
    if (result == StageResult::kCapturing) throw stream_capture_error();
    add_capture(call, column, dtype, dims, ndim, bytes, place.device);
    if (result == StageResult::kLost) call.fate = ThreadCall::Fate::kFailed;
    copy_pieces(call, bytes, from, way, source, hooks);
    return true;
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

template <class Way>
void Recorder::copy_pieces(ThreadCall& call, std::uint64_t bytes, const std::byte* from,
                           const Way& way, ByteSource& source, WaitHooks& hooks) {
  Runtime& runtime = *call.runtime;
  RecordHeader header = chunk_header(call);
  const std::uint64_t max_piece = runtime.max_piece_bytes();
  for (std::uint64_t offset = 0; offset < bytes && call.fate == ThreadCall::Fate::kStored;
       offset += max_piece) {
    header.payload_bytes = std::min(max_piece, bytes - offset);
    check_budget(call, header.payload_bytes, 0);
    const std::size_t slot_bytes = chunk_slot_bytes(header.payload_bytes);
    Ring::Slot slot;
    const bool must_wait = !room_.try_take(call, slot_bytes, &slot);
    if (must_wait) {
      way.leave();
      if (!room_.take_slow(call, slot_bytes, &slot, hooks)) return;
    }
    Reservation<std::uint64_t> reservation(runtime.ring(), slot);
    if (must_wait) from = source.borrow();
    if ((must_wait && !way.enter()) ||
        !way.copy(from + offset, slot.data + sizeof header, &header)) {
      call.fate = ThreadCall::Fate::kFailed;
      return;
    }
    std::memcpy(slot.data, &header, sizeof header);
    reservation.publish();
    runtime.note_published();
    call.pieces.push_back({slot.position, header.payload_bytes,
                           static_cast<int>(header.copy_device) - 1, header.copy_sequence});
    ++call.captures[header.capture].pieces;
  }
}

void Recorder::add_capture(ThreadCall& call, std::uint32_t column, const char* dtype,
                           const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes,
                           int device) {
  const auto first_dim = static_cast<std::uint32_t>(call.dims.size());
  call.dims.insert(call.dims.end(), dims, dims + ndim);  // before what points there
  call.captures.push_back({column, dtype, first_dim, ndim,
                           static_cast<std::uint32_t>(call.pieces.size()), 0, bytes, device});
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
  const EndingCall ending(ending_, *call);
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
  if (call->fate != ThreadCall::Fate::kStored || !room_.take(*call, slot_bytes, &slot, hooks)) {
    count_lost(*call, rows);
    return false;
  }
  Reservation<std::uint64_t> reservation(runtime.ring(), slot);
  // Closed by a signal handler of this thread, while it waited for room: nobody reads it any more.
  if (closed_.load(std::memory_order_seq_cst) && has_let_go()) throw closed_error();
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
    // By its device: a gap. With the storage nothing can be written any more.
    if (!attempt_->is_failed()) note_loss(call, rows, kDeviceErrorCause);
    attempt_->ledger().submit_failed(rows, call.bytes);
    call.end(ThreadCall::State::kEnded);
    if (attempt_->options().on_error == OnError::kRaise) attempt_->raise_failure();
    return;
  }
  note_loss(call, rows, kLossCauseNames[static_cast<std::size_t>(call.cause)]);
  attempt_->ledger().submit_discarded(rows, call.bytes, call.cause);
  call.end(ThreadCall::State::kEnded);
}

void Recorder::abort_call() {
  ThreadCall* call = current_call();
  if (call == nullptr) return;
  try {
    if (!call->pieces.empty()) note_loss(*call, 0, "");
  } catch (const std::bad_alloc&) {
    // The writer keeps what it knows of the call: a few bytes, and nobody reads its chunks.
  }
  call->end(ThreadCall::State::kNone);
}

void Recorder::note_loss(const ThreadCall& call, std::uint64_t rows, const char* cause) {
  const Gap gap{call.number, call.number, rows, rows == 0 ? 0 : call.bytes, cause};
  attempt_->note_loss({call.runtime->ring().head(), call.epoch, gap});
}

std::string Recorder::read_back(std::uint32_t capture, WaitHooks& hooks) {
  const ThreadCall* call = last_call();
  if (is_inert() || call == nullptr || !call->can_be_read_back() ||
      capture >= call->captures.size()) {
    throw Error(ErrorKind::kNotFound, "nothing was captured in this thread's last call",
                "ask in the thread of the call, after a call that was recorded");
  }
  return read_capture(*runtime(), *attempt_, *call, capture, hooks);
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
    if (settled >= target) break;  // after a failure too: what is lost is counted when we return
    const auto now = Clock::now();
    if (settled != settled_before) last_progress = now, settled_before = settled;
    const bool late =
        timeout ? now - begin >= *timeout
                : now - last_progress >= attempt_->options().stall_timeout + kVerdictGrace;
    if (late) {
      attempt_->raise_failure();
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
// before the last flush. This thread's own waits for us, where a signal handler has called close().
void Recorder::wait_for_ending_calls(Clock::time_point deadline, WaitHooks& hooks) {
  const auto runtime = this->runtime();
  const ThreadCall* own = current_call();
  const std::uint32_t own_count = own != nullptr && own->is_ending ? 1 : 0;
  while (ending_.load(std::memory_order_seq_cst) > own_count && Clock::now() < deadline) {
    runtime->wait_slice(runtime->progress(), hooks);
  }
}

bool Recorder::has_let_go() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return runtime_ == nullptr;
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
