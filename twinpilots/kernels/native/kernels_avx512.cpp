// The kernels for AVX512: the target pragma comes after every standard include, so that no shared inline function is compiled with it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

#define TP_ISA 2
namespace tp {
namespace avx512 {
#include "kernels_body.h"
}  // namespace avx512

const Kernels kAvx512 = {avx512::linear_panels, avx512::linear_in_block, avx512::round_row, avx512::quant_panel, avx512::quant_in_block, avx512::norm_row, avx512::add_row, avx512::embed_row, avx512::rope_row, avx512::attend_block, avx512::argmax_row, avx512::exp_row, avx512::sum_blocks, avx512::read_sum, avx512::quantize_blocks, avx512::fma_burn};
}  // namespace tp
#endif
