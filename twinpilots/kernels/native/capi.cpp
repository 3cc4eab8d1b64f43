// The C face of the module, for ctypes. Every function may be called without the GIL.
#include <sched.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

#include "interp.h"
#include "sync.h"

using namespace tp;

static Mailbox* mailbox_at(void* host, int64_t offset) { return reinterpret_cast<Mailbox*>(static_cast<char*>(host) + offset); }
static int64_t limit_ns(double seconds) { return seconds < 0 ? -1 : (int64_t)(seconds * 1e9); }

#pragma GCC visibility push(default)
extern "C" {

int tp_abi_version() { return ABI_VERSION; }
int tp_best_isa() { return best_isa(); }
int tp_isa() { return isa(); }
int tp_has_isa(int level) { return kernels_of(level) != nullptr; }
int tp_set_isa(int level) { return set_isa(level); }
void tp_set_timeout(double seconds) { set_timeout_s(seconds); }

// Sizes and offsets as compiled, for the test that holds them against program.py. Returns how many there are.
int tp_abi_layout(int64_t* out, int n) {
  const int64_t values[] = {sizeof(Insn),           sizeof(Entry),           sizeof(Mailbox),           sizeof(Control),    EVENTS_OFFSET, offsetof(Insn, wait_event), offsetof(Insn, a), offsetof(Insn, f),
                            offsetof(Entry, count), offsetof(Control, gpu), offsetof(Control, link_in), offsetof(Control, link_out), sizeof(Chain), offsetof(Chain, hurry), sizeof(Choice)};
  const int count = sizeof values / sizeof *values;
  for (int i = 0; i < std::min(n, count); i++) out[i] = values[i];
  return count;
}

int tp_pin_thread(int cpu) { return pin_this_thread(cpu) ? 0 : -1; }

void* tp_pool_create(const int* cpus, int n) {
  if (n < 1) return nullptr;
  Pool* pool = new (std::nothrow) Pool(cpus, n);
  if (pool && !pool->pinned()) {
    delete pool;
    return nullptr;
  }
  return pool;
}
void tp_pool_destroy(void* pool) { delete static_cast<Pool*>(pool); }

int tp_run(void* host, void* gpu, const Entry* entry, void* pool, const LinkParams* link, int64_t mailbox_offset) {
  return Queue(host, gpu, mailbox_offset, static_cast<Pool*>(pool), link).run(*entry);
}

int tp_run_chain(void* host, const Entry* entry, Chain* chain, void* pool) { return Queue(host, nullptr, -1, static_cast<Pool*>(pool), nullptr).run_chain(*entry, *chain); }

int tp_draw(const float* row, int64_t n, const Choice* choice, double uniform) { return choose(kernels(), row, n, choice, uniform); }

int tp_queue_loop(void* host, void* gpu, int64_t mailbox_offset, void* pool, const LinkParams* link) {
  return Queue(host, gpu, mailbox_offset, static_cast<Pool*>(pool), link).loop();
}

int tp_submit(void* host, int64_t mailbox_offset, const Entry* entry) {
  Mailbox* box = mailbox_at(host, mailbox_offset);
  const uint32_t tail = word(&box->tail).load(std::memory_order_relaxed);
  if (tail - word(&box->head).load(std::memory_order_acquire) >= (uint32_t)MAILBOX_ENTRIES) return QUEUE_FULL;
  box->entries[tail % MAILBOX_ENTRIES] = *entry;
  publish(host, &box->tail, tail + 1);
  return OK;
}

int tp_wait_idle(void* host, int64_t mailbox_offset, double timeout_s) {
  Mailbox* box = mailbox_at(host, mailbox_offset);
  Waiter waiter(host, &box->head, limit_ns(timeout_s));
  for (;;) {
    const uint32_t head = word(&box->head).load(std::memory_order_acquire);
    if (head == word(&box->tail).load(std::memory_order_relaxed)) return word(&box->status).load(std::memory_order_relaxed);
    if (const int error = waiter.pause(head)) return error;
  }
}

void tp_event_set(void* host, int event, int32_t value) { publish(host, event_slot(host, event), (uint32_t)value); }

int tp_event_wait(void* host, int event, int32_t value, double timeout_s) {
  uint32_t* slot = event_slot(host, event);
  Waiter waiter(host, slot, limit_ns(timeout_s));
  for (;;) {
    const uint32_t seen = word(slot).load(std::memory_order_acquire);
    if ((int32_t)(seen - (uint32_t)value) >= 0) return OK;
    if (const int error = waiter.pause(seen)) return error;
  }
}

// ---- weights

void tp_quantize(int dtype, const float* weights, int64_t blocks, void* out, void* pool) { quantize(dtype, weights, blocks, static_cast<char*>(out), static_cast<Pool*>(pool)); }

void tp_pack_columns(int dtype, const void* row_blocks, int64_t row_stride, int64_t rows, int64_t blocks, void* panel, int64_t w, int64_t column, void* pool) {
  pack_columns(dtype, static_cast<const char*>(row_blocks), row_stride, rows, blocks, static_cast<char*>(panel), w, column, static_cast<Pool*>(pool));
}

// ---- the machine's rates, for the profiler

double tp_read_rate(void* data, int64_t bytes, void* pool, int duration_ms) {
  constexpr int64_t piece = 1 << 20;
  const int64_t began = now_ns(), end = began + duration_ms * 1'000'000LL, pieces = bytes / piece;
  if (pieces < 1) return 0;
  double read = 0;
  do {
    parallel(static_cast<Pool*>(pool), pieces, [&](int64_t i) {
      volatile double sink = kernels().read_sum(static_cast<char*>(data) + i * piece, piece);
      (void)sink;
    });
    read += (double)(pieces * piece);
  } while (now_ns() < end);
  return read / (double)(now_ns() - began) * 1e9;
}

double tp_fma_rate(void* pool_, int duration_ms) {
  Pool* pool = static_cast<Pool*>(pool_);
  const int64_t chunks = 16 * (pool ? pool->threads() : 1), began = now_ns(), end = began + duration_ms * 1'000'000LL;
  std::atomic<int64_t> done{0};
  do {
    parallel(pool, chunks, [&](int64_t) { done += (int64_t)kernels().fma_burn(20000); });
  } while (now_ns() < end);
  return (double)done.load() / (double)(now_ns() - began) * 1e9;
}

// A bf16 linear on the calling thread: `rows` rows of 2048 inputs over all panels of 64 outputs in `bytes`, in the steps in which a queue takes them.
double tp_linear_seconds(int level, const void* weights, int64_t bytes, int64_t rows) {
  constexpr int64_t WIDTH = 2048, COLUMNS = 64, BLOCK = 192, PANELS = 4;
  const Kernels* table = kernels_of(level);
  const int64_t outputs = bytes / (2 * WIDTH) / COLUMNS * COLUMNS, panels = outputs / COLUMNS;
  if (!table || panels < 1 || rows < 1) return 0;
  std::vector<float> x((size_t)(rows * WIDTH), 1.5f), y((size_t)(rows * outputs));
  std::vector<uint16_t> split(table->split_row ? (size_t)split_bytes(rows, WIDTH) / 2 : 0);
  const int64_t began = now_ns();
  for (int64_t row = 0; table->split_row && row < rows; row++) table->split_row(x.data() + row * WIDTH, WIDTH, split.data(), row);
  const LinearArgs args = {y.data(), outputs, x.data(), WIDTH, weights, BF16, outputs, WIDTH, COLUMNS, NONE, SILU, nullptr, nullptr, 0, split.empty() ? nullptr : split.data(), 0};
  for (int64_t row = 0; row < rows; row += BLOCK)
    for (int64_t panel = 0; panel < panels; panel += PANELS) table->linear_panels(args, panel, std::min(panel + PANELS, panels), row, std::min(row + BLOCK, rows));
  return (double)(now_ns() - began) * 1e-9;
}

// One thread, in the pieces in which a packet is copied.
double tp_copy_rate(void* dst, void* src, int64_t bytes, int duration_ms) {
  constexpr int64_t piece = 256 << 10;
  const int64_t began = now_ns(), end = began + duration_ms * 1'000'000LL;
  double copied = 0;
  do {
    for (int64_t at = 0; at < bytes; at += piece) std::memcpy(static_cast<char*>(dst) + at, static_cast<char*>(src) + at, (size_t)std::min(piece, bytes - at));
    copied += (double)bytes;
  } while (now_ns() < end);
  return copied / (double)(now_ns() - began) * 1e9;
}

}  // extern "C"
#pragma GCC visibility pop
