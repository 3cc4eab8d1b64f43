#include "link.h"

#include <sched.h>

#include <algorithm>
#include <cstring>

#include "sync.h"

namespace tp {

static constexpr int64_t CHUNK = 256 << 10;
static constexpr int64_t SPIN_BELOW_NS = 50'000;    // a sleep overshoots by about this much
static constexpr int64_t CARRY_LIMIT_NS = 20'000'000;  // a longer overshoot is not the link's

static void wait_until(int64_t when) {
  for (int64_t left; (left = when - now_ns()) > 0;) {
    if (left < SPIN_BELOW_NS) {
      sched_yield();
    } else {
      sleep_until_ns(when);
    }
  }
}

int64_t Link::due() const { return start_ + (int64_t)((params_->latency_s + (rate_ > 0 ? (double)bytes_ / rate_ : 0.0)) * 1e9); }

// A pipelined transfer right behind another starts at that one's deadline, not when its sleeper woke: a busy link stays at its rate.
void Link::begin(Direction direction, bool pipelined) {
  const int64_t now = now_ns();
  __atomic_load(direction == Direction::UP ? &params_->up_bytes_per_s : &params_->down_bytes_per_s, &rate_, __ATOMIC_RELAXED);
  bytes_ = 0;
  pipelined_ = pipelined;
  start_ = pipelined && end_ && now - end_ < CARRY_LIMIT_NS ? std::min(end_, now) : now;
}

void Link::copy(void* dst, const void* src, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += CHUNK) {
    const int64_t part = std::min(CHUNK, bytes - at);
    std::memcpy(static_cast<char*>(dst) + at, static_cast<const char*>(src) + at, (size_t)part);
    bytes_ += part;
    if (rate_ > 0 && due() - now_ns() > 2 * SPIN_BELOW_NS) sleep_until_ns(due());
  }
}

// Pipelined transfers sleep to the end: what a sleep overshoots, the next one catches up, and a spinning link would take the GPU's one core from computing.
void Link::finish() {
  if (rate_ > 0 || params_->latency_s > 0) {
    if (pipelined_) {
      sleep_until_ns(due());
    } else {
      wait_until(due());
    }
  }
  end_ = due();
}

}  // namespace tp
