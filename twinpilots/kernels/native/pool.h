// A pool of compute threads: dynamic chunks, the caller takes part. A worker that the system keeps from running simply finds no chunk left;
// `run` returns when every started chunk is done.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tp {

bool pin_this_thread(int cpu);

class Pool {
 public:
  using Fn = void (*)(void* context, int64_t chunk);

  // n compute threads including the caller; workers 1 .. n-1 are pinned to cpus[1..] unless cpus is null.
  Pool(const int* cpus, int n);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  bool pinned() const { return pinned_.load() == (int)workers_.size(); }  // every worker reached its core
  int threads() const { return (int)workers_.size() + 1; }
  void run(int64_t chunks, Fn fn, void* context);  // 2^20 chunks or more: the caller alone

 private:
  void work();
  void serve(int cpu, bool pin);

  // epoch : 24 | count : 20 | next : 20, claimed by compare-and-swap: a stale worker's claim fails, so it never touches a later job by an earlier job's data
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<Fn> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) uint32_t epoch_ = 0;  // futex word
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> pinned_{0};
  std::atomic<int> started_{0};
  std::vector<std::thread> workers_;
};

// fn(chunk) for every chunk in [0, chunks), on the caller alone when there is no pool.
template <class F>
void parallel(Pool* pool, int64_t chunks, F&& fn) {
  if (!pool || pool->threads() == 1 || chunks <= 1) {
    for (int64_t i = 0; i < chunks; i++) fn(i);
    return;
  }
  pool->run(chunks, [](void* context, int64_t chunk) { (*static_cast<F*>(context))(chunk); }, &fn);
}

}  // namespace tp
