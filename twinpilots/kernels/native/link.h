// The emulated link: copies that take the time that the link would. Knows nothing of instructions.
#pragma once
#include <cstdint>

#include "abi.h"

namespace tp {

enum class Direction { UP, DOWN };  // towards the GPU; towards the host

class Link {
 public:
  // `params` stays the caller's, who may change its rates meanwhile: a transfer goes at the rate that it began with.
  explicit Link(const LinkParams* params) : params_(params ? params : &UNTHROTTLED) {}

  // The queue had to wait for something else: the link was idle, and idle time is not credit.
  void idle() { end_ = 0; }
  void begin(Direction direction, bool pipelined);
  void copy(void* dst, const void* src, int64_t bytes);  // between begin and finish
  void finish();                                         // returns when the link would have delivered the last byte
  uint64_t seed() const { return params_->adversarial_seed; }

 private:
  int64_t due() const;  // when the bytes so far are delivered
  static constexpr LinkParams UNTHROTTLED{};
  const LinkParams* params_;
  double rate_ = 0;
  bool pipelined_ = false;
  int64_t start_ = 0, bytes_ = 0;
  int64_t end_ = 0;  // deadline of the transfer before, 0 when the link was idle since
};

}  // namespace tp
