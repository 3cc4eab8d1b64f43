// The kernels for any machine.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define TP_ISA 0
namespace tp {
namespace portable {
#include "kernels_body.h"
}  // namespace portable

const Kernels kPortable = {portable::linear_panels, portable::linear_in_block, portable::round_row, portable::quant_panel, portable::quant_in_block, portable::norm_row, portable::add_row, portable::embed_row, portable::rope_row, portable::attend_block, portable::argmax_row, portable::exp_row, portable::sum_blocks, portable::read_sum, portable::quantize_blocks, portable::fma_burn};
}  // namespace tp
