// The table of cases. A new kernel gets a function here that adds its cases, and a line in all_cases.
#include "cases.h"

#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "edm2/accumulate_snapshots.h"
#include "edm2/adam_step.h"
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

// Each of the two programs holds one half of the kernels, and names the other half nowhere.
#ifdef EDM2_BENCH_CUDA
#define GPU(...) __VA_ARGS__
#define CPU(...) nullptr
#define GPU_OR_0(...) __VA_ARGS__
#else
#define GPU(...) nullptr
#define CPU(...) __VA_ARGS__
#define GPU_OR_0(...) 0
#endif

namespace edm2::bench {

int64_t Buffer::bytes() const { return numel * (dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2); }

namespace {

constexpr double kEps = 1e-4;

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

/// An activation tensor [batch, channels, height, width].
struct Image {
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool channels_last;
  DType dtype;

  Activation shape() const { return {batch, channels, height * width, channels_last}; }
  int64_t numel() const { return batch * channels * height * width; }
  Buffer in() const { return {numel(), dtype, true}; }
  Buffer out() const { return {numel(), dtype, false}; }
  Buffer vector_in() const { return {batch * channels, dtype, true}; }  // [batch, channels]
  Buffer vector_out() const { return {batch * channels, dtype, false}; }
  /// Work items of the CPU kernels that take pixels (channels_last) or planes.
  int64_t pixels_or_planes() const { return channels_last ? batch * height * width : batch * channels; }
  /// " 256x192x64x64 fp16 nhwc"
  std::string label() const {
    std::string text;
    for (const int64_t extent : {batch, channels, height, width}) {
      text.append(text.empty() ? " " : "x").append(std::to_string(extent));
    }
    return text.append(" ").append(name_of(dtype)).append(channels_last ? " nhwc" : " nchw");
  }
};

struct Table {
  Size size;
  std::vector<Case> cases;

  std::vector<DType> dtypes() const {
    if (size == Size::kCPU) return {DType::kFloat32, DType::kBFloat16};
    if (size == Size::kGPU) return {DType::kFloat16, DType::kFloat32};
    return {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  }

  /// The activations that every kernel on activations is timed with.
  std::vector<Image> images() const {
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

  /// `make` builds the parameters from the pointers to the buffers; `launch` is the launcher of the CUDA kernel,
  /// `kernel` the CPU kernel over so many `items`.
  template <class Make, class Params = std::invoke_result_t<Make, const Pointers&>>
  void add(std::string name, std::vector<Buffer> buffers, Make make,
           std::type_identity_t<std::function<int(const Params&, CUstream_st*)>> launch,
           std::type_identity_t<std::function<void(const Params&, int64_t, int64_t)>> kernel, int64_t items) {
    Case added{std::move(name), std::move(buffers), {}, {}};
    if (launch) {
      added.gpu = [=](const Pointers& pointers, CUstream_st* stream) { return launch(make(pointers), stream); };
    }
    if (kernel) added.cpu = [=](const Pointers& pointers) { kernel(make(pointers), 0, items); };
    cases.push_back(std::move(added));
  }

  /// The same for a launcher with a workspace of so many floats, which is the last of the pointers.
  template <class Make, class Params = std::invoke_result_t<Make, const Pointers&>>
  void add(std::string name, std::vector<Buffer> buffers, int64_t floats, Make make,
           std::type_identity_t<std::function<int(const Params&, float*, CUstream_st*)>> launch,
           std::type_identity_t<std::function<void(const Params&, int64_t, int64_t)>> kernel, int64_t items) {
    buffers.push_back({floats, DType::kFloat32, false});
    add(std::move(name), std::move(buffers), make, nullptr, kernel, items);
    if (!launch) return;
    cases.back().gpu = [=](const Pointers& pointers, CUstream_st* stream) {
      return launch(make(pointers), static_cast<float*>(pointers.back()), stream);
    };
  }
};

void mp_silu(Table& table) {
  for (const Image& image : table.images()) {
    if (!image.channels_last) continue;  // the layout is the same to it
    const auto [numel, dtype] = std::pair(image.numel(), image.dtype);
    table.add(
        "mp_silu" + image.label(), {image.in(), image.out()},
        [=](const Pointers& p) { return MPSiLUParams{p[0], p[1], numel, dtype}; }, GPU(cuda::launch_mp_silu),
        CPU(cpu::mp_silu), numel);
    table.add(
        "mp_silu_backward" + image.label(), {image.in(), image.in(), image.out()},
        [=](const Pointers& p) { return MPSiLUBackwardParams{p[0], p[1], p[2], numel, dtype}; },
        GPU(cuda::launch_mp_silu_backward), CPU(cpu::mp_silu_backward), numel);
  }
}

void mp_silu_modulated(Table& table) {
  for (const Image& image : table.images()) {
    table.add(
        "mp_silu_modulated" + image.label(), {image.in(), image.vector_in(), image.out()},
        [=](const Pointers& p) { return MPSiLUModulatedParams{p[0], p[1], p[2], image.shape(), image.dtype}; },
        GPU(cuda::launch_mp_silu_modulated), CPU(cpu::mp_silu_modulated), image.pixels_or_planes());
    table.add(
        "mp_silu_modulated_backward" + image.label(),
        {image.in(), image.in(), image.vector_in(), image.out(), image.vector_out()},
        GPU_OR_0(cuda::mp_silu_modulated_backward_workspace(image.shape())),
        [=](const Pointers& p) {
          return MPSiLUModulatedBackwardParams{p[0], p[1], p[2], p[3], p[4], image.shape(), image.dtype};
        },
        GPU(cuda::launch_mp_silu_modulated_backward), CPU(cpu::mp_silu_modulated_backward),
        cpu::mp_silu_modulated_backward_items(image.shape()));
  }
}

void mp_sum(Table& table) {
  for (const Image& image : table.images()) {
    if (!image.channels_last) continue;  // the layout is the same to it
    const auto [numel, dtype] = std::pair(image.numel(), image.dtype);
    for (const double clip : {std::numeric_limits<double>::infinity(), 1.0}) {
      const std::string label = (clip == 1.0 ? " clipped" : "") + image.label();
      table.add(
          "mp_sum" + label, {image.in(), image.in(), image.out()},
          [=](const Pointers& p) { return MPSumParams{p[0], p[1], p[2], numel, dtype, 0.92, 0.39, clip}; },
          GPU(cuda::launch_mp_sum), CPU(cpu::mp_sum), numel);
      table.add(
          "mp_sum_backward" + label, {image.in(), image.in(), image.in(), image.out(), image.out()},
          [=](const Pointers& p) {
            return MPSumBackwardParams{p[0], p[1], p[2], p[3], p[4], numel, dtype, 0.92, 0.39, clip};
          },
          GPU(cuda::launch_mp_sum_backward), CPU(cpu::mp_sum_backward), numel);
    }
  }
}

/// Two thirds of the channels come from a.
void mp_cat(Table& table) {
  for (const Image& image : table.images()) {
    const int64_t channels_a = image.channels / 3 * 2;
    const int64_t channel_size = image.channels_last ? 1 : image.height * image.width;
    const int64_t rows = image.numel() / (image.channels * channel_size);
    const int64_t size_a = channels_a * channel_size;
    const int64_t size_b = image.channels * channel_size - size_a;
    const auto dtype = image.dtype;
    for (const bool silu : {false, true}) {
      const std::string label = (silu ? "_silu" : "");
      std::vector<Buffer> forward{{rows * size_a, dtype, true}, {rows * size_b, dtype, true}, image.out()};
      std::vector<Buffer> backward{image.in(), {rows * size_a, dtype, false}, {rows * size_b, dtype, false}};
      if (silu) {
        forward.push_back(image.out());
        backward.push_back(image.in());
        backward.push_back(image.in());
      }
      table.add(
          "mp_cat" + label + image.label(), forward,
          [=](const Pointers& p) {
            return MPCatParams{p[0], p[1], p[2], silu ? p[3] : nullptr, rows, size_a, size_b, dtype, 0.9, 1.2};
          },
          GPU(cuda::launch_mp_cat), CPU(cpu::mp_cat), image.numel());
      table.add(
          "mp_cat" + label + "_backward" + image.label(), backward,
          [=](const Pointers& p) {
            return MPCatBackwardParams{
                p[0], silu ? p[3] : nullptr, silu ? p[4] : nullptr, p[1], p[2], rows, size_a, size_b, dtype, 0.9, 1.2};
          },
          GPU(cuda::launch_mp_cat_backward), CPU(cpu::mp_cat_backward), image.numel());
    }
  }
}

void mp_fourier(Table& table) {
  const int64_t batch = table.size == Size::kSmall ? 9 : 256;
  const int64_t channels = table.size == Size::kSmall ? 35 : 192;
  for (const DType dtype : table.dtypes()) {
    const std::string label =
        std::string(" ") + std::to_string(batch) + "x" + std::to_string(channels) + " " + name_of(dtype);
    const Buffer x{batch, dtype, true};
    const Buffer buffer{channels, DType::kFloat32, true};
    const Buffer grad_x{batch, dtype, false};
    const Buffer grad_buffer{channels, DType::kFloat32, false};
    table.add(
        "mp_fourier" + label, {x, buffer, buffer, {batch * channels, dtype, false}},
        [=](const Pointers& p) { return MPFourierParams{p[0], p[1], p[2], p[3], batch, channels, dtype}; },
        GPU(cuda::launch_mp_fourier), CPU(cpu::mp_fourier), batch);
    table.add(
        "mp_fourier_backward" + label,
        {{batch * channels, dtype, true}, x, buffer, buffer, grad_x, grad_buffer, grad_buffer},
        [=](const Pointers& p) {
          return MPFourierBackwardParams{p[0], p[1], p[2], p[3], p[4], p[5], p[6], batch, channels, dtype};
        },
        GPU(cuda::launch_mp_fourier_backward), CPU([](const MPFourierBackwardParams& params, int64_t, int64_t) {
          cpu::mp_fourier_backward_x(params, 0, params.batch);
          cpu::mp_fourier_backward_buffers(params, 0, params.channels);
        }),
        0);
  }
}

void accumulate_snapshots(Table& table) {
  struct Shape {
    int64_t inputs;
    int64_t outputs;
  };
  const int64_t numel = table.size == Size::kSmall ? 1037 : table.size == Size::kCPU ? 1 << 16 : 1 << 24;
  for (const auto& [num_inputs, num_outputs] : {Shape{1, 12}, Shape{8, 6}, Shape{40, 20}}) {
    for (const bool compensated : {false, true}) {
      // What the parameters point to stays where it is for as long as the case lives.
      struct Lists {
        std::vector<SnapshotInput> inputs;
        std::vector<double> coefs;
      };
      const auto lists = std::make_shared<Lists>();
      for (int64_t i = 0; i < num_inputs * num_outputs; ++i) lists->coefs.push_back(0.1 * static_cast<double>(i % 7));
      std::vector<Buffer> buffers(static_cast<size_t>(num_inputs), {numel, DType::kFloat16, true});
      buffers.push_back({num_outputs * numel, DType::kFloat32, true});
      table.add(
          std::string("accumulate_snapshots ") + std::to_string(num_inputs) + " -> " + std::to_string(num_outputs) +
              (compensated ? " compensated" : ""),
          buffers,
          [=, num_inputs = num_inputs, num_outputs = num_outputs](const Pointers& p) {
            lists->inputs.clear();
            for (size_t n = 0; n + 1 < p.size(); ++n) lists->inputs.push_back({p[n], DType::kFloat16});
            return AccumulateSnapshotsParams{static_cast<float*>(p.back()),
                                             lists->inputs.data(),
                                             lists->coefs.data(),
                                             num_inputs,
                                             num_outputs,
                                             numel,
                                             numel,
                                             compensated};
          },
          GPU(cuda::launch_accumulate_snapshots), CPU(cpu::accumulate_snapshots), numel);
    }
  }
}

void pixel_norm(Table& table) {
  for (const Image& image : table.images()) {
    const int64_t pixels = image.batch * image.height * image.width;
    for (const bool silu : {false, true}) {
      const std::string suffix = (silu ? "_silu" : "");
      std::vector<Buffer> forward{image.in(), image.out()};
      std::vector<Buffer> backward{image.in(), image.in(), image.out()};
      if (silu) {
        forward.push_back(image.out());
        backward.push_back(image.in());
      }
      table.add(
          "pixel_norm" + suffix + image.label(), forward,
          [=](const Pointers& p) {
            return PixelNormParams{p[0], p[1], silu ? p[2] : nullptr, image.shape(), image.dtype, kEps};
          },
          GPU(cuda::launch_pixel_norm), CPU(cpu::pixel_norm), pixels);
      table.add(
          "pixel_norm" + suffix + "_backward" + image.label(), backward,
          [=](const Pointers& p) {
            return PixelNormBackwardParams{p[0], silu ? p[3] : nullptr, p[1], p[2], image.shape(), image.dtype, kEps};
          },
          GPU(cuda::launch_pixel_norm_backward), CPU(cpu::pixel_norm_backward), pixels);
    }
  }
}

// ---- whole networks ----

struct Network {
  const char* name;
  int64_t model_channels;
  int64_t levels;  // channels 1, 2, ... times model_channels
  int64_t blocks;  // of a level
};

struct Weight {
  int64_t rows;
  int64_t row_size;
};

std::vector<Network> networks(Size size) {
  if (size == Size::kGPU) return {{"EDM2-S", 192, 4, 3}, {"EDM2-XXL", 448, 4, 3}};
  return {{"a small network", size == Size::kSmall ? 8 : 32, 2, 1}};
}

/// The weights of the U-Net for latents [4, ., .] and 1000 classes, attention on the two lower levels (spec 3.1
/// to 3.3).
std::vector<Weight> weights_of(const Network& network) {
  const int64_t base = network.model_channels;
  const int64_t emb = base * network.levels;
  std::vector<Weight> weights{{emb, base}, {emb, 1000}, {base, 5 * 9}};
  const auto block = [&](int64_t in, int64_t out, bool decoder, bool attention) {
    weights.push_back({out, (decoder ? in : out) * 9});
    weights.push_back({out, emb});
    weights.push_back({out, out * 9});
    if (in != out) weights.push_back({out, in});
    if (attention) {
      weights.push_back({3 * out, out});
      weights.push_back({out, out});
    }
  };
  std::vector<int64_t> skips{base};
  int64_t width = base;
  for (int64_t level = 0; level < network.levels; ++level) {
    if (level > 0) {
      block(width, width, false, false);
      skips.push_back(width);
    }
    for (int64_t i = 0; i < network.blocks; ++i) {
      block(width, base * (level + 1), false, level >= network.levels - 2);
      skips.push_back(width = base * (level + 1));
    }
  }
  for (int64_t level = network.levels - 1; level >= 0; --level) {
    block(width, width, true, level == network.levels - 1);
    if (level == network.levels - 1) block(width, width, true, false);
    for (int64_t i = 0; i <= network.blocks; ++i) {
      block(width + skips.back(), base * (level + 1), true, level >= network.levels - 2);
      skips.pop_back();
      width = base * (level + 1);
    }
  }
  weights.push_back({4, base * 9});
  return weights;
}

/// Tensors laid end to end in one buffer, each at a multiple of 16 bytes.
struct Ends {
  std::vector<int64_t> offsets;
  int64_t numel = 0;

  explicit Ends(const std::vector<Weight>& weights) {
    for (const Weight& weight : weights) {
      offsets.push_back(numel);
      numel += (weight.rows * weight.row_size + 7) / 8 * 8;
    }
  }
};

void ema_update(Table& table) {
  constexpr int64_t kProfiles = 2;
  static const double kWeights[kProfiles] = {0.1, 0.2};
  for (const Network& network : networks(table.size)) {
    const std::vector<Weight> weights = weights_of(network);
    const Ends ends(weights);
    const Buffer buffer{ends.numel, DType::kFloat32, true};
    // What the parameters point to stays where it is for as long as the case lives.
    struct Lists {
      std::vector<EMATensor> tensors;
      std::vector<void*> emas;
    };
    const auto lists = std::make_shared<Lists>();
    lists->tensors.resize(weights.size());
    lists->emas.resize(weights.size() * kProfiles);
    int64_t items = 0;
    for (const Weight& weight : weights) items += weight.rows * weight.row_size;
    table.add(
        std::string("ema_update 2 profiles of ") + network.name, std::vector<Buffer>(1 + kProfiles, buffer),
        [=](const Pointers& p) {
          for (size_t i = 0; i < weights.size(); ++i) {
            const auto tensor = [&](size_t k) { return static_cast<float*>(p[k]) + ends.offsets[i]; };
            void** emas = &lists->emas[i * kProfiles];
            for (size_t k = 0; k < kProfiles; ++k) emas[k] = tensor(1 + k);
            lists->tensors[i] = {tensor(0), emas, weights[i].rows * weights[i].row_size};
          }
          return EMAUpdateParams{lists->tensors.data(), kWeights, static_cast<int64_t>(weights.size()), kProfiles,
                                 DType::kFloat32};
        },
        GPU(cuda::launch_ema_update), CPU(cpu::ema_update), items);
  }
}

/// Effective weights of a whole network in fp16 (bf16 on the CPU), with and without forced normalisation, and their
/// backward, with one gain for every tensor.
void normalize_weight(Table& table) {
  const DType half = table.size == Size::kCPU ? DType::kBFloat16 : DType::kFloat16;
  for (const Network& network : networks(table.size)) {
    const std::vector<Weight> weights = weights_of(network);
    const Ends ends(weights);
    const auto count = static_cast<int64_t>(weights.size());
    struct Lists {
      std::vector<WeightRows> tensors;
      std::vector<WeightRowsBackward> backward;
      std::vector<int64_t> offsets{0};
      int64_t rows = 0;
    };
    const auto lists = std::make_shared<Lists>();
    lists->tensors.resize(weights.size());
    lists->backward.resize(weights.size());
    for (const Weight& weight : weights) {
      lists->offsets.push_back(lists->offsets.back() + weight.rows * weight.row_size);
      lists->rows += weight.rows;
    }
    const Buffer raw{ends.numel, DType::kFloat32, true};
    const Buffer effective{ends.numel, half, true};
    const Buffer gains{count, DType::kFloat32, true};
    for (const bool force : {false, true}) {
      table.add(
          std::string(force ? "normalize_weight_forced " : "normalize_weight ") + network.name, {raw, effective, gains},
          [=](const Pointers& p) {
            for (size_t i = 0; i < weights.size(); ++i) {
              const auto [rows, row_size] = weights[i];
              lists->tensors[i] = {static_cast<float*>(p[0]) + ends.offsets[i],
                                   static_cast<uint16_t*>(p[1]) + ends.offsets[i],
                                   rows,
                                   row_size,
                                   1,
                                   GPU_OR_0(static_cast<const float*>(p[2]) + i),
                                   1.0 / std::sqrt(static_cast<double>(row_size)),
                                   half};
            }
            return NormalizeWeightParams{
                lists->tensors.data(), lists->offsets.data(), count, DType::kFloat32, kEps, force};
          },
          GPU(cuda::launch_normalize_weight), CPU(cpu::normalize_weight), lists->offsets.back());
    }
    // On the GPU the dots of a row are floats.
    const Buffer dots{lists->rows, GPU_OR_0(true) ? DType::kFloat32 : DType::kFloat64, false};
    table.add(
        std::string("normalize_weight_backward ") + network.name, {effective, raw, raw, dots, gains, gains},
        [=](const Pointers& p) {
          int64_t row = 0;
          for (size_t i = 0; i < weights.size(); ++i) {
            const auto [rows, row_size] = weights[i];
            const double factor = 1.0 / std::sqrt(static_cast<double>(row_size));
            auto* row_dots = static_cast<unsigned char*>(p[3]) + dots.bytes() / lists->rows * row;
            lists->backward[i] = {static_cast<uint16_t*>(p[0]) + ends.offsets[i],
                                  static_cast<float*>(p[1]) + ends.offsets[i],
                                  static_cast<float*>(p[2]) + ends.offsets[i],
                                  row_dots,
                                  rows,
                                  row_size,
                                  GPU_OR_0(static_cast<const float*>(p[4]) + i),
                                  factor,
                                  GPU_OR_0(static_cast<float*>(p[5]) + i),
                                  factor};
            row += rows;
          }
          return NormalizeWeightBackwardParams{
              lists->backward.data(), lists->offsets.data(), count, DType::kFloat32, half, kEps};
        },
        GPU(cuda::launch_normalize_weight_backward), CPU(cpu::normalize_weight_backward), lists->offsets.back());
  }
}

/// The whole optimizer step with gradients of effective weights, two averages and the next forward's effective weights
/// in fp16 (bf16 on the CPU).
void adam_step(Table& table) {
  constexpr int64_t kProfiles = 2;
  const DType half = table.size == Size::kCPU ? DType::kBFloat16 : DType::kFloat16;
  for (const Network& network : networks(table.size)) {
    const std::vector<Weight> weights = weights_of(network);
    const Ends ends(weights);
    struct Lists {
      std::vector<AdamTensor> tensors;
      std::vector<void*> emas;
      std::vector<int64_t> offsets{0};
    };
    const auto lists = std::make_shared<Lists>();
    const auto count = static_cast<int64_t>(weights.size());
    lists->tensors.resize(weights.size());
    lists->emas.resize(weights.size() * kProfiles);
    for (const Weight& weight : weights)
      lists->offsets.push_back(lists->offsets.back() + weight.rows * weight.row_size);
    const Buffer raw{ends.numel, DType::kFloat32, true};
    const Buffer zeros{ends.numel, DType::kFloat32, false};  // random squares would have no root
    const Buffer scalars{2 + kProfiles, DType::kFloat64, true};
    table.add(
        std::string("adam_step 2 profiles of ") + network.name,
        {raw, raw, raw, zeros, raw, raw, {ends.numel, half, false}, scalars, {count, DType::kFloat64, false}},
        [=](const Pointers& p) {
          for (size_t i = 0; i < weights.size(); ++i) {
            const auto tensor = [&](size_t k) { return static_cast<float*>(p[k]) + ends.offsets[i]; };
            void** emas = &lists->emas[i * kProfiles];
            for (size_t k = 0; k < kProfiles; ++k) emas[k] = tensor(4 + k);
            AdamTensor& t = lists->tensors[i] = {};
            t.param = tensor(0);
            t.grad = tensor(1);
            t.exp_avg = tensor(2);
            t.exp_avg_sq = tensor(3);
            t.emas = emas;
            t.nonfinite = static_cast<int64_t*>(p[8]) + i;
            t.prepared = static_cast<uint16_t*>(p[6]) + ends.offsets[i];
            t.prepared_dtype = half;
            t.rows = weights[i].rows;
            t.row_size = weights[i].row_size;
            t.inner = 1;
            t.weight = true;
          }
          return AdamStepParams{lists->tensors.data(),
                                lists->offsets.data(),
                                count,
                                kProfiles,
                                static_cast<const double*>(p[7]),
                                nullptr,
                                DType::kFloat32,
                                0.9,
                                0.99,
                                1e-8,
                                kEps,
                                true,
                                true};
        },
        GPU(cuda::launch_adam_step), CPU(cpu::adam_step), lists->offsets.back());
  }
}

/// Down and up with the 2 x 2 filter, and down with one of four taps.
void resample(Table& table) {
  static const double kTwo[] = {0.5, 0.5};
  static const double kFour[] = {0.125, 0.375, 0.375, 0.125};
  for (const Image& image : table.images()) {
    const Image half{image.batch, image.channels, image.height / 2, image.width / 2, image.channels_last, image.dtype};
    const auto work = [](const Image& of) { return of.channels_last ? of.batch * of.height : of.batch * of.channels; };
    const auto params = [](const Image& x, const Image& y, const Pointers& p, const double* filter, int64_t taps) {
      return ResampleParams{p[0],     p[1],    x.batch,         x.channels, x.height, x.width,
                            y.height, y.width, x.channels_last, x.dtype,    filter,   taps};
    };
    for (const int64_t taps : {2, 4}) {
      const double* filter = taps == 2 ? kTwo : kFour;
      const std::string suffix = taps == 2 ? "" : "_4_taps";
      table.add(
          "resample_down" + suffix + image.label(), {image.in(), half.out()},
          [=](const Pointers& p) { return params(image, half, p, filter, taps); }, GPU(cuda::launch_resample_down),
          CPU(cpu::resample_down), work(half));
      table.add(
          "resample_up" + suffix + half.label(), {half.in(), image.out()},
          [=](const Pointers& p) { return params(half, image, p, filter, taps); }, GPU(cuda::launch_resample_up),
          CPU(cpu::resample_up), work(image));
    }
  }
}

void resample_down_pixel_norm(Table& table) {
  for (const Image& image : table.images()) {
    const auto& [batch, channels, height, width, channels_last, dtype] = image;
    const Image half{batch, channels, height / 2, width / 2, channels_last, dtype};
    const Buffer rms{batch * half.height * half.width, DType::kFloat32, true};
    table.add(
        "resample_down_pixel_norm" + image.label(), {image.in(), half.out(), half.out(), rms},
        [=](const Pointers& p) {
          return ResampleDownPixelNormParams{p[0],         p[1],        p[2],
                                             p[3],         image.batch, image.channels,
                                             image.height, image.width, image.channels_last,
                                             image.dtype,  kEps};
        },
        GPU(cuda::launch_resample_down_pixel_norm), CPU(cpu::resample_down_pixel_norm),
        cpu::halving_items(image, false));
    table.add(
        "resample_down_pixel_norm_backward" + image.label(), {half.in(), half.in(), half.in(), rms, image.out()},
        [=](const Pointers& p) {
          return ResampleDownPixelNormBackwardParams{p[0],           p[1],
                                                     p[2],           p[3],
                                                     p[4],           image.batch,
                                                     image.channels, image.height,
                                                     image.width,    image.channels_last,
                                                     image.dtype,    kEps};
        },
        GPU(cuda::launch_resample_down_pixel_norm_backward), CPU(cpu::resample_down_pixel_norm_backward),
        cpu::halving_items(image, true));
  }
}

/// q, k and v of the attention layers: heads of 64 channels (small: of the third part of the channels).
void qkv_norm(Table& table) {
  for (Image image : table.images()) {
    const int64_t heads = table.size == Size::kSmall ? 1 : image.channels / 64;
    const int64_t head_dim = image.channels / heads;
    const Image part = image;
    image.channels *= 3;
    table.add(
        "qkv_norm" + image.label(), {image.in(), part.out(), part.out(), part.out()},
        [=](const Pointers& p) {
          return QKVNormParams{p[0], p[1], p[2], p[3], image.shape(), heads, head_dim, image.dtype, kEps};
        },
        GPU(cuda::launch_qkv_norm), CPU(cpu::qkv_norm), cpu::qkv_norm_items(image.shape(), heads));
    table.add(
        "qkv_norm_backward" + image.label(), {part.in(), part.in(), part.in(), image.in(), image.out()},
        [=](const Pointers& p) {
          return QKVNormBackwardParams{p[0], p[1], p[2], p[3], p[4], image.shape(), heads, head_dim, image.dtype, kEps};
        },
        GPU(cuda::launch_qkv_norm_backward), CPU(cpu::qkv_norm_backward), cpu::qkv_norm_items(image.shape(), heads));
  }
}

/// Latents: the U-Net's side in the image's dtype and layout, the other in fp32 and contiguous.
std::vector<Image> noisy_images(const Table& table) {
  std::vector<Image> found = table.images();
  if (table.size == Size::kSmall) return found;
  for (Image& image : found) {
    image.channels = 4;
    image.batch = table.size == Size::kGPU ? 4096 : 64;
  }
  return found;
}

void precondition(Table& table) {
  for (const Image& image : noisy_images(table)) {
    const auto [batch, channels, height, width, channels_last, dtype] = image;
    const int64_t pixels = batch * height * width;
    const Activation shape{batch, channels, height * width, false};
    const Buffer noisy{image.numel(), DType::kFloat32, true};
    const Buffer denoised{image.numel(), DType::kFloat32, false};
    const Buffer sigma{batch, DType::kFloat32, true};
    table.add(
        "precondition_input" + image.label(), {noisy, sigma, {image.numel() + pixels, dtype, false}},
        [=](const Pointers& p) {
          return PreconditionScaleParams{p[0], p[1], p[2], shape, channels_last, true, true, 0.5, dtype};
        },
        GPU(cuda::launch_precondition_scale), CPU(cpu::precondition_scale), pixels);
    table.add(
        "precondition_output" + image.label(), {noisy, image.in(), sigma, denoised},
        [=](const Pointers& p) {
          return PreconditionOutputParams{p[0], p[1], p[2], p[3], shape, channels_last, true, 0.5, dtype};
        },
        GPU(cuda::launch_precondition_output), CPU(cpu::precondition_output), pixels);
    table.add(
        "precondition_output_backward" + image.label(), {noisy, sigma, image.out()},
        [=](const Pointers& p) {
          return PreconditionScaleParams{p[0], p[1], p[2], shape, channels_last, false, true, 0.5, dtype};
        },
        GPU(cuda::launch_precondition_scale), CPU(cpu::precondition_scale), pixels);
  }
}

void denoising_loss(Table& table) {
  for (const Image& image : noisy_images(table)) {
    const auto [batch, channels, height, width, channels_last, dtype] = image;
    const Activation shape{batch, channels, height * width, false};
    const Buffer picture{image.numel(), DType::kFloat32, true};
    const Buffer numbers{batch, DType::kFloat32, true};
    table.add(
        "denoising_loss" + image.label(),
        {image.in(), picture, picture, numbers, numbers, numbers, image.out(), numbers},
        GPU_OR_0(cuda::denoising_loss_workspace(shape)),
        [=](const Pointers& p) {
          return DenoisingLossParams{p[0], p[1],  p[2],          p[3], p[4], p[5], p[6],
                                     p[7], shape, channels_last, 0.5,  1.0,  dtype};
        },
        GPU(cuda::launch_denoising_loss), CPU(cpu::denoising_loss), batch);
  }
}

/// Heun's correction with guidance and noise.
void sampler_step(Table& table) {
  for (const Image& image : noisy_images(table)) {
    const auto [batch, channels, height, width, channels_last, dtype] = image;
    const int64_t pixels = batch * height * width;
    const Activation shape{batch, channels, height * width, false};
    const Buffer picture{image.numel(), DType::kFloat32, true};
    const Buffer level{1, DType::kFloat32, true};
    table.add(
        "sampler_step" + image.label(),
        {picture,
         picture,
         picture,
         picture,
         picture,
         level,
         level,
         {image.numel(), DType::kFloat32, false},
         {image.numel() + pixels, dtype, false}},
        [=](const Pointers& p) {
          return SamplerStepParams{p[0], p[1],  p[2],          p[3], p[4], p[5], p[6], p[7],
                                   p[8], shape, channels_last, 2.0,  0.1,  0.5,  0.5,  dtype};
        },
        GPU(cuda::launch_sampler_step), CPU(cpu::sampler_step), pixels);
  }
}

}  // namespace

std::vector<Case> all_cases(Size size) {
  Table table{size, {}};
  mp_silu(table);
  mp_silu_modulated(table);
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
  qkv_norm(table);
  precondition(table);
  denoising_loss(table);
  sampler_step(table);
  return std::move(table.cases);
}

}  // namespace edm2::bench
