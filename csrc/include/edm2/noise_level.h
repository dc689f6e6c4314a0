// Scalar formulae of a noise level: the coefficients of preconditioning and of the sampler. One definition for the CPU
// kernels, the CUDA kernels and the emulation, as in math.h. sigma_data stays a double until its square is taken.
#pragma once

#include "edm2/math.h"

namespace edm2::math {

/// sigma^2 + sigma_data^2, the variance of a noisy image.
template <class T>
EDM2_FORMULA T noisy_variance(T sigma, double sigma_data) {
  return sigma * sigma + static_cast<T>(sigma_data * sigma_data);
}

/// The coefficients of preconditioning (Eqs. 5 to 7).
template <class T>
EDM2_FORMULA T c_skip(T sigma, double sigma_data) {
  return static_cast<T>(sigma_data * sigma_data) / noisy_variance(sigma, sigma_data);
}
template <class T>
EDM2_FORMULA T c_out(T sigma, double sigma_data) {
  return sigma * static_cast<T>(sigma_data) / std::sqrt(noisy_variance(sigma, sigma_data));
}
template <class T>
EDM2_FORMULA T c_in(T sigma, double sigma_data) {
  return T(1) / std::sqrt(noisy_variance(sigma, sigma_data));
}

/// What an Euler step from t_hat to t_next or Heun's correction of it (spec 6.1) multiplies with, with guidance (spec
/// 6.2) and what the next step begins with: noise, and its network's input at t_next * (1 + churn).
template <class T>
struct SamplerCoefficients {
  T slope;  // of x - D: the length of the step over the noise level at which D was evaluated
  T share;  // of the step from x in the result: 1, or 1/2 where that is the mean of two
  T more;   // guidance - 1
  T noise_scale;
  T c_in;
};

/// noise_per_t: the noise's standard deviation in units of t_next.
template <class T>
EDM2_FORMULA SamplerCoefficients<T> sampler_coefficients(T t_hat, T t_next, bool correction, T guidance, T churn,
                                                         T noise_per_t, double sigma_data) {
  return {(t_next - t_hat) / (correction ? t_next : t_hat), correction ? T(0.5) : T(1), guidance - T(1),
          t_next * noise_per_t, c_in(t_next * (T(1) + churn), sigma_data)};
}

/// Without noise. `start`: where Heun's method started; any finite number for an Euler step.
template <class T>
EDM2_FORMULA T sampler_step(const SamplerCoefficients<T>& k, T x, T denoised, T guide, T start) {
  const T guided = denoised + k.more * (denoised - guide);
  return k.share * (x + (x - guided) * k.slope) + (T(1) - k.share) * start;
}

}  // namespace edm2::math
