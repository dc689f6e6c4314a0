#include "table.h"

namespace edm2::bench {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "fp16";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat64:
      return "fp64";
    default:
      return "fp32";
  }
}

std::string Image::label() const {
  std::string text;
  for (const int64_t extent : {batch, channels, height, width}) {
    text.append(text.empty() ? " " : "x").append(std::to_string(extent));
  }
  return text.append(" ").append(name_of(dtype)).append(channels_last ? " nhwc" : " nchw");
}

std::vector<DType> Table::dtypes() const {
  if (size == Size::kCPU) return {DType::kFloat32, DType::kBFloat16};
  if (size == Size::kGPU) return {DType::kFloat16, DType::kFloat32};
  return {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
}

std::vector<Image> Table::images() const {
  std::vector<Image> found;
  for (const bool channels_last : {true, false}) {
    for (const DType dtype : dtypes()) {
      switch (size) {
        case Size::kSmall:
          found.push_back({2, 24, 6, 8, channels_last, dtype});
          found.push_back({3, 13, 4, 10, channels_last, dtype});
          found.push_back({1, 2056, 2, 2, channels_last, dtype});
          break;
        case Size::kCPU:
          found.push_back({16, 64, 16, 16, channels_last, dtype});
          break;
        case Size::kGPU:  // the widest activations of EDM2-S at 512 x 512
          found.push_back({dtype == DType::kFloat32 ? 128 : 256, 192, 64, 64, channels_last, dtype});
      }
    }
  }
  return found;
}

std::vector<Image> Table::noisy_images() const {
  std::vector<Image> found = images();
  if (size == Size::kSmall) return found;
  for (Image& image : found) {
    image.channels = 4;
    image.batch = size == Size::kGPU ? 4096 : 64;
  }
  return found;
}

}  // namespace edm2::bench
