// Every op's schema on one page. Implementations register themselves in <op>.cpp (CPU) and <op>_cuda.cpp (CUDA); shape
// functions and autograd are in Python, beside the op.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(edm2, m) {
  // pixel_norm
  m.def("pixel_norm(Tensor x, float eps) -> Tensor");
  m.def("pixel_norm_backward(Tensor grad, Tensor x, float eps) -> Tensor");
  m.def("pixel_norm_silu(Tensor x, float eps) -> (Tensor, Tensor)");
  m.def("pixel_norm_silu_backward(Tensor grad, Tensor grad_silu, Tensor x, float eps) -> Tensor");

  // mp_silu
  m.def("mp_silu(Tensor x) -> Tensor");
  m.def("mp_silu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("mp_silu_modulated(Tensor x, Tensor c) -> Tensor");
  m.def("mp_silu_modulated_backward(Tensor grad, Tensor x, Tensor c) -> (Tensor, Tensor)");
  m.def("mp_silu_modulated_dropout(Tensor x, Tensor c, Tensor philox, int subsequence, int threshold) -> Tensor");
  m.def(
      "mp_silu_modulated_dropout_backward(Tensor grad, Tensor x, Tensor c, Tensor philox, int subsequence, int "
      "threshold) -> (Tensor, Tensor)");

  // mp_sum
  m.def("mp_sum(Tensor a, Tensor b, float t, float clip) -> Tensor");
  m.def("mp_sum_clipped(Tensor a, Tensor b, float t, float clip) -> (Tensor, Tensor)");
  m.def(
      "mp_sum_backward(Tensor grad, Tensor? more_grad, Tensor? mask, float t, bool channels_last) -> (Tensor, Tensor)");

  // mp_cat
  m.def("mp_cat(Tensor a, Tensor b, float t) -> Tensor");
  m.def("mp_cat_backward(Tensor grad, int channels_a, float t) -> (Tensor, Tensor)");
  m.def("mp_cat_silu(Tensor a, Tensor b, float t) -> (Tensor, Tensor)");
  m.def("mp_cat_silu_backward(Tensor grad, Tensor grad_silu, Tensor out, int channels_a, float t) -> (Tensor, Tensor)");
  m.def("mp_cat_silu_only(Tensor a, Tensor b, float t) -> Tensor");
  m.def("mp_cat_silu_only_backward(Tensor grad, Tensor grad_silu, Tensor a, Tensor b, float t) -> (Tensor, Tensor)");

  // mp_fourier
  m.def("mp_fourier(Tensor x, Tensor freqs, Tensor phases) -> Tensor");
  m.def("mp_fourier_backward(Tensor grad, Tensor x, Tensor freqs, Tensor phases) -> (Tensor, Tensor, Tensor)");

  // resample
  m.def("resample_down(Tensor x, float[] filter) -> Tensor");
  m.def("resample_down_backward(Tensor grad, float[] filter, int height, int width) -> Tensor");
  m.def("resample_up(Tensor x, float[] filter) -> Tensor");
  m.def("resample_up_backward(Tensor grad, float[] filter) -> Tensor");

  // resample_down_pixel_norm
  m.def("resample_down_pixel_norm(Tensor x, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "resample_down_pixel_norm_backward(Tensor grad, Tensor grad_silu, Tensor y, Tensor rms, float eps, int height, "
      "int width) -> Tensor");

  // normalize_weight
  m.def("normalize_weight(Tensor w, float eps) -> Tensor");
  m.def("normalize_weight_backward(Tensor grad, Tensor w, float eps) -> Tensor");
  m.def("effective_weight(Tensor w, Tensor? gain, float scale, float eps, ScalarType dtype) -> Tensor");
  m.def("effective_weight_backward(Tensor grad, Tensor w, Tensor? gain, float scale, float eps) -> (Tensor, Tensor)");
  m.def("effective_weights(Tensor[] weights, Tensor[] gains, float eps, ScalarType dtype) -> Tensor[]");
  m.def(
      "effective_weights_backward(Tensor[] grads, Tensor[] weights, Tensor[] gains, float eps) -> (Tensor[], "
      "Tensor[])");
  m.def("force_normalize_(Tensor(a!)[] weights, float eps) -> ()");
  m.def("prepare_weights(Tensor(a!)[] weights, Tensor?[] gains, float eps, bool force, Tensor(b!)[] out) -> ()");

  // mp_conv2d; plan: tile and splits, or empty (edm2/mp_conv2d_plan.h)
  m.def("mp_conv2d(Tensor x, Tensor w, Tensor? gain, int[] plan) -> Tensor");
  m.def("mp_conv2d_backward_input(Tensor grad, Tensor w, int[] plan) -> Tensor");
  m.def("mp_conv2d_backward_weight(Tensor grad, Tensor x, int kernel_height, int kernel_width, int[] plan) -> Tensor");
  m.def("mp_conv2d_silu_modulated(Tensor x, Tensor w, Tensor c, bool keep, int[] plan) -> (Tensor, Tensor)");
  m.def(
      "mp_conv2d_sum(Tensor x, Tensor w, Tensor skip, float t, float clip, bool mask, int[] plan) -> (Tensor, Tensor)");
  m.def("mp_conv2d_qkv_norm(Tensor x, Tensor w, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("mp_cat_conv2d(Tensor a, Tensor b, Tensor w, float t, int[] plan) -> Tensor");
  m.def("mp_cat_conv2d_backward_weight(Tensor grad, Tensor a, Tensor b, float t, int[] plan) -> Tensor");

  // cosine_attention
  m.def("qkv_norm(Tensor qkv, int heads, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("qkv_norm_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, int heads, float eps) -> Tensor");

  // conv_weight_grad
  m.def("conv_weight_grad(Tensor grad, Tensor x, int kernel_size) -> Tensor");

  // precondition
  m.def("precondition_input(Tensor x, Tensor sigma, float sigma_data, ScalarType dtype, bool channels_last) -> Tensor");
  m.def("precondition_output(Tensor x, Tensor f, Tensor sigma, float sigma_data) -> Tensor");
  m.def(
      "precondition_output_backward(Tensor grad, Tensor sigma, float sigma_data, ScalarType dtype, bool channels_last) "
      "-> Tensor");

  // denoising_loss
  m.def(
      "denoising_loss(Tensor f, Tensor x, Tensor y, Tensor sigma, Tensor u, float sigma_data, float scale) -> (Tensor, "
      "Tensor, Tensor)");

  // sampler_step
  m.def(
      "sampler_step(Tensor x, Tensor denoised, Tensor? guide, float guidance, Tensor? start, Tensor t_hat, Tensor "
      "t_next, Tensor? noise, float noise_scale) -> Tensor");
  m.def(
      "sampler_step_input(Tensor x, Tensor denoised, Tensor? guide, float guidance, Tensor? start, Tensor t_hat, "
      "Tensor t_next, Tensor? noise, float noise_scale, float churn, float sigma_data, ScalarType dtype, bool "
      "channels_last) -> (Tensor, Tensor)");

  // ema_update
  m.def("ema_update_(Tensor(a!)[] emas, Tensor[] params, float[] weights) -> ()");

  // adam_step
  m.def(
      "adam_step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
      "emas, Tensor(e!)[] prepared, int[] prepared_of, int[] weights, int[] gains, int[] counters, Tensor scalars, "
      "Tensor? loss_scale, Tensor(f!) nonfinite, float beta1, float beta2, float eps, float norm_eps, bool effective, "
      "bool force) -> ()");

  // accumulate_snapshots
  m.def("accumulate_snapshots_(Tensor(a!) out, Tensor[] inputs, Tensor coefs, bool compensated) -> ()");
  m.def("sum_snapshots_(Tensor(a!) out, Tensor[] inputs, Tensor coefs, bool compensated) -> ()");
}

/// CUDA toolkit the kernels were compiled with, as 1000 * major + 10 * minor; 0: no CUDA kernels. For ctypes: needs no
/// _C.
extern "C" __attribute__((visibility("default"))) int edm2_cuda_toolkit_version() { return EDM2_CUDA_TOOLKIT; }

/// GPU architectures they were compiled for, separated by commas.
extern "C" __attribute__((visibility("default"))) const char* edm2_cuda_architectures() {
  return EDM2_CUDA_ARCHITECTURES;
}
