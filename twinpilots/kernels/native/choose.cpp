// Which token comes next: the best one, or a draw. runtime/choice.py is the slow twin, bit for bit.
#include <algorithm>
#include <functional>
#include <vector>

#include "interp.h"

namespace tp {

constexpr int64_t BLOCK = 64;

// The k-th largest number of a row: the root of a heap of the k largest so far, that most numbers never enter.
static float kth_largest(const float* row, int64_t n, int64_t k) {
  std::vector<float> heap(row, row + k);
  std::make_heap(heap.begin(), heap.end(), std::greater<float>());
  for (int64_t i = k; i < n; i++) {
    if (!(row[i] > heap.front())) continue;
    std::pop_heap(heap.begin(), heap.end(), std::greater<float>());
    heap.back() = row[i];
    std::push_heap(heap.begin(), heap.end(), std::greater<float>());
  }
  return heap.front();
}

// Zeroes all but the likeliest entries before which less than `needed` has been seen, lower tokens first among equals. Only what can be among them is sorted: all
// entries below half an n-th of what may be left out come last in the order, and all together are less than that.
static void keep_nucleus(double* p, int64_t n, double total, double top_p) {
  const double needed = top_p * total, least = top_p < 1.0 - 1e-6 ? 0.5 * (1.0 - top_p) * total / (double)n : 0.0;
  std::vector<int32_t> order;
  for (int64_t i = 0; i < n; i++)
    if (p[i] > 0.0 && p[i] >= least) order.push_back((int32_t)i);
  const auto before = [&](int32_t a, int32_t b) { return p[a] != p[b] ? p[a] > p[b] : a < b; };
  double seen = 0.0;
  size_t count = 0;
  for (size_t sorted = 0; sorted < order.size() && seen < needed;) {
    const size_t next = std::min(order.size(), sorted ? 4 * sorted : 64);
    if (next < order.size()) std::nth_element(order.begin() + (ptrdiff_t)sorted, order.begin() + (ptrdiff_t)next, order.end(), before);
    std::sort(order.begin() + (ptrdiff_t)sorted, order.begin() + (ptrdiff_t)next, before);
    for (sorted = next; count < sorted && seen < needed; count++) seen += p[order[count]];
  }
  const int32_t last = order[count - 1];
  const double lowest = p[last];
  for (int64_t i = 0; i < n; i++)
    if (!(p[i] > lowest || (p[i] == lowest && i <= last))) p[i] = 0.0;
}

static double total_of(const Kernels& k, const double* p, std::vector<double>& sums) {
  k.sum_blocks(p, (int64_t)sums.size() * BLOCK, sums.data());
  double total = 0.0;
  for (double sum : sums) total += sum;
  return total;
}

int32_t choose(const Kernels& k, const float* row, int64_t n, const Choice* choice, double uniform) {
  const int64_t top = k.argmax_row(row, n);
  if (top < 0 || !choice || choice->temperature == 0.0) return (int32_t)top;
  const float best = row[top], temperature = (float)choice->temperature;
  float floor = (float)choice->floor;
  if (0 < choice->top_k && choice->top_k < n) floor = std::max(floor, (kth_largest(row, n, choice->top_k) - best) / temperature);
  std::vector<double> sums((size_t)((n + BLOCK - 1) / BLOCK)), p(sums.size() * BLOCK);
  k.exp_row(row, n, best, temperature, floor, p.data());
  double total = total_of(k, p.data(), sums);
  if (choice->top_p < 1.0) {
    keep_nucleus(p.data(), n, total, choice->top_p);
    total = total_of(k, p.data(), sums);
  }
  const double target = uniform * total;
  double seen = 0.0;
  size_t block = 0;
  while (block < sums.size() && !(seen + sums[block] > target)) seen += sums[block++];
  int64_t likely = top;
  if (block < sums.size()) {
    for (int64_t i = (int64_t)block * BLOCK; i < (int64_t)(block + 1) * BLOCK; i++) {
      seen += p[(size_t)i];
      if (p[(size_t)i] > 0.0) likely = i;
      if (seen > target) break;
    }
    return (int32_t)likely;
  }
  for (int64_t i = n - 1; i >= 0; i--)
    if (p[(size_t)i] > 0.0) return (int32_t)i;
  return (int32_t)top;
}

}  // namespace tp
