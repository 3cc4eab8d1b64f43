// One queue: waits, runs and records instructions strictly in order. docs/execution.md says what each instruction means.
#pragma once
#include <cstdint>
#include <vector>

#include "abi.h"
#include "kernels.h"
#include "link.h"
#include "pool.h"

namespace tp {

constexpr int ISA_AVX512_VNNI = 3, ISA_AMX = 4, ISA_AMX_EMULATED = 5;  // the last one for tests: best_isa never names it

const Kernels& kernels();            // of the chosen instruction set; before a choice the best one without tiles
const Kernels* kernels_of(int level);  // null when this machine cannot
int best_isa();
int isa();  // the level in use
int set_isa(int level);  // the level now in use, or -1 when this machine cannot

// choose.cpp: the next token, by its logits; -1 where they are not finite. No choice: the best one
int32_t choose(const Kernels& kernels, const float* row, int64_t n, const Choice* choice, double uniform);

// quantize.cpp: row blocks of `blocks` blocks of 32 weights (Q8_0 or Q4_1), and row blocks to columns of a panel
void quantize(int dtype, const float* weights, int64_t blocks, char* out, Pool* pool);
void pack_columns(int dtype, const char* row_blocks, int64_t row_stride, int64_t rows, int64_t blocks, char* panel, int64_t w, int64_t column, Pool* pool);

constexpr int MOST_TOGETHER = 3;  // linears over one input that are dealt to the threads at once

class Queue {
 public:
  Queue(void* host, void* gpu, int64_t mailbox_offset, Pool* pool, const LinkParams* link);

  int run(const Entry& entry) { return run(entry, ptr<int64_t[3]>(entry.trace)); }  // a Result
  int run_chain(Entry entry, Chain& chain);  // chain.cpp; `entry` is the first pass, pass ids count up from there
  int loop();                   // entries of the mailbox until abort or ENTRY_QUIT
  Mailbox* mailbox() const { return box_; }

 private:
  struct Rows {
    int64_t first, last;
  };
  struct RoundedOf {  // what the rounded activations were made of
    const float* src = nullptr;
    int64_t ld = 0, first = 0, last = 0, width = 0;
    int bits = 0, code_bytes = 0;
    bool operator==(const RoundedOf& o) const {
      return src == o.src && ld == o.ld && first == o.first && last == o.last && width == o.width && bits == o.bits && code_bytes == o.code_bytes;
    }
  };
  int run(const Entry& entry, int64_t (*trace)[3]);
  bool choose_all(const Chain& chain, int64_t sequences, int32_t* tokens);
  int wait_for(const Insn& insn, const Entry& entry);
  int wait_event(int event, int32_t value, int32_t pass_id);
  int execute(const Insn* insns, int together);
  int linears_together(const Insn* insns, int32_t left) const;
  static int64_t share_time(const Insn* insns, int count, int64_t (*trace)[3]);
  bool cancelled(int32_t pass_id) const;
  int64_t spin_ns() const;
  void dawdle();  // adversarial mode

  char* at(int64_t address) const;
  template <class T>
  T* ptr(int64_t address) const {
    return reinterpret_cast<T*>(at(address));
  }
  const int32_t* words(Meta offset_word) const { return meta_ + meta_[offset_word]; }
  Rows rows(const Insn& insn) const;
  Rows sequences(const Insn& insn, int glo, int ghi) const;
  Sequence sequence(int64_t index, Meta pages) const;

  int embed(const Insn& insn);
  int norm(const Insn& insn);
  int linear(const Insn* insns, int count);
  int linear_in(const Insn& insn);
  void forget_rounded(const Insn& insn);
  Rounded round(const float* src, int64_t src_ld, Rows r, int64_t width, int dtype, int64_t activations);
  const uint16_t* split(const float* src, int64_t src_ld, Rows r, int64_t width, int dtype);
  int rope_append(const Insn& insn);
  int attend(const Insn& insn);
  int add(const Insn& insn);
  int copy(const Insn& insn);
  int load(const Insn& insn);
  int load_kv(const Insn& insn);
  int store_kv(const Insn& insn);
  int poison(const Insn& insn);
  template <class F>
  void each_row(const Insn& insn, int64_t elements_per_row, F&& fn);

  char *host_, *gpu_;
  Mailbox* box_;
  Pool* pool_;
  Link link_;
  uint64_t random_;
  Rounded rounded_ = {nullptr, 0, 0, 0};
  RoundedOf rounded_of_;
  const int32_t* meta_ = nullptr;
  std::vector<int64_t> longest_first_, first_block_;  // attend: sequences in the order they are dealt, blocks before each; kept to avoid allocating in the step loop
};

}  // namespace tp
