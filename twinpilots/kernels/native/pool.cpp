#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include "sync.h"

namespace tp {

static constexpr int64_t COUNT_LIMIT = 1 << 20;
static constexpr int64_t SPIN_NS = 60'000;
static uint64_t next_of(uint64_t ticket) { return ticket & (COUNT_LIMIT - 1); }
static uint64_t count_of(uint64_t ticket) { return ticket >> 20 & (COUNT_LIMIT - 1); }

bool pin_this_thread(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof set, &set) == 0;
}

Pool::Pool(const int* cpus, int n) {
  for (int i = 1; i < n; i++) workers_.emplace_back(&Pool::serve, this, cpus ? cpus[i] : 0, cpus != nullptr);
  while (started_.load() < n - 1) sched_yield();
}

Pool::~Pool() {
  stop_ = true;
  word(&epoch_).fetch_add(1);
  futex_wake_private(&epoch_);
  for (auto& worker : workers_) worker.join();
}

void Pool::serve(int cpu, bool pin) {
  if (!pin || pin_this_thread(cpu)) pinned_++;
  uint32_t seen = word(&epoch_).load();
  started_++;
  while (!stop_) {
    const int64_t began = now_ns();
    uint32_t latest;
    for (int turns = 0; (latest = word(&epoch_).load()) == seen; turns++) {
      cpu_relax();
      if (turns % 64 == 63 && now_ns() - began > SPIN_NS) {
        sleepers_++;
        if (word(&epoch_).load() == seen) futex_wait_private(&epoch_, seen);
        sleepers_--;
      }
    }
    seen = latest;
    work();
  }
}

void Pool::work() {
  for (uint64_t ticket = ticket_.load();;) {
    if (next_of(ticket) >= count_of(ticket)) return;
    const Fn fn = fn_.load(std::memory_order_relaxed);
    void* context = context_.load(std::memory_order_relaxed);
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;  // fn and context belong to the ticket that was claimed
    fn(context, (int64_t)next_of(ticket));
    done_.fetch_add(1);
    ticket = ticket_.load();
  }
}

void Pool::run(int64_t chunks, Fn fn, void* context) {
  if (chunks >= COUNT_LIMIT) {  // never in practice: a pass would need a million panels
    for (int64_t i = 0; i < chunks; i++) fn(context, i);
    return;
  }
  done_ = 0;
  fn_ = fn;
  context_ = context;
  const uint64_t epoch = (ticket_.load() >> 40) + 1;
  ticket_ = epoch << 40 | (uint64_t)chunks << 20;
  word(&epoch_).fetch_add(1);
  if (sleepers_.load()) futex_wake_private(&epoch_);
  work();
  for (int64_t turns = 0; done_.load() < chunks; turns++) {
    if (turns < 2000) {
      cpu_relax();
    } else {
      sched_yield();  // the worker that holds the last chunk may need this core
    }
  }
}

}  // namespace tp
