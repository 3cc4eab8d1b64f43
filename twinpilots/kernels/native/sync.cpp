#include "sync.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace tp {

static constexpr int64_t SLICE_NS = 50'000'000;
static constexpr int64_t POLLED_SLICE_NS = 10'000;  // where a device writes event words and cannot wake anybody
static std::atomic<int64_t> g_timeout_ns{120'000'000'000};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

void sleep_until_ns(int64_t when) {
  const timespec t = {when / 1'000'000'000, when % 1'000'000'000};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr) == EINTR) {
  }
}

// A spinning thread on a one-core set keeps the very thread that it waits for from running.
static bool one_core() {
  static thread_local const bool value = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) == 1;
  }();
  return value;
}

void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void set_timeout_s(double seconds) { g_timeout_ns.store((int64_t)(seconds * 1e9)); }
int64_t timeout_ns() { return g_timeout_ns.load(std::memory_order_relaxed); }

static long futex(uint32_t* address, int op, uint32_t value, const timespec* limit) { return syscall(SYS_futex, address, op, value, limit, nullptr, 0); }

void publish(void* host, uint32_t* address, uint32_t value) {
  word(address).store(value, std::memory_order_seq_cst);
  if (word(&control(host)->waiters).load(std::memory_order_seq_cst)) futex(address, FUTEX_WAKE, INT_MAX, nullptr);
}

Waiter::Waiter(void* host, uint32_t* address, int64_t limit_ns, int64_t spin_ns) : host_(host), address_(address), began_(now_ns()), limit_(limit_ns), spin_(spin_ns) {}

int Waiter::pause(uint32_t seen) {
  if (word(&control(host_)->abort).load(std::memory_order_relaxed)) return ABORTED;
  if (++turns_ % 16) {
    cpu_relax();
    return OK;
  }
  const int64_t waited = now_ns() - began_;
  if (limit_ >= 0 && waited > limit_) return TIMED_OUT;
  if (waited < spin_) {
    if (one_core()) sched_yield();
    return OK;
  }
  // Announce, then sleep only if the word still holds what was seen: a publisher either sees the announcement or changes the word before the kernel looks.
  const int64_t longest = word(&control(host_)->polled).load(std::memory_order_relaxed) ? POLLED_SLICE_NS : SLICE_NS;
  const int64_t left = limit_ >= 0 && limit_ - waited < longest ? limit_ - waited + 1 : longest;
  const timespec slice = {0, left};
  word(&control(host_)->waiters).fetch_add(1, std::memory_order_seq_cst);
  futex(address_, FUTEX_WAIT, seen, &slice);
  word(&control(host_)->waiters).fetch_sub(1, std::memory_order_seq_cst);
  turns_ = 15;  // after a sleep, every look is followed by another sleep
  return OK;
}

void futex_wait_private(uint32_t* address, uint32_t seen) { futex(address, FUTEX_WAIT_PRIVATE, seen, nullptr); }
void futex_wake_private(uint32_t* address) { futex(address, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr); }

}  // namespace tp
