// The binary contract with twinpilots/kernels/abi.py: records, mailboxes, metadata words. tests/unit/test_abi.py holds the two against each other.
// Plain data, little endian, no pointers: everything is an offset or an address (space << 56 | offset).
#pragma once
#include <cstdint>

namespace tp {

constexpr int ABI_VERSION = 5;
constexpr int MAX_WAITS = 6;
constexpr int NUM_ARGS = 20;
constexpr int64_t NULL_ADDRESS = -1;
constexpr int MAX_MICRO_BATCHES = 8;
constexpr int MAILBOX_ENTRIES = 64;
constexpr int64_t EVENTS_OFFSET = 16384;
constexpr int EVENT_START = 0;     // set when a pass's metadata is in place
constexpr int32_t ENTRY_QUIT = 1;  // Entry.flags: the queue loop returns after this entry

enum Op : int32_t {
  EMBED = 1,
  NORM = 2,
  LINEAR = 3,
  LINEAR_IN = 4,
  ROPE_APPEND = 5,
  ATTEND = 6,
  ADD = 7,
  COPY = 8,
  LOAD = 9,
  LOAD_KV = 10,
  STORE_KV = 11,
  POISON = 12,
};
enum Space : int32_t { HOST = 0, GPU = 1 };
enum Dtype : int32_t {
  FP32 = 0, BF16 = 1, FP16 = 2, Q8_0 = 3, Q4_0 = 4, Q4_1 = 5, Q4_Z32 = 6, Q4_Z64 = 7, Q4_Z128 = 8, Q4_K = 9, Q5_0 = 10, Q5_1 = 11, Q5_K = 12, Q6_K = 13, INT8 = 14
};
enum Activations : int32_t { EXACT = 0, FAST = 1 };
enum Epilogue : int32_t { NONE = 0, ACT = 1, ACT_MUL = 2, SOFTCAP = 3 };
enum Act : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum NormKind : int32_t { RMS = 0, LAYER = 1 };

struct Insn {
  int32_t op;
  int32_t layer;
  int32_t row_kind;
  int32_t mb;
  int32_t glo;
  int32_t ghi;
  int32_t num_waits;
  int32_t record;
  int32_t wait_event[MAX_WAITS];
  int32_t wait_offset[MAX_WAITS];
  int64_t a[NUM_ARGS];
  double f[4];
};

struct Entry {
  int64_t insns;
  int64_t meta;
  int64_t trace;
  int32_t count;
  int32_t pass_id;
  int32_t first_pass;
  int32_t flags;
};

struct Mailbox {
  uint32_t head;
  uint32_t tail;
  int32_t cancel_pass;
  int32_t status;
  Entry entries[MAILBOX_ENTRIES];
};

struct Control {
  uint32_t abi;
  uint32_t abort;
  uint32_t waiters;
  uint32_t polled;
  Mailbox gpu;
  Mailbox link_in;
  Mailbox link_out;
};

enum Meta : int32_t {
  NUM_TOKENS = 0,
  NUM_SEQS = 1,
  NUM_MICRO_BATCHES = 2,
  NUM_LOGITS = 3,
  OFF_TOKEN = 4,
  OFF_POSITION = 5,
  OFF_ROPE_ROW = 6,
  OFF_SLOT = 7,
  OFF_LOGIT_ROW = 8,
  OFF_SEQ_ROW = 9,
  OFF_SEQ_LEN = 10,
  OFF_SEQ_KV = 11,
  OFF_SEQ_PAGES = 12,
  OFF_SEQ_HOME = 13,
  OFF_PAGE = 14,
  NUM_WORDS = 15,
  ROWS = 16,
  SEQS = 16 + 4 * MAX_MICRO_BATCHES,
  HEADER = 16 + 8 * MAX_MICRO_BATCHES,
};

// How a sequence's tokens are chosen from its logits (runtime/choice.py).
struct Choice {
  double temperature;  // 0: the best one
  double top_p;
  double floor;        // log of min_p
  int64_t top_k;       // 0 or less: all
};

// Decoding passes that follow each other without the driver in between. Not part of the arena: passed by the caller of tp_run_chain, in whose process its
// pointers point.
struct Chain {
  int64_t logits;     // address of fp32 [sequences][width]: where the program leaves them
  int64_t width;
  int64_t stop_ids;   // pointer to int32: the tokens that end a sequence, one sequence's after the other's
  int64_t stop_ends;  // pointer to int32 [sequences]: where each one's end
  int64_t choices;    // pointer to Choice [sequences]
  int64_t uniforms;   // pointer to double [passes][sequences]: in [0, 1), one for every draw
  int64_t tokens;     // pointer to int32 [passes][sequences]: what was chosen
  int64_t times;      // pointer to int64 [passes][count][3]: as Entry.trace
  int64_t ended_ns;   // pointer to int64 [passes]: when each pass and its choice were over
  int64_t budget_ns;  // no pass begins that would, taking as long as the one before, end later after the first began
  int32_t passes;     // at most
  int32_t done;       // out: passes whose tokens count
  int32_t page_size;
  uint32_t hurry;     // not 0: the pass that runs is the last one; any thread may set it meanwhile
};

// The emulated link; rates of 0 mean unthrottled. Not part of the arena: passed by the caller of tp_run / tp_queue_loop.
struct LinkParams {
  double up_bytes_per_s;
  double down_bytes_per_s;
  double latency_s;
  uint64_t adversarial_seed;
};

static_assert(sizeof(Insn) == 272 && sizeof(Entry) == 40 && sizeof(Mailbox) == 16 + 40 * MAILBOX_ENTRIES, "records are packed by construction");
static_assert(sizeof(Chain) == 96 && sizeof(Choice) == 32, "as CHAIN and CHOICE");
static_assert(sizeof(Control) <= EVENTS_OFFSET, "event slots follow the control block");

}  // namespace tp
