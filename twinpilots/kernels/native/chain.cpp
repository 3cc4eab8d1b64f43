// Decoding passes one after another: what the driver would do between them, where there is nothing to decide (docs/execution.md, "Chained passes").
#include "interp.h"
#include "sync.h"

namespace tp {

static bool stops(const Chain& chain, int64_t sequence, int32_t token) {
  const int32_t *ids = reinterpret_cast<const int32_t*>(chain.stop_ids), *ends = reinterpret_cast<const int32_t*>(chain.stop_ends);
  for (int32_t i = sequence ? ends[sequence - 1] : 0; i < ends[sequence]; i++)
    if (ids[i] == token) return true;
  return false;
}

// Every sequence brings the token that it was given: one position further, in the page that its table has for it.
static void advance(int32_t* meta, const int32_t* tokens, int64_t page_size) {
  const auto words = [&](Meta offset) { return meta + meta[offset]; };
  for (int64_t i = 0; i < meta[NUM_SEQS]; i++) {
    const int64_t position = ++words(OFF_POSITION)[i];
    words(OFF_TOKEN)[i] = tokens[i];
    words(OFF_ROPE_ROW)[i]++;
    words(OFF_SEQ_KV)[i]++;
    const int64_t page = words(OFF_PAGE)[words(OFF_SEQ_PAGES)[i] + position / page_size];
    words(OFF_SLOT)[i] = (int32_t)(page * page_size + position % page_size);
  }
}

// One token for every sequence; false where logits are not finite.
bool Queue::choose_all(const Chain& chain, int64_t sequences, int32_t* tokens) {
  const float* logits = ptr<const float>(chain.logits);
  const auto* choices = reinterpret_cast<const Choice*>(chain.choices);
  const auto* uniforms = reinterpret_cast<const double*>(chain.uniforms) + chain.done * sequences;
  parallel(pool_, sequences, [&](int64_t i) { tokens[i] = choose(kernels(), logits + i * chain.width, chain.width, choices + i, uniforms[i]); });
  for (int64_t i = 0; i < sequences; i++)
    if (tokens[i] < 0) return false;
  return true;
}

int Queue::run_chain(Entry entry, Chain& chain) {
  int32_t* meta = ptr<int32_t>(entry.meta);
  const int64_t sequences = meta[NUM_SEQS], began = now_ns();
  if (meta[NUM_TOKENS] != sequences || meta[NUM_LOGITS] != sequences || chain.page_size <= 0) return BAD_INSTRUCTION;
  auto* times = reinterpret_cast<int64_t(*)[3]>(chain.times);
  auto* ended = reinterpret_cast<int64_t*>(chain.ended_ns);
  int32_t* tokens = reinterpret_cast<int32_t*>(chain.tokens);
  for (chain.done = 0; chain.done < chain.passes; tokens += sequences, times += entry.count, entry.first_pass = ++entry.pass_id) {
    const int64_t pass_began = chain.done ? ended[chain.done - 1] : began;
    if (chain.done) advance(meta, tokens - sequences, chain.page_size);
    publish(host_, event_slot(host_, EVENT_START), (uint32_t)entry.pass_id);
    if (const int error = run(entry, times)) return error;
    if (!choose_all(chain, sequences, tokens)) return OK;
    const int64_t now = ended[chain.done++] = now_ns();
    bool over = word(&chain.hurry).load(std::memory_order_relaxed) != 0 || now + (now - pass_began) - began > chain.budget_ns;
    for (int64_t i = 0; i < sequences; i++) over |= stops(chain, i, tokens[i]);
    if (over) return OK;
  }
  return OK;
}

}  // namespace tp
