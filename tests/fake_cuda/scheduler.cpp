#include "fake_cuda/scheduler.h"

#include <chrono>
#include <utility>

namespace fake_cuda {
namespace {

thread_local const Operation* running = nullptr;

}  // namespace

const Operation* Scheduler::running_operation() { return running; }

void Scheduler::reset(std::uint64_t seed, Mode mode) {
  stop_worker();
  const Lock lock(mutex_);
  mode_ = mode;
  random_state_ = seed;
  eagerness_ = random() % 4;
  changeability_ = 1 + random() % 8;
  observes_words_ = true;
  busy_ = stopping_ = false;
  favourite_ = 0;
  schedule_hash_ = 14695981039346656037U;
  executed_ = host_ = VectorClock();
  words_.clear();
  streams_.clear();
  if (mode == Mode::kWorker) worker_ = std::thread([this] { work(); });
}

void Scheduler::stop_worker() {
  if (!worker_.joinable()) return;
  {
    const Lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  worker_.join();
}

std::uint64_t Scheduler::random() {  // splitmix64
  std::uint64_t value = (random_state_ += 0x9E3779B97F4A7C15);
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
  return value ^ (value >> 31);
}

Stream& Scheduler::add_stream(Context& context, bool is_blocking) {
  auto stream = std::make_unique<Stream>();
  stream->actor = streams_.size();
  stream->context = &context;
  stream->is_blocking = is_blocking;
  streams_.push_back(std::move(stream));
  return *streams_.back();
}

VectorClock Scheduler::order_of(const Stream& stream) const {
  VectorClock after = stream.clock;
  after.join(host_);
  if (stream.is_legacy) {
    for (const auto& other : streams_) {
      if (other->is_blocking && other->context == stream.context) after.join(other->clock);
    }
  } else if (stream.is_blocking) {
    after.join(stream.context->legacy->clock);
  }
  return after;
}

const Operation& Scheduler::enqueue(Stream& stream, Operation operation,
                                    const VectorClock* also_after) {
  operation.after = order_of(stream);
  if (also_after != nullptr) operation.after.join(*also_after);
  operation.count = operation.after.of(stream.actor) + 1;
  operation.clock = operation.after;
  operation.clock.set(stream.actor, operation.count);
  stream.clock = operation.clock;
  stream.queue.push_back(std::move(operation));
  changed_.notify_all();
  return stream.queue.back();
}

Stream* Scheduler::pick() {
  std::vector<Stream*> ready;
  for (const auto& stream : streams_) {
    if (stream->held || stream->context->error != kSuccess || stream->queue.empty()) continue;
    if (executed_.includes(stream->queue.front().after)) ready.push_back(stream.get());
  }
  if (ready.empty()) return nullptr;
  const std::uint64_t choice = random();
  if (choice % 8 >= changeability_) {
    for (Stream* stream : ready) {
      if (stream->actor == favourite_) return stream;
    }
  }
  Stream* const chosen = ready[(choice >> 8) % ready.size()];
  favourite_ = chosen->actor;
  return chosen;
}

bool Scheduler::execute_one(Lock& lock) {
  if (busy_) return false;
  Stream* const stream = pick();
  if (stream == nullptr) return false;
  const Operation operation = std::move(stream->queue.front());
  stream->queue.pop_front();
  if (operation.runs_unlocked) {
    // A host function is the host, and stands behind everything before it in its stream.
    if (operation.is_host_function) host_.join(operation.after);
    busy_ = true;
    lock.unlock();
    running = &operation;
    operation.effect();
    running = nullptr;
    lock.lock();
    busy_ = false;
  } else if (operation.effect) {
    operation.effect();
  }
  finish(*stream, operation);
  return true;
}

void Scheduler::finish(Stream& stream, const Operation& operation) {
  executed_.set(stream.actor, operation.count);
  schedule_hash_ = (schedule_hash_ ^ (stream.actor + 1)) * 1099511628211U;
  if (operation.word != 0) {
    words_[operation.word] = operation.clock;
    // From here on the host may see the word at any time, without telling us.
    if (observes_words_) host_.join(operation.clock);
  }
  changed_.notify_all();
}

void Scheduler::run_until_idle(Lock& lock) {
  while (busy_ || pick() != nullptr) {
    if (mode_ == Mode::kWorker || busy_) {
      changed_.wait(lock);
    } else {
      execute_one(lock);
    }
  }
}

void Scheduler::interleave(Lock& lock) {
  if (mode_ != Mode::kInterleaved) return;
  if (random() % 64 == 0) eagerness_ = random() % 4;
  std::uint64_t budget = 0;
  if (eagerness_ == 1) budget = random() % 8 == 0 ? random() % 4 : 0;
  if (eagerness_ == 2) budget = random() % 3;
  if (eagerness_ == 3) budget = random() % 8;
  while (budget-- > 0 && execute_one(lock)) {
  }
}

CUresult Scheduler::wait_for(const VectorClock& target, Lock& lock) {
  while (!executed_.includes(target)) {
    for (const auto& stream : streams_) {
      const bool needed = executed_.of(stream->actor) < target.of(stream->actor);
      if (needed && stream->context->error != kSuccess) return stream->context->error;
    }
    if (mode_ == Mode::kWorker || busy_) {
      changed_.wait(lock);
    } else if (!execute_one(lock)) {
      return kUnknown;
    }
  }
  host_.join(target);
  return kSuccess;
}

void Scheduler::break_context(Context& context, CUresult code) {
  context.error = code;
  changed_.notify_all();
}

void Scheduler::hold(Stream& stream, bool held) {
  stream.held = held;
  changed_.notify_all();
}

bool Scheduler::observe_word(std::uintptr_t word) {
  if (word == 0) {
    for (const auto& [address, clock] : words_) host_.join(clock);
    return !words_.empty();
  }
  const auto found = words_.find(word);
  if (found == words_.end()) return false;
  host_.join(found->second);
  return true;
}

void Scheduler::work() {
  Lock lock(mutex_);
  while (!stopping_) {
    if (!execute_one(lock)) {
      changed_.wait(lock);
      continue;
    }
    const std::uint64_t pause_us = random() % 4 == 0 ? random() % 100 : 0;
    lock.unlock();
    if (pause_us > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
    } else {
      std::this_thread::yield();
    }
    lock.lock();
  }
}

}  // namespace fake_cuda
