// What the CPU and the CUDA half of the sampler's step share: the ops themselves, down to the launch.
#pragma once

#include "edm2/sampler_step.h"

#include <optional>
#include <tuple>

#include "noisy_image.h"

namespace edm2::torch_ops {

/// The tensors of a step, kept alive, and its parameters up to the outputs. check_device(x, tensor, op, argument)
/// raises unless both are on the same device.
template <auto check_device>
struct SamplerStep {
  View x;
  View denoised;
  std::optional<View> guide;
  std::optional<View> start;
  std::optional<View> noise;
  View t_hat;
  View t_next;
  SamplerStepParams params;

  SamplerStep(const Tensor& x_, ScalarType type, const Tensor& denoised_, const std::optional<Tensor>& guide_,
              double guidance, const std::optional<Tensor>& start_, const Tensor& t_hat_, const Tensor& t_next_,
              const std::optional<Tensor>& noise_, double noise_scale, const char* op)
      : x(image_view(x_, type, op, "x")),
        denoised(like_x(denoised_, op, "denoised")),
        guide(maybe_like_x(guide_, op, "guide")),
        start(maybe_like_x(start_, op, "start")),
        noise(maybe_like_x(noise_, op, "noise")),
        t_hat(level(t_hat_, op, "t_hat")),
        t_next(level(t_next_, op, "t_next")),
        params{} {
    const auto data = [](const std::optional<View>& view) { return view ? view->data() : nullptr; };
    params.x = x.data();
    params.denoised = denoised.data();
    params.guide = data(guide);
    params.start = data(start);
    params.noise = data(noise);
    params.t_hat = t_hat.data();
    params.t_next = t_next.data();
    params.shape = activation_of(x, op, "x");
    params.guidance = guidance;
    params.noise_scale = noise_scale;
    params.sigma_data = 1;
    params.dtype = dtype_of(type, op, "x");
  }

 private:
  View like_x(const Tensor& t, const char* op, const char* argument) const {
    check_device(x, View(t), op, argument);
    return gradient(t, x, op, argument);
  }

  std::optional<View> maybe_like_x(const std::optional<Tensor>& t, const char* op, const char* argument) const {
    return t ? std::optional(like_x(*t, op, argument)) : std::nullopt;
  }

  View level(const Tensor& t, const char* op, const char* argument) const {
    check_device(x, View(t), op, argument);
    const View view(t);
    EDM2_CHECK(view.numel == 1, op, argument, "expected one number, got shape ", view.shape());
    check_type(view, x.scalar_type, op, argument);
    return view;
  }
};

/// run(params, x, op) computes on one kind of device.
template <auto run, auto check_device>
Tensor sampler_step(const Tensor& x, const Tensor& denoised, const std::optional<Tensor>& guide, double guidance,
                    const std::optional<Tensor>& start, const Tensor& t_hat, const Tensor& t_next,
                    const std::optional<Tensor>& noise, double noise_scale) {
  const char* op = "sampler_step";
  SamplerStep<check_device> step(x, image_type(x.scalar_type()), denoised, guide, guidance, start, t_hat, t_next, noise,
                                 noise_scale, op);
  const Tensor out = empty_like(step.x);
  step.params.out = address(out);
  run(step.params, step.x, op);
  return out;
}

template <auto run, auto check_device>
std::tuple<Tensor, Tensor> sampler_step_input(const Tensor& x, const Tensor& denoised,
                                              const std::optional<Tensor>& guide, double guidance,
                                              const std::optional<Tensor>& start, const Tensor& t_hat,
                                              const Tensor& t_next, const std::optional<Tensor>& noise,
                                              double noise_scale, double churn, double sigma_data, ScalarType type,
                                              bool channels_last) {
  const char* op = "sampler_step_input";
  SamplerStep<check_device> step(x, image_type(type), denoised, guide, guidance, start, t_hat, t_next, noise,
                                 noise_scale, op);
  const int64_t sizes[4] = {step.x.sizes[0], step.x.sizes[1] + 1, step.x.sizes[2], step.x.sizes[3]};
  const Tensor out = empty_like(step.x);
  const Tensor input = empty(step.x, sizes, 4, format_of(channels_last), type);
  step.params.out = address(out);
  step.params.input = address(input);
  step.params.input_channels_last = channels_last;
  step.params.churn = churn;
  step.params.sigma_data = sigma_data;
  step.params.dtype = dtype_of(type, op, "dtype");
  run(step.params, step.x, op);
  return {out, input};
}

}  // namespace edm2::torch_ops
