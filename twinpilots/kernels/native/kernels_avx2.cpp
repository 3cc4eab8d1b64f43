// The kernels for AVX2: the target pragma comes after every standard include, so that no shared inline function is compiled with it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c")

#define TP_ISA 1
namespace tp {
namespace avx2 {
#include "kernels_body.h"
}  // namespace avx2

const Kernels kAvx2 = {avx2::linear_panels, avx2::linear_in_block, avx2::round_row, avx2::quant_panel, avx2::quant_in_block, avx2::norm_row, avx2::add_row, avx2::embed_row, avx2::rope_row, avx2::attend_block, avx2::argmax_row, avx2::exp_row, avx2::sum_blocks, avx2::read_sum, avx2::quantize_blocks, avx2::fma_burn};
}  // namespace tp
#endif
