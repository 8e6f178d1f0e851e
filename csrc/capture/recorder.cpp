#include "capture/recorder.h"

#include <algorithm>
#include <cstring>

#include "capture/record.h"
#include "writer/runtime.h"

namespace mld {
namespace {

struct ThreadEntry {
  std::uint32_t recorder_id;
  std::weak_ptr<Recorder> recorder;
  std::unique_ptr<ThreadCall> call;
};

// One or two entries: the tracers that this thread has called and that still live.
thread_local std::vector<ThreadEntry> t_entries;

ThreadCall& call_of_this_thread(const std::shared_ptr<Recorder>& recorder) {
  for (ThreadEntry& entry : t_entries) {
    if (entry.recorder_id == recorder->id()) return *entry.call;
  }
  t_entries.erase(std::remove_if(t_entries.begin(), t_entries.end(),
                                 [](const ThreadEntry& entry) { return entry.recorder.expired(); }),
                  t_entries.end());
  t_entries.push_back({recorder->id(), recorder, std::make_unique<ThreadCall>()});
  return *t_entries.back().call;
}

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

void ThreadCall::begin(std::shared_ptr<Runtime> new_runtime, std::uint64_t new_number,
                       std::int64_t new_epoch, std::uint32_t new_batch_size) {
  state = State::kOpen;
  fate = Fate::kStored;
  runtime = std::move(new_runtime);
  number = new_number;
  epoch = new_epoch;
  batch_size = new_batch_size;
  bytes = 0;
  captures.clear();
  dims.clear();
  pieces.clear();
}

void ThreadCall::end(State new_state) {
  state = new_state;
  runtime.reset();
}

Recorder::Recorder(std::uint32_t id, std::shared_ptr<Runtime> runtime, const StoreUse& store,
                   const RecorderOptions& options)
    : id_(id),
      options_(options),
      store_(store.state()),
      runtime_(std::move(runtime)),
      use_(store) {}

std::shared_ptr<Recorder> Recorder::open(const StoreUse& store, const RecorderOptions& options) {
  auto runtime = Runtime::acquire(options.ring_bytes);
  auto recorder = std::make_shared<Recorder>(Runtime::next_recorder_id(), runtime, store, options);
  runtime->attach(recorder);
  return recorder;
}

std::shared_ptr<Runtime> Recorder::runtime() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (runtime_ == nullptr) throw closed_error();
  return runtime_;
}

std::size_t Recorder::ring_high_water_bytes() const noexcept {
  return high_water_bytes_.load(std::memory_order_relaxed);
}

ThreadCall* Recorder::last_call() noexcept {
  for (ThreadEntry& entry : t_entries) {
    if (entry.recorder_id == id_) return entry.call.get();
  }
  return nullptr;
}

ThreadCall* Recorder::current_call() noexcept {
  ThreadCall* call = last_call();
  return call != nullptr && call->state == ThreadCall::State::kOpen ? call : nullptr;
}

std::uint64_t Recorder::begin_call(std::int64_t epoch, std::uint32_t batch_size) {
  if (closed_.load(std::memory_order_acquire)) throw closed_error();
  auto ring_owner = runtime();
  if (is_failed() && options_.on_error == OnError::kRaise) raise_failure();
  ThreadCall& call = call_of_this_thread(shared_from_this());
  if (call.state == ThreadCall::State::kOpen) {
    throw Error(ErrorKind::kInvalidInput, "this thread is inside another call of the same tracer",
                "do not call a tracer from within the model that it traces");
  }
  call.begin(std::move(ring_owner), next_call_.fetch_add(1, std::memory_order_relaxed), epoch,
             batch_size);
  if (is_failed()) call.fate = ThreadCall::Fate::kFailed;
  return call.number;
}

void Recorder::capture(ThreadCall& call, std::uint32_t column, const char* dtype,
                       const std::int64_t* dims, std::uint32_t ndim, std::uint64_t bytes,
                       ByteSource& source, WaitHooks& hooks) {
  const auto number = static_cast<std::uint32_t>(call.captures.size());
  call.captures.push_back({column, dtype, static_cast<std::uint32_t>(call.dims.size()), ndim,
                           static_cast<std::uint32_t>(call.pieces.size()), 0, bytes});
  call.dims.insert(call.dims.end(), dims, dims + ndim);
  call.bytes += bytes;  // counted for lost calls too
  RecordHeader header{};
  header.kind = RecordKind::kChunk;
  header.recorder = id_;
  header.call = call.number;
  header.epoch = call.epoch;
  header.capture = number;
  Runtime& runtime = *call.runtime;
  const std::uint64_t max_piece = runtime.max_piece_bytes();
  for (std::uint64_t offset = 0; offset < bytes && call.fate == ThreadCall::Fate::kStored;
       offset += max_piece) {
    header.payload_bytes = std::min(max_piece, bytes - offset);
    Ring::Slot slot;
    if (!reserve(call, sizeof header + header.payload_bytes, &slot, hooks)) return;
    Reservation<std::uint64_t> reservation(runtime.ring(), slot);
    const std::byte* from = source.borrow() + offset;
    std::memcpy(slot.data, &header, sizeof header);
    std::memcpy(slot.data + sizeof header, from, header.payload_bytes);
    reservation.publish();
    runtime.note_published();
    call.pieces.push_back({slot.position, header.payload_bytes});
    ++call.captures[number].pieces;
  }
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
  if (options_.overflow == OverflowPolicy::kDiscard) {
    runtime.wake();
    return lose(call, LossCause::kRingFull);
  }
  if (options_.overflow == OverflowPolicy::kRaise) {
    runtime.wake();
    throw Error(ErrorKind::kRingOverflow,
                "the ring of " + std::to_string(ring.capacity_bytes()) +
                    " bytes is full: " + std::to_string(ring.used_bytes()) +
                    " wait to be written and " + std::to_string(slot_bytes) + " more came",
                "raise TracerConfig.ring_bytes, or choose overflow=\"block\" or \"discard\"");
  }
  const StallClock stall(ledger_);
  for (;;) {
    const std::uint64_t seen = runtime.progress();
    if (ring.try_reserve(slot_bytes, slot)) return true;
    if (is_failed()) {
      call.fate = ThreadCall::Fate::kFailed;
      return false;
    }
    if (stall.elapsed() >= options_.stall_timeout) {
      if (options_.on_error == OnError::kWarn) return lose(call, LossCause::kStall);
      throw Error(
          ErrorKind::kTraceStall,
          "the ring stayed full for stall_timeout_s=" +
              std::to_string(std::chrono::duration<double>(options_.stall_timeout).count()) +
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

void Recorder::check_budget(const ThreadCall& call) const {
  const auto& max_bytes = store_->options().max_bytes;
  if (!max_bytes) return;
  const std::uint64_t used = store_->disk_bytes() + ledger_.snapshot().bytes_in_flight;
  if (used + call.bytes <= *max_bytes) return;
  throw Error(ErrorKind::kDiskBudget,
              "the trace takes " + std::to_string(used) + " bytes and this call " +
                  std::to_string(call.bytes) +
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
  if (call->fate == ThreadCall::Fate::kStored) check_budget(*call);
  Ring::Slot slot;
  if (call->fate != ThreadCall::Fate::kStored || !reserve(*call, slot_bytes, &slot, hooks)) {
    count_lost(*call, rows);
    return false;
  }
  Reservation<std::uint64_t> reservation(runtime.ring(), slot);
  RecordHeader header{};
  header.kind = RecordKind::kCall;
  header.recorder = id_;
  header.call = call->number;
  header.epoch = call->epoch;
  header.payload_bytes = description.size();
  header.rows = rows;
  header.ground_truth_rows = ground_truth_rows;
  header.first_row = compose_row_id(store_->options().rank, options_.attempt,
                                    next_row_.fetch_add(rows, std::memory_order_relaxed));
  header.call_bytes = call->bytes;
  std::memcpy(slot.data, &header, sizeof header);
  std::memcpy(slot.data + sizeof header, description.data(), description.size());
  ledger_.submit(rows, call->bytes);  // before the writer can count it as committed
  reservation.publish();
  runtime.note_published();
  call->end(ThreadCall::State::kEnded);
  return true;
}

void Recorder::count_lost(ThreadCall& call, std::uint64_t rows) {
  if (call.fate == ThreadCall::Fate::kFailed) {
    ledger_.submit_failed(rows, call.bytes);
    call.end(ThreadCall::State::kEnded);
    if (options_.on_error == OnError::kRaise) raise_failure();
    return;
  }
  note_loss(call, rows);
  ledger_.submit_discarded(rows, call.bytes, call.cause);
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
  const std::lock_guard<std::mutex> lock(mutex_);
  losses_.push_back({call.runtime->ring().head(), call.epoch, gap});
}

void Recorder::take_losses(std::uint64_t position, std::vector<LossNote>* notes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto split =
      std::stable_partition(losses_.begin(), losses_.end(),
                            [position](const LossNote& note) { return note.position <= position; });
  notes->assign(losses_.begin(), split);
  losses_.erase(losses_.begin(), split);
}

void Recorder::fail(const StoreError& error) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_) failure_ = error;
  }
  failed_.store(true, std::memory_order_release);
}

void Recorder::raise_failure() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_) return;
  throw StoreError(failure_->code(),
                   std::string("the trace cannot be written any more: ") + failure_->what(),
                   failure_->hint());
}

std::string Recorder::read_back(std::uint32_t capture, WaitHooks& hooks) {
  const ThreadCall* call = last_call();
  if (is_inert() || call == nullptr || call->state == ThreadCall::State::kNone ||
      call->fate != ThreadCall::Fate::kStored || capture >= call->captures.size()) {
    throw Error(ErrorKind::kNotFound, "nothing was captured in this thread's last call");
  }
  const CaptureInfo& info = call->captures[capture];
  struct Result {
    std::string bytes;
    bool found = true;
  };
  const auto runtime = this->runtime();
  auto result = std::make_shared<Result>();
  result->bytes.resize(info.bytes);
  const auto first = call->pieces.begin() + info.first_piece;
  std::vector<CapturePiece> pieces(first, first + info.pieces);
  runtime->run_on_writer(
      [result, pieces = std::move(pieces), id = id_, number = call->number, epoch = call->epoch,
       capture](Writer& writer) {
        std::size_t offset = 0;
        for (std::size_t piece = 0; piece < pieces.size() && result->found; ++piece) {
          result->found = writer.read_piece(id, epoch, number, capture, piece, pieces[piece],
                                            result->bytes.data() + offset);
          offset += pieces[piece].bytes;
        }
      },
      options_.stall_timeout, "reading back a capture", hooks);
  if (!result->found)
    throw Error(ErrorKind::kNotFound, "the last call's rows are gone: they were dropped or lost");
  return std::move(result->bytes);
}

void Recorder::flush(std::optional<std::chrono::nanoseconds> timeout, WaitHooks& hooks) {
  const auto runtime = this->runtime();
  const std::uint64_t target = runtime->ring().head();
  const auto begin = Clock::now();
  auto last_progress = begin;
  std::uint64_t settled_before = settled_.load(std::memory_order_acquire);
  for (;;) {
    const std::uint64_t seen = runtime->progress();
    const std::uint64_t settled = settled_.load(std::memory_order_acquire);
    if (settled >= target || is_failed()) break;
    const auto now = Clock::now();
    if (settled != settled_before) last_progress = now, settled_before = settled;
    const bool late = timeout ? now - begin >= *timeout
                              : now - last_progress >= options_.stall_timeout + kVerdictGrace;
    if (late) {
      const Counters counters = ledger_.snapshot();
      throw Error(ErrorKind::kTraceStall,
                  "flush: " + std::to_string(counters.rows_in_flight) +
                      " rows are not committed after " +
                      std::to_string(std::chrono::duration<double>(now - begin).count()) + " s",
                  "look whether the disk is full or stalled, or give flush() more time");
    }
    runtime->wait_slice(seen, hooks);
  }
  raise_failure();
  runtime->run_on_writer(
      [store = store_](Writer& writer) {
        writer.drain_all();  // gaps hold no ring memory, so nothing above has waited for them
        writer.write_status(*store, true);
      },
      options_.stall_timeout, "flush", hooks);
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
    runtime()->run_on_writer([id = id_](Writer& writer) { writer.detach(id); }, left(), "close",
                             hooks);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kTraceStall) {
      let_go();
      throw;
    }
    // The thread may sit in the kernel for ever; what it uses must outlive it.
    static_cast<void>(new std::shared_ptr<Recorder>(shared_from_this()));
    return false;
  } catch (...) {
    closed_.store(
        false, std::memory_order_release);  // a signal ended the wait: the next close() does it all
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
  // Destroyed outside of the lock: the last one stops the thread and unmaps the ring.
  std::shared_ptr<Runtime> runtime;
  StoreUse use;
  const std::lock_guard<std::mutex> lock(mutex_);
  runtime = std::move(runtime_);
  use = std::move(use_);
}

}  // namespace mld
