// Random bits as a function of a key and a counter: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011), and the dropout mask made of them, which is never stored. One definition for host and device.
#pragma once

#include <cstdint>

#include "edm2/math.h"

namespace edm2 {

/// Dropout of an activation [batch, channels, pixels] (spec 2.9): an element is zero where its 16 random bits are below
/// `threshold`, else multiplied by 1 / (1 - threshold / 2^16). The bits are those of element
/// e = (n * pixels + p) * channels + c whatever the memory format: eight elements share one call of Philox, so that a
/// 16-byte pack of neighbouring channels costs a single one.
struct Dropout {
  const int64_t* philox = nullptr;  // seed and offset, read by the kernel; null: no dropout
  int64_t subsequence = 0;          // below 2^16: the layer
  int64_t threshold = 0;            // below 2^16

  double scale() const { return 65536.0 / static_cast<double>(65536 - threshold); }
};

namespace math {

constexpr int kPhiloxElements = 8;

struct Philox {
  uint32_t words[4];
};

EDM2_FORMULA Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// The bits of elements 8 * block to 8 * block + 7, the low half of a word first. The key is the seed; the counter
/// holds the block (48 bits), the subsequence (16) and the offset (64).
EDM2_FORMULA Philox dropout_bits(int64_t block, int64_t subsequence, int64_t seed, int64_t offset) {
  return philox(static_cast<uint32_t>(block),
                static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32) | static_cast<uint32_t>(subsequence) << 16,
                static_cast<uint32_t>(offset), static_cast<uint32_t>(static_cast<uint64_t>(offset) >> 32),
                static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
}

}  // namespace math
}  // namespace edm2
