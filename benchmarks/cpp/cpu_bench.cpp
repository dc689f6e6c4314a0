// edm2_cpu_bench: times the CPU kernels in one thread, without Python and torch. Options are Google Benchmark's:
// --benchmark_filter=REGEX --benchmark_min_time=SECONDS --benchmark_format=json --benchmark_list_tests
#include <benchmark/benchmark.h>

#include <cstring>
#include <memory>
#include <new>
#include <random>

#include "cases.h"
#include "edm2/cpu.h"

namespace edm2::bench {
namespace {

/// Memory at a multiple of 64 bytes.
class Memory {
 public:
  explicit Memory(const Buffer& buffer) : bytes_(static_cast<size_t>(buffer.bytes())), data_(allocate(bytes_)) {
    if (!buffer.random) {
      memset(data_.get(), 0, bytes_);
      return;
    }
    std::mt19937 random(1);
    std::uniform_real_distribution<float> values(-2, 2);
    for (int64_t i = 0; i < buffer.numel; ++i) set(buffer.dtype, i, values(random));
  }
  void* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete(memory, kAlignment); }
  };

  static unsigned char* allocate(size_t bytes) {
    return static_cast<unsigned char*>(::operator new(bytes, kAlignment));
  }

  void set(DType dtype, int64_t i, float value) {
    if (dtype == DType::kFloat32) {
      memcpy(data_.get() + 4 * i, &value, 4);
    } else {  // bf16 is the upper half of a float
      memcpy(data_.get() + 2 * i, reinterpret_cast<unsigned char*>(&value) + 2, 2);
    }
  }

  size_t bytes_;
  std::unique_ptr<unsigned char, Free> data_;
};

void time_case(benchmark::State& state, const Case& timed) {
  std::vector<Memory> memory(timed.buffers.begin(), timed.buffers.end());
  Pointers pointers;
  int64_t bytes = 0;
  for (size_t i = 0; i < memory.size(); ++i) {
    pointers.push_back(memory[i].data());
    bytes += timed.buffers[i].bytes();
  }
  for ([[maybe_unused]] auto _ : state) {
    timed.cpu(pointers);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * bytes);
}

}  // namespace
}  // namespace edm2::bench

int main(int argc, char** argv) {
  benchmark::AddCustomContext("instruction set", edm2::cpu::isa_in_use());
  for (const auto& timed : edm2::bench::all_cases(edm2::bench::Size::kCPU)) {
    if (!timed.cpu) continue;
    benchmark::RegisterBenchmark(timed.name.c_str(),
                                 [timed](benchmark::State& state) { edm2::bench::time_case(state, timed); });
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
