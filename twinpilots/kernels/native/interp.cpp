#include "interp.h"

#include <sys/prctl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "sync.h"

namespace tp {

// ---- scratch

struct Scratch {
  char* data = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(data); }
};

static char* grown(Scratch& scratch, size_t bytes) {
  if (bytes > scratch.bytes) {
    std::free(scratch.data);
    scratch.bytes = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
    scratch.data = static_cast<char*>(std::aligned_alloc(4096, scratch.bytes));
    if (!scratch.data) throw std::bad_alloc();
  }
  return scratch.data;
}

char* thread_scratch(size_t bytes) {
  static thread_local Scratch scratch;
  return grown(scratch, bytes);
}

// Memory of the queue that this thread runs, shared with the pool for one instruction.
static char* queue_scratch(size_t bytes) {
  static thread_local Scratch scratch;
  return grown(scratch, bytes);
}

// ---- the queue

Queue::Queue(void* host, void* gpu, int64_t mailbox_offset, Pool* pool, const LinkParams* link)
    : host_(static_cast<char*>(host)),
      gpu_(static_cast<char*>(gpu)),
      box_(mailbox_offset < 0 ? nullptr : reinterpret_cast<Mailbox*>(host_ + mailbox_offset)),
      pool_(pool),
      link_(link),
      random_(link_.seed() + 0x9e3779b97f4a7c15ULL * (uint64_t)(mailbox_offset + 2)) {
  if (link) prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);  // the link's deadlines are finer than the default slack of 50 us
}

char* Queue::at(int64_t address) const {
  if (address == NULL_ADDRESS) return nullptr;
  return (address >> 56 == GPU ? gpu_ : host_) + (address & ((1LL << 56) - 1));
}

int64_t Queue::spin_ns() const { return box_ == &control(host_)->link_in || box_ == &control(host_)->link_out ? LINK_SPIN_NS : WAIT_SPIN_NS; }

bool Queue::cancelled(int32_t pass_id) const { return box_ && pass_id <= word(&box_->cancel_pass).load(std::memory_order_relaxed); }

int Queue::wait_event(int event, int32_t value, int32_t pass_id) {
  uint32_t* slot = event_slot(host_, event);
  uint32_t seen = word(slot).load(std::memory_order_acquire);
  if ((int32_t)(seen - (uint32_t)value) >= 0) return OK;
  link_.idle();
  Waiter waiter(host_, slot, timeout_ns(), spin_ns());
  for (;;) {
    if (cancelled(pass_id)) return CANCELLED;
    if (const int error = waiter.pause(seen)) return error;
    seen = word(slot).load(std::memory_order_acquire);
    if ((int32_t)(seen - (uint32_t)value) >= 0) return OK;
  }
}

int Queue::wait_for(const Insn& insn, const Entry& entry) {
  for (int i = 0; i < insn.num_waits; i++) {
    if (insn.wait_offset[i] < 0 && entry.pass_id == entry.first_pass) continue;
    if (const int error = wait_event(insn.wait_event[i], entry.pass_id + insn.wait_offset[i], entry.pass_id)) return error;
  }
  return OK;
}

// Half of the instructions start as early as their waits allow, the others up to 2 ms late.
void Queue::dawdle() {
  random_ += 0x9e3779b97f4a7c15ULL;
  uint64_t z = random_;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
  z ^= z >> 31;
  if (z & 1) return;
  const int64_t limit = (z & 6) == 0 ? 2'000'000 : 100'000;
  sleep_until_ns(now_ns() + (int64_t)(z >> 8) % limit);
}

// What instructions that ran together took is each one's by its outputs. The end.
int64_t Queue::share_time(const Insn* insns, int count, int64_t (*trace)[3]) {
  const int64_t end = now_ns();
  int64_t outputs = 0, done = 0;
  for (int i = 0; i < count; i++) outputs += insns[i].a[6];
  for (int i = 0; i < count; i++) {
    if (i) trace[i][0] = trace[i][1] = trace[i - 1][2];
    done += insns[i].a[6];
    trace[i][2] = i == count - 1 ? end : trace[0][1] + (int64_t)((double)(end - trace[0][1]) * (double)done / (double)outputs);
  }
  return end;
}

int Queue::run(const Entry& entry, int64_t (*trace)[3]) {
  const Insn* insns = ptr<const Insn>(entry.insns);
  meta_ = ptr<const int32_t>(entry.meta);
  rounded_of_ = {};
  int64_t clock = 0;  // the end of the instruction before, where nothing has been done since: looking takes longer than what lies between
  for (int32_t i = 0; i < entry.count; i++) {
    const Insn& insn = insns[i];
    if (word(&control(host_)->abort).load(std::memory_order_relaxed)) return ABORTED;
    if (cancelled(entry.pass_id)) return CANCELLED;
    if (insn.num_waits < 0 || insn.num_waits > MAX_WAITS) return BAD_INSTRUCTION;
    if (trace) trace[i][0] = clock ? clock : now_ns();
    if (const int error = wait_for(insn, entry)) return error;
    if (link_.seed()) dawdle();
    if (trace) trace[i][1] = insn.num_waits || link_.seed() ? now_ns() : trace[i][0];
    const int together = linears_together(&insn, entry.count - i);
    if (const int error = execute(&insn, together)) return error;
    for (int j = 0; j < together; j++) forget_rounded(insns[i + j]);
    if (trace) clock = share_time(&insn, together, trace + i);
    i += together - 1;
    if (insns[i].record < 0) continue;
    publish(host_, event_slot(host_, insns[i].record), (uint32_t)entry.pass_id);
    clock = 0;
  }
  return OK;
}

int Queue::loop() {
  for (;;) {
    const uint32_t head = word(&box_->head).load(std::memory_order_relaxed);
    uint32_t tail = word(&box_->tail).load(std::memory_order_acquire);
    if (tail == head) {
      link_.idle();
      Waiter waiter(host_, &box_->tail, -1, spin_ns());
      while (tail == head) {
        if (waiter.pause(tail)) return ABORTED;
        tail = word(&box_->tail).load(std::memory_order_acquire);
      }
    }
    const Entry entry = box_->entries[head % MAILBOX_ENTRIES];
    const int result = run(entry);
    if (result < 0 && box_->status == OK) word(&box_->status).store(result, std::memory_order_relaxed);
    publish(host_, &box_->head, head + 1);
    if (result == ABORTED) return ABORTED;
    if (entry.flags & ENTRY_QUIT) return OK;
  }
}

// ---- rows of an instruction

Queue::Rows Queue::rows(const Insn& insn) const {
  if (insn.row_kind == 1) return {0, meta_[NUM_LOGITS]};
  const int32_t* starts = meta_ + ROWS + 4 * insn.mb;
  return {starts[insn.glo], starts[insn.ghi]};
}

Queue::Rows Queue::sequences(const Insn& insn, int glo, int ghi) const {
  const int32_t* starts = meta_ + SEQS + 4 * insn.mb;
  return {starts[glo], starts[ghi]};
}

Sequence Queue::sequence(int64_t index, Meta pages) const {
  return {words(OFF_SEQ_ROW)[index], words(OFF_SEQ_LEN)[index], words(OFF_SEQ_KV)[index], words(OFF_PAGE) + words(pages)[index]};
}

constexpr int64_t ROW_WORK = 4096;  // elements below which handing rows to another thread costs more than it saves

// Rows one by one, on all threads when there is enough to do.
template <class F>
void Queue::each_row(const Insn& insn, int64_t elements_per_row, F&& fn) {
  const Rows r = rows(insn);
  const int64_t step = std::max<int64_t>(1, ROW_WORK / std::max<int64_t>(1, elements_per_row));
  parallel(pool_, (r.last - r.first + step - 1) / step, [&](int64_t chunk) {
    const int64_t begin = r.first + chunk * step, end = std::min(begin + step, r.last);
    for (int64_t row = begin; row < end; row++) fn(row);
  });
}

static bool known_weights(int64_t dtype, int64_t width) {
  return dtype >= FP32 && dtype <= Q6_K && (!is_quantized(dtype) || width % quant_format((int)dtype).block == 0);
}
static bool known_dtype(int64_t dtype) { return dtype == FP32 || dtype == BF16 || dtype == FP16; }
static bool known_kv(int64_t dtype) { return known_dtype(dtype) || dtype == INT8; }

// The rounded input is kept through this queue's instructions that write elsewhere. No other queue writes it in between: tests/unit/test_hazards.py.
void Queue::forget_rounded(const Insn& insn) {
  if (insn.op == LOAD || !rounded_of_.src) return;
  const bool strided = insn.op == LINEAR || insn.op == COPY;
  const float *dst = ptr<float>(insn.a[0]), *src = rounded_of_.src;
  if (strided && (dst + rows(insn).last * insn.a[1] <= src || src + rounded_of_.last * rounded_of_.ld <= dst)) return;
  rounded_of_ = {};
}

int Queue::execute(const Insn* insns, int together) {
  const Insn& insn = insns[0];
  if (insn.mb < 0 || insn.mb >= MAX_MICRO_BATCHES || insn.glo < 0 || insn.ghi < insn.glo || insn.ghi > 3 || insn.row_kind < 0 || insn.row_kind > 1) return BAD_INSTRUCTION;
  switch (insn.op) {
    case EMBED: return embed(insn);
    case NORM: return norm(insn);
    case LINEAR: return linear(insns, together);
    case LINEAR_IN: return linear_in(insn);
    case ROPE_APPEND: return rope_append(insn);
    case ATTEND: return attend(insn);
    case ADD: return add(insn);
    case COPY: return copy(insn);
    case LOAD: return load(insn);
    case LOAD_KV: return load_kv(insn);
    case STORE_KV: return store_kv(insn);
    case POISON: return poison(insn);
    default: return BAD_INSTRUCTION;
  }
}

// ---- row-wise instructions

int Queue::embed(const Insn& insn) {
  const int64_t* a = insn.a;
  const EmbedArgs args = {at(a[2]), (int)a[3], (int)a[4], a[5], a[6], a[7], at(a[8]), (int)a[10], (float)insn.f[0]};
  if (!known_weights(a[4], a[5]) || (is_quantized(a[4]) && a[3] != 1) || (args.pos_table && !known_dtype(a[10])) || (a[3] != 0 && (a[3] != 1 || a[6] <= 0))) return BAD_INSTRUCTION;
  float* dst = ptr<float>(a[0]);
  each_row(insn, args.width, [&](int64_t row) { kernels().embed_row(dst + row * a[1], args, words(OFF_TOKEN)[row], words(OFF_POSITION)[row] + a[9]); });
  return OK;
}

int Queue::norm(const Insn& insn) {
  const int64_t* a = insn.a;
  float *dst = ptr<float>(a[0]), *src = ptr<float>(a[2]), *gain = ptr<float>(a[4]), *bias = ptr<float>(a[5]);
  if (a[7] != RMS && a[7] != LAYER) return BAD_INSTRUCTION;
  each_row(insn, a[6], [&](int64_t row) {
    const int64_t from = insn.row_kind == 1 ? words(OFF_LOGIT_ROW)[row] : row;
    kernels().norm_row(dst + row * a[1], src + from * a[3], gain, bias, a[6], (int)a[7], (float)insn.f[0]);
  });
  return OK;
}

int Queue::add(const Insn& insn) {
  const int64_t* a = insn.a;
  float *x = ptr<float>(a[0]), *p = ptr<float>(a[2]), *q = ptr<float>(a[4]), *bias = ptr<float>(a[6]), *gain = ptr<float>(a[7]), *gain_bias = ptr<float>(a[8]);
  if (gain && a[9] != RMS && a[9] != LAYER) return BAD_INSTRUCTION;
  each_row(insn, a[10], [&](int64_t row) {
    const float *from_p = p ? p + row * a[3] : nullptr, *from_q = q ? q + row * a[5] : nullptr;
    kernels().add_row(x + row * a[1], from_p, from_q, bias, gain, gain_bias, a[10], (int)a[9], (float)insn.f[0]);
  });
  return OK;
}

int Queue::rope_append(const Insn& insn) {
  const int64_t* a = insn.a;
  const KvArgs kv = {at(a[10]), a[11], a[12], a[8], a[9], (int)a[13]};
  const RopeArgs args = {ptr<float>(a[0]), a[1], ptr<float>(a[2]), ptr<float>(a[3]), ptr<float>(a[4]), ptr<float>(a[5]), a[6], a[7], kv, (float)insn.f[0]};
  if (!known_kv(a[13]) || a[12] <= 0 || a[6] > a[9] || a[6] % 2) return BAD_INSTRUCTION;
  each_row(insn, (a[7] + 2 * a[8]) * a[9], [&](int64_t row) { kernels().rope_row(args, row, words(OFF_ROPE_ROW)[row], words(OFF_SLOT)[row]); });
  return OK;
}

// ---- linears

constexpr int64_t BLOCK_ROWS = 192;         // a multiple of a tile's 16: token rows whose sums stay in cache while a panel's weights pass by
constexpr int64_t CHUNK_COLUMNS = 256;      // outputs of a chunk: rows are packed once for all of them
constexpr int64_t CHUNKS = 4;               // per thread, at least
constexpr int64_t FEW_CHUNKS = 3;           // of few rows: more panels in a chunk are more streams from memory
constexpr int64_t CHUNK_WORK = 128 * 1024;  // multiply-adds below which handing a chunk to another thread costs more than it saves

static bool known_activations(int64_t activations) { return activations == NULL_ADDRESS || activations == EXACT || activations == FAST; }

// Rows r of a linear's input, rounded once for all chunks, and for the linears that follow over the same input (q, k and v; the pieces of one op);
// no rows for weights that are not quantised. Only nibbles are multiplied by bytes.
Rounded Queue::round(const float* src, int64_t src_ld, Rows r, int64_t width, int dtype, int64_t activations) {
  if (!is_quantized(dtype) || r.first >= r.last) return {nullptr, 0, 0, 0};
  const int bits = activations == FAST ? 8 : 16, code_bytes = bits == 8 && !has_bytes_or_upper_bits(dtype) ? 1 : 2;
  const RoundedOf of = {src, src_ld, r.first, r.last, width, bits, code_bytes};
  if (of == rounded_of_) return rounded_;
  rounded_of_ = of;
  Rounded& x = rounded_ = {nullptr, r.first, r.last - r.first, code_bytes};
  x.data = queue_scratch((size_t)x.bytes(width));
  const int64_t step = std::max<int64_t>(1, ROW_WORK / std::max<int64_t>(1, width));
  parallel(pool_, (x.rows + step - 1) / step, [&](int64_t chunk) {
    const int64_t first = r.first + chunk * step, last = std::min(first + step, r.last);
    for (int64_t row = first; row < last; row++) kernels().round_row(src + row * src_ld, width, bits, x, row);
  });
  return x;
}

// Rows r of a bf16 linear's input in terms of bf16, split once as they are rounded; null without tiles.
const uint16_t* Queue::split(const float* src, int64_t src_ld, Rows r, int64_t width, int dtype) {
  constexpr int BITS = 24;
  const auto split_row = kernels().split_row;
  if (dtype != BF16 || !split_row || r.first >= r.last) return nullptr;
  const RoundedOf of = {src, src_ld, r.first, r.last, width, BITS, 2};
  if (!(of == rounded_of_)) {
    rounded_of_ = of;
    rounded_ = {queue_scratch((size_t)split_bytes(r.last - r.first, width)), r.first, r.last - r.first, 2};
    const int64_t step = std::max<int64_t>(1, ROW_WORK / std::max<int64_t>(1, width)), rows = r.last - r.first;
    parallel(pool_, (rows + step - 1) / step, [&](int64_t chunk) {
      for (int64_t row = chunk * step; row < std::min((chunk + 1) * step, rows); row++) split_row(src + (r.first + row) * src_ld, width, (uint16_t*)rounded_.data, row);
    });
  }
  return (const uint16_t*)rounded_.data;
}

// Linears that follow each other over the same rows of the same input, in one format: q, k and v. Nobody waits in between or for one of them alone.
int Queue::linears_together(const Insn* insns, int32_t left) const {
  int count = 1;
  const Insn& first = insns[0];
  const auto alike = [&](const Insn& insn) {
    constexpr int SAME[] = {2, 3, 5, 7, 13};  // source, its stride, format, inputs, rounding
    return insn.op == LINEAR && !insn.num_waits && insn.mb == first.mb && insn.glo == first.glo && insn.ghi == first.ghi && insn.row_kind == first.row_kind &&
           std::all_of(std::begin(SAME), std::end(SAME), [&](int i) { return insn.a[i] == first.a[i]; });
  };
  while (first.op == LINEAR && count < std::min<int32_t>(left, MOST_TOGETHER) && insns[count - 1].record < 0 && alike(insns[count])) count++;
  return count;
}

int Queue::linear(const Insn* insns, int count) {
  LinearArgs all[MOST_TOGETHER];
  int64_t panels[MOST_TOGETHER], all_panels = 0;
  for (int i = 0; i < count; i++) {
    const int64_t* a = insns[i].a;
    all[i] = {ptr<float>(a[0]), a[1], ptr<float>(a[2]), a[3], at(a[4]), (int)a[5], a[6], a[7], a[8], (int)a[9], (int)a[10], ptr<float>(a[11]), ptr<float>(a[12]),
              (float)insns[i].f[0], nullptr, 0};
    if (!known_weights(a[5], a[7]) || !known_activations(a[13]) || a[8] <= 0 || a[9] < NONE || a[9] > SOFTCAP || a[10] < SILU || a[10] > RELU) return BAD_INSTRUCTION;
    all_panels += panels[i] = (a[6] + a[8] - 1) / a[8];
  }
  const LinearArgs& first = all[0];
  const Rows r = rows(insns[0]);
  const Rounded x = round(first.src, first.src_ld, r, first.width, first.dtype, insns[0].a[13]);
  const uint16_t* terms = split(first.src, first.src_ld, r, first.width, first.dtype);
  const int64_t rows = r.last - r.first, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, threads = pool_ ? pool_->threads() : 1;
  const bool few = rows <= FEW_ROWS;
  int64_t group[MOST_TOGETHER], groups[MOST_TOGETHER], end[MOST_TOGETHER], chunks = 0;
  for (int i = 0; i < count; i++) {
    LinearArgs& args = all[i];
    args.split = terms;
    args.split_row0 = r.first;
    const int64_t columns = args.unit_rows * (args.epilogue == ACT_MUL ? 2 : 1);
    const int64_t least = CHUNK_WORK / std::max<int64_t>(1, columns * args.width * std::min(BLOCK_ROWS, rows));
    const int64_t together = x.data ? 1 : CHUNK_COLUMNS / columns;
    group[i] = std::max({int64_t(1), std::min(least, all_panels / threads), std::min(together, all_panels * blocks / ((few ? FEW_CHUNKS : CHUNKS) * threads))});
    groups[i] = (panels[i] + group[i] - 1) / group[i];
    end[i] = chunks += groups[i] * blocks;
  }
  parallel(pool_, chunks, [&](int64_t chunk) {
    int i = 0;
    while (chunk >= end[i]) i++;
    if (i) chunk -= end[i - 1];
    const int64_t row = r.first + chunk / groups[i] * BLOCK_ROWS, panel0 = chunk % groups[i] * group[i], panel1 = std::min(panel0 + group[i], panels[i]);
    const int64_t last_row = std::min(row + BLOCK_ROWS, r.last);
    if (!x.data) return kernels().linear_panels(all[i], panel0, panel1, row, last_row);
    for (int64_t panel = panel0; panel < panel1; panel++) kernels().quant_panel(all[i], x, panel, row, last_row);
  });
  return OK;
}

int Queue::linear_in(const Insn& insn) {
  const int64_t* a = insn.a;
  LinearInArgs args = {ptr<float>(a[0]), a[1], ptr<float>(a[2]), a[3], at(a[4]), (int)a[5], a[6], a[7], a[8] != 0, nullptr, 0};
  if (!known_weights(a[5], args.rows) || !known_activations(a[9])) return BAD_INSTRUCTION;
  const Rows r = rows(insn);
  const Rounded x = round(args.src, args.src_ld, r, args.rows, args.dtype, a[9]);
  args.split = split(args.src, args.src_ld, r, args.rows, args.dtype);
  args.split_row0 = r.first;
  const int64_t rows = r.last - r.first, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, threads = pool_ ? pool_->threads() : 1;
  // wide blocks read long pieces of each weight row; many rows' sums stay in the caches
  const bool packed = x.data && rows > FEW_ROWS, many = packed && rows > 32;
  const int64_t widest = packed ? (many ? 256 : 1024) : rows <= 12 ? 2048 : 512;
  const int64_t narrow = x.data && !packed ? args.width / 64 : CHUNKS;  // a few rows of codes: 64 columns are the least that is fast
  const int64_t least = args.width < 1024 * threads ? narrow : many ? CHUNKS : packed ? 2 : 1, shares = threads == 1 ? 1 : threads * std::max(least, args.width / (threads * widest));
  const int64_t even = !x.data && rows <= FEW_ROWS ? 32 : 64;  // narrow outputs: a finer grain makes chunks of equal size
  const int64_t columns = std::clamp<int64_t>(round_up((args.width + shares - 1) / shares, even), even, widest), count = (args.width + columns - 1) / columns;
  parallel(pool_, count * blocks, [&](int64_t chunk) {
    const int64_t row = r.first + chunk / count * BLOCK_ROWS, column = chunk % count * columns, last = std::min(column + columns, args.width);
    if (x.data) return kernels().quant_in_block(args, x, column, last, row, std::min(row + BLOCK_ROWS, r.last));
    kernels().linear_in_block(args, column, last, row, std::min(row + BLOCK_ROWS, r.last));
  });
  return OK;
}

// ---- attention

int Queue::attend(const Insn& insn) {
  const int64_t* a = insn.a;
  const KvArgs kv = {at(a[7]), a[8], a[9], a[5], a[6], (int)a[10]};
  const AttendArgs args = {ptr<float>(a[0]), a[1], ptr<const float>(a[2]), a[3], a[4], a[11], kv, (float)insn.f[0], (float)insn.f[1]};
  if (!known_kv(a[10]) || a[5] <= 0 || a[4] % a[5] || a[9] <= 0) return BAD_INSTRUCTION;
  const Rows s = sequences(insn, insn.glo, insn.ghi);
  const int64_t step = std::max<int64_t>(1, ATTEND_ROWS / (args.heads / kv.kv_heads));
  longest_first_.clear();
  for (int64_t i = s.first; i < s.last; i++) longest_first_.push_back(i);
  const int32_t* kv_tokens = words(OFF_SEQ_KV);  // long chunks first: the last ones to end are short, and the threads end together
  std::sort(longest_first_.begin(), longest_first_.end(), [&](int64_t i, int64_t j) { return kv_tokens[i] != kv_tokens[j] ? kv_tokens[i] > kv_tokens[j] : i < j; });
  first_block_.assign(1, 0);
  for (int64_t i : longest_first_) first_block_.push_back(first_block_.back() + (words(OFF_SEQ_LEN)[i] + step - 1) / step);
  const int64_t blocks = first_block_.back(), threads = pool_ ? pool_->threads() : 1;
  int64_t rows = args.heads / kv.kv_heads, together = kv.dtype == INT8 ? ATTEND_HEADS : 1;  // wider elements make streams that are long enough
  for (int64_t i = s.first; i < s.last; i++) rows = std::max(rows, std::min<int64_t>(words(OFF_SEQ_LEN)[i], step) * (args.heads / kv.kv_heads));
  const auto groups = [&] { return (kv.kv_heads + together - 1) / together; };
  while (together > 1 && (rows * together > ATTEND_ROWS || blocks * groups() < CHUNKS * threads)) together /= 2;
  parallel(pool_, blocks * groups(), [&](int64_t chunk) {
    const int64_t block = chunk / groups(), head = chunk % groups() * together, index = std::upper_bound(first_block_.begin(), first_block_.end(), block) - first_block_.begin() - 1;
    const Sequence sequence = this->sequence(longest_first_[(size_t)index], OFF_SEQ_PAGES);
    const int64_t query = (block - first_block_[(size_t)index]) * step;
    kernels().attend_block(args, sequence, head, std::min(head + together, kv.kv_heads), query, std::min(query + step, sequence.len));
  });
  return OK;
}

// ---- copies

int Queue::copy(const Insn& insn) {
  const int64_t* a = insn.a;
  float *dst = ptr<float>(a[0]), *src = ptr<float>(a[2]);
  if (a[5] != 0 && a[5] != 1) return BAD_INSTRUCTION;
  const Rows r = rows(insn);
  if (r.first >= r.last) return OK;  // a kind of sequence that this pass does not bring: nothing crosses, nothing waits
  link_.begin(a[5] == 0 ? Direction::UP : Direction::DOWN, false);
  if (a[1] == a[4] && a[3] == a[4]) {
    link_.copy(dst + r.first * a[1], src + r.first * a[3], (r.last - r.first) * a[4] * (int64_t)sizeof(float));
  } else {
    for (int64_t row = r.first; row < r.last; row++) link_.copy(dst + row * a[1], src + row * a[3], a[4] * (int64_t)sizeof(float));
  }
  link_.finish();
  link_.idle();
  return OK;
}

int Queue::load(const Insn& insn) {
  const int64_t* segment = ptr<const int64_t>(insn.a[0]);
  link_.begin(Direction::UP, true);
  for (int64_t i = 0; i < insn.a[1]; i++, segment += 3) link_.copy(at(segment[0]), at(segment[1]), segment[2]);
  link_.finish();
  return OK;
}

// Whole pages, for every page that holds a token of an earlier pass.
int Queue::load_kv(const Insn& insn) {
  const int64_t* a = insn.a;
  const KvArgs kv = {at(a[0]), a[2], a[3], a[4], a[5], (int)a[6]};
  const char* home = at(a[1]);
  if (!known_kv(a[6]) || kv.page_size <= 0) return BAD_INSTRUCTION;
  const Rows s = sequences(insn, 1, 2);
  if (s.first >= s.last) return OK;
  link_.begin(Direction::UP, false);  // somebody waits for it: no sleep may overshoot
  for (int64_t i = s.first; i < s.last; i++) {
    const Sequence to = sequence(i, OFF_SEQ_PAGES), from = sequence(i, OFF_SEQ_HOME);
    const int64_t pages = (to.kv_len - to.len + kv.page_size - 1) / kv.page_size;
    for (int64_t p = 0; p < pages; p++) link_.copy(kv.base + to.pages[p] * kv.page_stride, home + from.pages[p] * kv.page_stride, kv.page_bytes());
  }
  link_.finish();
  return OK;
}

// Only the rows of this pass's tokens: a page's other rows are not this pass's to write.
int Queue::store_kv(const Insn& insn) {
  const int64_t* a = insn.a;
  const KvArgs kv = {at(a[0]), a[2], a[3], a[4], a[5], (int)a[6]};
  char* home = at(a[1]);
  if (!known_kv(a[6]) || kv.page_size <= 0) return BAD_INSTRUCTION;
  const Rows s = sequences(insn, 1, 2);
  if (s.first >= s.last) return OK;
  link_.begin(Direction::DOWN, false);
  for (int64_t i = s.first; i < s.last; i++) {
    const Sequence from = sequence(i, OFF_SEQ_PAGES), to = sequence(i, OFF_SEQ_HOME);
    for (int64_t token = from.kv_len - from.len; token < from.kv_len;) {
      const int64_t page = token / kv.page_size, offset = token % kv.page_size, count = std::min(kv.page_size - offset, from.kv_len - token);
      char* target = home + to.pages[page] * kv.page_stride;
      const char* source = kv.base + from.pages[page] * kv.page_stride;
      for (int64_t line = 0; line < 2 * kv.kv_heads; line++) {  // keys' heads, then values' heads
        link_.copy(target + kv.row_at(line, offset), source + kv.row_at(line, offset), count * kv.row_bytes());
        if (kv.dtype == INT8) link_.copy(target + kv.scale_at(line, offset), source + kv.scale_at(line, offset), count * (int64_t)sizeof(float));
      }
      token += count;
    }
  }
  link_.finish();
  return OK;
}

int Queue::poison(const Insn& insn) {
  std::memset(at(insn.a[0]), 0xff, (size_t)insn.a[1]);
  return OK;
}

}  // namespace tp
