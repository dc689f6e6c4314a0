#include "edm2/cosine_attention.h"

#include "table.h"

namespace edm2::bench {

/// q, k and v of the attention layers: heads of 64 channels (small: of the third part of the channels).
void cosine_attention(Table& table) {
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

}  // namespace edm2::bench
