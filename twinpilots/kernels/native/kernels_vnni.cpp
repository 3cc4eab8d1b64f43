// The kernels for AVX512 with VNNI: the target pragma comes after every standard include, so that no shared inline function is compiled with it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")

#define TP_ISA 2
#define TP_VNNI 1
namespace tp {
namespace vnni {
#include "kernels_body.h"
}  // namespace vnni

const Kernels kAvx512Vnni = {vnni::linear_panels, vnni::linear_in_block, vnni::round_row, vnni::quant_panel, vnni::quant_in_block, vnni::norm_row, vnni::add_row, vnni::embed_row, vnni::rope_row, vnni::attend_block, vnni::argmax_row, vnni::exp_row, vnni::sum_blocks, vnni::read_sum, vnni::quantize_blocks, vnni::fma_burn};
}  // namespace tp
#endif
