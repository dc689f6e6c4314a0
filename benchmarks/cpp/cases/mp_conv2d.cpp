#include "edm2/mp_conv2d.h"

#include <algorithm>
#include <limits>

#include "edm2/mp_conv2d_plan.h"
#include "table.h"

namespace edm2::bench {

#ifdef EDM2_BENCH_CONV
namespace {

constexpr int kMultiprocessors = 132;  // of an H100 and an H200: what plans are made for
constexpr ConvDirection kDirections[] = {ConvDirection::kForward, ConvDirection::kBackwardInput,
                                         ConvDirection::kBackwardWeight};

/// Of EDM2-S at batch 32, one of each kind and resolution; small: odd ones.
std::vector<ConvShape> shapes(Size size) {
  if (size == Size::kSmall)
    return {{3, 5, 7, 40, 24, 3, 3}, {1, 1, 1, 8, 8, 1, 1}, {2, 9, 4, 72, 136, 3, 1}, {2, 5, 3, 96, 24, 1, 1}};
  return {{32, 64, 64, 192, 192, 3, 3}, {32, 32, 32, 384, 384, 3, 3}, {32, 16, 16, 576, 576, 3, 3},
          {32, 8, 8, 768, 768, 3, 3},   {32, 32, 32, 768, 384, 1, 1}, {32, 16, 16, 576, 1728, 1, 1},
          {32, 64, 64, 384, 192, 3, 3}, {32, 16, 16, 1152, 576, 3, 3}};
}

std::string label(const ConvShape& shape, DType dtype, bool wgmma) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  return std::string(wgmma ? " wgmma " : " ") + text(shape.batch) + "x" + text(shape.height) + "x" + text(shape.width) +
         " " + text(shape.in) + "->" + text(shape.out) + " " + text(shape.kernel_height) + "x" +
         text(shape.kernel_width) + " " + name_of(dtype);
}

/// The operands, what each direction makes of two of them, and the parts of split sums.
struct Operands {
  ConvShape shape;
  DType dtype;
  ConvPlan plans[3];

  Buffer x(bool in) const { return {shape.pixels() * shape.in, dtype, in}; }
  Buffer y(bool in) const { return {shape.pixels() * shape.out, dtype, in}; }
  Buffer w() const { return {shape.in * shape.out * shape.taps(), dtype, true}; }
  Buffer grad_w() const { return {shape.in * shape.out * shape.taps(), DType::kFloat32, false}; }
  const ConvPlan& plan(ConvDirection direction) const { return plans[static_cast<int>(direction)]; }
  int64_t floats(ConvDirection direction) const {
    return conv_workspace(conv_product(direction, shape, plan(direction)), plan(direction));
  }
};

void add_all(Table& table, const Operands& of, bool wgmma) {
  const auto [shape, dtype] = std::pair(of.shape, of.dtype);
  const std::string about = label(shape, dtype, wgmma);
  const auto count = [&] { table.cases.back().products = shape.pixels() * shape.in * shape.out * shape.taps(); };
  const auto forward = [&](const char* name, ConvEpilogue epilogue, Buffer other) {
    table.add(
        std::string("mp_conv2d") + name + about,
        {of.x(true),
         of.w(),
         other,
         of.y(false),
         of.y(false),
         {of.floats(ConvDirection::kForward), DType::kFloat32, false}},
        [=](const Pointers& p) {
          const bool silu = epilogue == ConvEpilogue::kModulatedSiLU;
          const bool fused = epilogue != ConvEpilogue::kNone;
          return MPConv2dParams{p[0],
                                p[1],
                                p[3],
                                shape,
                                dtype,
                                of.plan(ConvDirection::kForward),
                                static_cast<float*>(p[5]),
                                epilogue,
                                fused ? p[4] : nullptr,
                                nullptr,
                                silu ? p[2] : nullptr,
                                fused && !silu ? p[2] : nullptr,
                                0.92,
                                0.39,
                                std::numeric_limits<double>::infinity()};
        },
        cuda::launch_mp_conv2d, nullptr, 0);
    count();
  };
  forward("", ConvEpilogue::kNone, {0, dtype, false});
  forward("_silu_modulated", ConvEpilogue::kModulatedSiLU, {shape.batch * shape.out, dtype, true});
  forward("_sum", ConvEpilogue::kSum, of.y(true));
  if (!wgmma && shape.taps() == 1 && shape.out % (3 * kConvHead) == 0) {
    const Buffer part{shape.pixels() * shape.out / 3, dtype, false};
    table.add(
        "mp_conv2d_qkv_norm" + about, {of.x(true), of.w(), of.y(false), part, part, part},
        [=](const Pointers& p) {
          MPConv2dParams params{p[0], p[1], p[2], shape, dtype, kConvQKVPlan, nullptr, ConvEpilogue::kQKVNorm};
          std::copy(p.begin() + 3, p.begin() + 6, params.qkv);
          params.eps = 1e-4;
          return params;
        },
        cuda::launch_mp_conv2d, nullptr, 0);
    count();
  }
  const int64_t in_a = shape.in / 3 / kConvHalf * kConvHalf;
  const bool halves = !wgmma && shape.taps() == 1 && in_a > 0 && shape.in % kConvHalf == 0;
  const Buffer a{shape.pixels() * in_a, dtype, true};
  const Buffer b{shape.pixels() * (shape.in - in_a), dtype, true};
  if (halves) {
    const ConvPlan& plan = of.plan(ConvDirection::kForward);
    table.add(
        "mp_cat_conv2d" + about,
        {a, b, of.w(), of.y(false), {of.floats(ConvDirection::kForward), DType::kFloat32, false}},
        [=](const Pointers& p) {
          MPConv2dParams params{p[0], p[2], p[3], shape, dtype, plan, static_cast<float*>(p[4])};
          params.halves = {p[1], in_a, 0.9, 1.2};
          return params;
        },
        cuda::launch_mp_conv2d, nullptr, 0);
    count();
  }
  const auto input = ConvDirection::kBackwardInput;
  table.add(
      "mp_conv2d_backward_input" + about, {of.y(true), of.w(), of.x(false), {of.floats(input), DType::kFloat32, false}},
      [=](const Pointers& p) {
        return MPConv2dBackwardInputParams{p[0], p[1], p[2], shape, dtype, of.plan(input), static_cast<float*>(p[3])};
      },
      cuda::launch_mp_conv2d_backward_input, nullptr, 0);
  count();
  const auto weight = ConvDirection::kBackwardWeight;
  table.add(
      "mp_conv2d_backward_weight" + about,
      {of.y(true), of.x(true), of.grad_w(), {of.floats(weight), DType::kFloat32, false}},
      [=](const Pointers& p) {
        return MPConv2dBackwardWeightParams{
            p[0], p[1], static_cast<float*>(p[2]), shape, dtype, of.plan(weight), static_cast<float*>(p[3])};
      },
      cuda::launch_mp_conv2d_backward_weight, nullptr, 0);
  count();
  if (halves) {
    table.add(
        "mp_cat_conv2d_backward_weight" + about,
        {of.y(true), a, b, of.grad_w(), {of.floats(weight), DType::kFloat32, false}},
        [=](const Pointers& p) {
          return MPConv2dBackwardWeightParams{p[0],
                                              p[1],
                                              static_cast<float*>(p[3]),
                                              shape,
                                              dtype,
                                              of.plan(weight),
                                              static_cast<float*>(p[4]),
                                              {p[2], in_a, 0.9, 1.2}};
        },
        cuda::launch_mp_conv2d_backward_weight, nullptr, 0);
    count();
  }
}

}  // namespace

void mp_conv2d(Table& table) {
  const bool hopper = cuda::conv_tile_count() > kConvTileCount;
  for (const ConvShape& shape : shapes(table.size)) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (const bool wgmma : {false, true}) {
        if (wgmma && !hopper) continue;
        Operands of{shape, dtype, {}};
        for (const ConvDirection direction : kDirections) {
          of.plans[static_cast<int>(direction)] =
              wgmma ? plan_conv(direction, shape, kMultiprocessors, kConvTileCount, cuda::conv_tile_count())
                    : plan_conv(direction, shape, kMultiprocessors);
        }
        add_all(table, of, wgmma);
      }
    }
  }
}
#else
/// Built without them, or for the CPU, where convolutions are torch's.
void mp_conv2d(Table&) {}
#endif

}  // namespace edm2::bench
