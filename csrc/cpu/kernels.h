// The CPU kernels by name, and their declaration once per instruction set.
#pragma once

#include "edm2/accumulate_snapshots.h"
#include "edm2/adam_step.h"
#include "edm2/conv_weight_grad.h"
#include "edm2/cosine_attention.h"
#include "edm2/denoising_loss.h"
#include "edm2/ema_update.h"
#include "edm2/mp_cat.h"
#include "edm2/mp_fourier.h"
#include "edm2/mp_silu.h"
#include "edm2/mp_sum.h"
#include "edm2/normalize_weight.h"
#include "edm2/pixel_norm.h"
#include "edm2/precondition.h"
#include "edm2/resample.h"
#include "edm2/resample_down_pixel_norm.h"
#include "edm2/sampler_step.h"

/// KERNEL(name, parameter struct, storage types): every kernel is void name(const Params&, int64_t begin, int64_t end).
#define EDM2_CPU_KERNELS(KERNEL)                                                                             \
  KERNEL(pixel_norm, PixelNormParams, "float32 float64 bfloat16")                                            \
  KERNEL(pixel_norm_backward, PixelNormBackwardParams, "float32 float64 bfloat16")                           \
  KERNEL(mp_silu, MPSiLUParams, "float32 float64 bfloat16")                                                  \
  KERNEL(mp_silu_backward, MPSiLUBackwardParams, "float32 float64 bfloat16")                                 \
  KERNEL(mp_silu_modulated, MPSiLUModulatedParams, "float32 float64 bfloat16")                               \
  KERNEL(mp_silu_modulated_backward, MPSiLUModulatedBackwardParams, "float32 float64 bfloat16")              \
  KERNEL(mp_sum, MPSumParams, "float32 float64 bfloat16")                                                    \
  KERNEL(mp_sum_backward, MPSumBackwardParams, "float32 float64 bfloat16")                                   \
  KERNEL(mp_cat, MPCatParams, "float32 float64 bfloat16")                                                    \
  KERNEL(mp_cat_backward, MPCatBackwardParams, "float32 float64 bfloat16")                                   \
  KERNEL(mp_fourier, MPFourierParams, "float32 float64 bfloat16")                                            \
  KERNEL(mp_fourier_backward_x, MPFourierBackwardParams, "float32 float64 bfloat16")                         \
  KERNEL(mp_fourier_backward_buffers, MPFourierBackwardParams, "float32 float64 bfloat16")                   \
  KERNEL(resample_down, ResampleParams, "float32 float64 bfloat16")                                          \
  KERNEL(resample_up, ResampleParams, "float32 float64 bfloat16")                                            \
  KERNEL(resample_down_pixel_norm, ResampleDownPixelNormParams, "float32 float64 bfloat16")                  \
  KERNEL(resample_down_pixel_norm_backward, ResampleDownPixelNormBackwardParams, "float32 float64 bfloat16") \
  KERNEL(normalize_weight, NormalizeWeightParams, "float32 float64 bfloat16")                                \
  KERNEL(normalize_weight_backward, NormalizeWeightBackwardParams, "float32 float64 bfloat16")               \
  KERNEL(qkv_norm, QKVNormParams, "float32 float64 bfloat16")                                                \
  KERNEL(qkv_norm_backward, QKVNormBackwardParams, "float32 float64 bfloat16")                               \
  KERNEL(conv_weight_grad, ConvWeightGradParams, "float32 bfloat16")                                         \
  KERNEL(conv_operand, ConvOperandParams, "bfloat16")                                                        \
  KERNEL(precondition_scale, PreconditionScaleParams, "float32 float64 bfloat16")                            \
  KERNEL(precondition_output, PreconditionOutputParams, "float32 float64 bfloat16")                          \
  KERNEL(denoising_loss, DenoisingLossParams, "float32 float64 bfloat16")                                    \
  KERNEL(sampler_step, SamplerStepParams, "float32 float64 bfloat16")                                        \
  KERNEL(ema_update, EMAUpdateParams, "float32 float64 bfloat16")                                            \
  KERNEL(adam_step, AdamStepParams, "float32 float64")                                                       \
  KERNEL(accumulate_snapshots, AccumulateSnapshotsParams, "float16 bfloat16 float32")                        \
  KERNEL(sum_snapshots, AccumulateSnapshotsParams, "float16 bfloat16 float32")

#define EDM2_DECLARE_KERNEL(name, Params, dtypes) void name(const Params& params, int64_t begin, int64_t end);

namespace edm2::cpu {
namespace portable {
EDM2_CPU_KERNELS(EDM2_DECLARE_KERNEL)
}
#if defined(EDM2_CPU_X86_SETS)
namespace avx2 {
EDM2_CPU_KERNELS(EDM2_DECLARE_KERNEL)
}
namespace avx512 {
EDM2_CPU_KERNELS(EDM2_DECLARE_KERNEL)
}
#endif
}  // namespace edm2::cpu
