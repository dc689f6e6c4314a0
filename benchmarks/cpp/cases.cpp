// The table of cases. A new kernel gets a file cases/<op>.cpp, and a line in each of the two lists here.
#include "cases.h"

#include "cases/table.h"

namespace edm2::bench {

void mp_silu(Table& table);
void mp_sum(Table& table);
void mp_cat(Table& table);
void mp_fourier(Table& table);
void pixel_norm(Table& table);
void ema_update(Table& table);
void normalize_weight(Table& table);
void adam_step(Table& table);
void accumulate_snapshots(Table& table);
void resample(Table& table);
void resample_down_pixel_norm(Table& table);
void cosine_attention(Table& table);
void precondition(Table& table);
void denoising_loss(Table& table);
void sampler_step(Table& table);
void mp_conv2d(Table& table);
void conv_weight_grad(Table& table);

std::vector<Case> all_cases(Size size) {
  Table table{size, {}};
  mp_silu(table);
  mp_sum(table);
  mp_cat(table);
  mp_fourier(table);
  pixel_norm(table);
  ema_update(table);
  normalize_weight(table);
  adam_step(table);
  accumulate_snapshots(table);
  resample(table);
  resample_down_pixel_norm(table);
  cosine_attention(table);
  precondition(table);
  denoising_loss(table);
  sampler_step(table);
  mp_conv2d(table);
  conv_weight_grad(table);
  return std::move(table.cases);
}

int64_t Buffer::bytes() const { return numel * (dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2); }

}  // namespace edm2::bench
