// Time, futexes and events in shared memory. A wait spins briefly, then sleeps; who changes a word wakes sleepers only if `Control.waiters` says that there are any.
#pragma once
#include <atomic>
#include <cstdint>

#include "abi.h"

namespace tp {

enum Result : int { OK = 0, CANCELLED = 1, ABORTED = -1, TIMED_OUT = -2, BAD_INSTRUCTION = -3, QUEUE_FULL = -4 };

int64_t now_ns();                     // CLOCK_MONOTONIC
void sleep_until_ns(int64_t when);    // absolute; returns at once when it is past
void cpu_relax();                     // one polite turn of a spin loop
void set_timeout_s(double seconds);   // of every wait for an event, process-wide (default 120 s)
int64_t timeout_ns();

inline std::atomic<uint32_t>& word(uint32_t* p) { return *reinterpret_cast<std::atomic<uint32_t>*>(p); }
inline std::atomic<int32_t>& word(int32_t* p) { return *reinterpret_cast<std::atomic<int32_t>*>(p); }
static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free, "shared words are plain u32");

inline Control* control(void* host) { return static_cast<Control*>(host); }
inline uint32_t* event_slot(void* host, int event) { return reinterpret_cast<uint32_t*>(static_cast<char*>(host) + EVENTS_OFFSET) + event; }

void publish(void* host, uint32_t* address, uint32_t value);  // store, then wake whoever sleeps on the word

// How long a wait stays awake before it sleeps. A virtual core that idles takes 20 to 500 us to wake, and a pass hands off hundreds of times: computing
// queues and drivers stay awake through a pass. A link's thread shares its core with the computing queue, which keeps the core awake, and a sleeper is woken
// at once where a spinner waits for its turn.
constexpr int64_t WAIT_SPIN_NS = 3'000'000;
constexpr int64_t LINK_SPIN_NS = 60'000;

// One wait: call `pause(value)` with the word's latest value until the condition holds. Spins for `spin_ns`, then sleeps on the futex in slices of 50 ms.
class Waiter {
 public:
  Waiter(void* host, uint32_t* address, int64_t limit_ns, int64_t spin_ns = WAIT_SPIN_NS);
  // After a look that saw `seen` and did not like it: OK to look again, ABORTED, or TIMED_OUT.
  int pause(uint32_t seen);

 private:
  void* host_;
  uint32_t* address_;
  int64_t began_, limit_, spin_;
  int turns_ = 0;
};

// Futexes for words of this process only (the pool).
void futex_wait_private(uint32_t* address, uint32_t seen);
void futex_wake_private(uint32_t* address);

}  // namespace tp
