// edm2_cuda_bench: times the launchers of all CUDA kernels, without Python and torch.
//
// Times are medians of CUDA events around one call, queued while the GPU is still busy, so that it does not wait for
// the host in between. Calls take turns among copies of the data, together several times the L2 cache, so that each
// finds a cold one. Bytes are those that the launchers declare (edm2/traffic.h).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases.h"
#include "edm2/traffic.h"

namespace edm2::bench {
namespace {

constexpr const char* kUsage =
    "edm2_cuda_bench [--list] [--small] [--filter TEXT] [--repeats 20] [--csv FILE] [--json FILE]\n"
    "  --list    names, launches and bytes; needs no GPU\n"
    "  --small   odd and even small shapes instead, each once, for compute-sanitizer\n";

struct Options {
  bool list = false;
  bool small = false;
  std::string filter;
  int repeats = 20;
  std::string csv;
  std::string json;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (++i == argc) throw std::invalid_argument(name + " needs a value");
      return argv[i];
    };
    if (name == "--list") {
      options.list = true;
    } else if (name == "--small") {
      options.small = true;
      options.repeats = 1;
    } else if (name == "--filter") {
      options.filter = value();
    } else if (name == "--repeats") {
      options.repeats = std::max(1, std::stoi(value()));
    } else if (name == "--csv") {
      options.csv = value();
    } else if (name == "--json") {
      options.json = value();
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  return options;
}

void check(int error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

/// Values between -2 and 2 that differ from one element to the next.
template <typename T>
__global__ void fill(T* target, int64_t numel) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < numel; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z ^= z >> 27;
    target[i] = static_cast<T>(static_cast<float>(z >> 40) * 0x1p-22f - 2.0f);
  }
}

/// Keeps the GPU busy while the host queues what is to be timed.
__global__ void spin(int64_t cycles) {
  const int64_t end = clock64() + cycles;
  while (clock64() < end) {
  }
}

class Memory {
 public:
  explicit Memory(const Buffer& buffer) {
    const auto bytes = static_cast<size_t>(std::max<int64_t>(buffer.bytes(), 16));
    check(cudaMalloc(&data_, bytes), "cudaMalloc");
    if (buffer.zeros) check(cudaMemset(data_, 0, bytes), "cudaMemset");
    if (!buffer.random) return;
    switch (buffer.dtype) {
      case DType::kFloat16:
        fill<<<1024, 256>>>(static_cast<__half*>(data_), buffer.numel);
        break;
      case DType::kBFloat16:
        fill<<<1024, 256>>>(static_cast<__nv_bfloat16*>(data_), buffer.numel);
        break;
      case DType::kFloat64:
        fill<<<1024, 256>>>(static_cast<double*>(data_), buffer.numel);
        break;
      default:
        fill<<<1024, 256>>>(static_cast<float*>(data_), buffer.numel);
    }
    check(cudaGetLastError(), "fill");
  }
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&&) = delete;
  ~Memory() { cudaFree(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

struct Times {
  double median;  // milliseconds
  double fastest;
  double slowest;
};

template <typename Call>
Times time_calls(int repeats, Call call) {
  constexpr int64_t kHeadStart = 200'000;  // cycles, about 0.1 ms
  cudaEvent_t start = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  for (int i = -std::min(3, repeats); i < repeats; ++i) {
    spin<<<1, 1>>>(kHeadStart);
    check(cudaEventRecord(start), "cudaEventRecord");
    call(i);
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "the kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(milliseconds);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

Times time_case(const Case& timed, int repeats, int64_t cold_bytes) {
  int64_t bytes = 0;
  for (const Buffer& buffer : timed.buffers) bytes += buffer.bytes();
  const int64_t copies = std::clamp<int64_t>(cold_bytes / std::max<int64_t>(bytes, 1) + 1, 1, 64);
  std::vector<Memory> memory;
  std::vector<Pointers> sets(static_cast<size_t>(copies));
  for (Pointers& set : sets) {
    for (const Buffer& buffer : timed.buffers) set.push_back(memory.emplace_back(buffer).data());
  }
  check(cudaDeviceSynchronize(), "filling the memory");
  return time_calls(
      repeats, [&](int i) { check(timed.gpu(sets[static_cast<size_t>(i + 3) % sets.size()], nullptr), "the launch"); });
}

/// Bytes per millisecond, read and written, of a device-to-device copy of 1 GB.
double copy_rate(int repeats) {
  constexpr int64_t kNumel = int64_t{1} << 28;
  const Memory source(Buffer{kNumel, DType::kFloat32, true});
  const Memory target(Buffer{kNumel, DType::kFloat32, true});
  const Times times = time_calls(repeats, [&](int) {
    check(cudaMemcpyAsync(target.data(), source.data(), kNumel * 4, cudaMemcpyDeviceToDevice), "cudaMemcpyAsync");
  });
  return 2.0 * kNumel * 4 / times.median;
}

struct Count {
  int64_t launches;
  int64_t read;
  int64_t written;
};

/// What the launchers declare.
Count count(const Case& timed) {
  const Pointers nowhere(timed.buffers.size(), reinterpret_cast<void*>(uintptr_t{4096}));
  for (auto* counter : {&cuda::tally.launches, &cuda::tally.read, &cuda::tally.written}) counter->store(0);
  check(timed.gpu(nowhere, cuda::counting_stream()), "counting");
  return {cuda::tally.launches, cuda::tally.read, cuda::tally.written};
}

/// Rows go to stdout as they come, and to the files at the end.
class Report {
 public:
  explicit Report(const Options& options) : options_(options) {}

  void row(const Case& timed, const Count& counted, const Times* times, double copy, const std::string& error) {
    const std::string& name = timed.name;
    const double bytes = static_cast<double>(counted.read + counted.written);
    char csv[512];
    char json[768];
    if (times != nullptr) {
      const double rate = bytes / times->median;
      const double tflops = 2.0 * static_cast<double>(timed.products) / times->median / 1e9;
      printf("%-64s %9.4f ms  %6.3f TB/s  %5.1f %% of copy  (%.4f to %.4f ms)", name.c_str(), times->median, rate / 1e9,
             100 * rate / copy, times->fastest, times->slowest);
      if (timed.products > 0) printf("  %.1f TFLOP/s", tflops);
      printf("\n");
      snprintf(csv, sizeof csv, "\"%s\",%lld,%lld,%lld,%.6f,%.6f,%.6f,%.4f,%.4f,%.1f,\n", name.c_str(),
               number(counted.launches), number(counted.read), number(counted.written), times->median, times->fastest,
               times->slowest, rate / 1e9, rate / copy, tflops);
      snprintf(
          json, sizeof json,
          "{\"name\": \"%s\", \"launches\": %lld, \"read\": %lld, \"written\": %lld, \"ms\": %.6f, \"ms_fastest\": "
          "%.6f, \"ms_slowest\": %.6f, \"tb_per_s\": %.4f, \"of_copy\": %.4f, \"tflops\": %.1f}",
          name.c_str(), number(counted.launches), number(counted.read), number(counted.written), times->median,
          times->fastest, times->slowest, rate / 1e9, rate / copy, tflops);
    } else {
      printf("%-64s %lld launches, %.1f MB read, %.1f MB written%s%s\n", name.c_str(), number(counted.launches),
             static_cast<double>(counted.read) / 1e6, static_cast<double>(counted.written) / 1e6,
             error.empty() ? "" : "  FAILED: ", error.c_str());
      snprintf(csv, sizeof csv, "\"%s\",%lld,%lld,%lld,,,,,,,\"%s\"\n", name.c_str(), number(counted.launches),
               number(counted.read), number(counted.written), error.c_str());
      snprintf(json, sizeof json,
               "{\"name\": \"%s\", \"launches\": %lld, \"read\": %lld, \"written\": %lld, \"error\": \"%s\"}",
               name.c_str(), number(counted.launches), number(counted.read), number(counted.written), error.c_str());
    }
    fflush(stdout);
    csv_ += csv;
    json_ += (json_.empty() ? "  " : ",\n  ") + std::string(json);
  }

  void save(const std::string& device, double copy) const {
    write(options_.csv, "name,launches,read,written,ms,ms_fastest,ms_slowest,tb_per_s,of_copy,tflops,error\n" + csv_);
    write(options_.json, "{\"device\": \"" + device + "\", \"copy_tb_per_s\": " + std::to_string(copy / 1e9) +
                             ", \"rows\": [\n" + json_ + "\n]}\n");
  }

 private:
  static long long number(int64_t value) { return value; }  // NOLINT(google-runtime-int): what printf takes

  static void write(const std::string& path, const std::string& text) {
    if (path.empty()) return;
    FILE* file = fopen(path.c_str(), "w");
    if (file == nullptr) throw std::runtime_error("cannot write " + path);
    fputs(text.c_str(), file);
    fclose(file);
  }

  const Options& options_;
  std::string csv_;
  std::string json_;
};

int run(const Options& options) {
  Report report(options);
  cudaDeviceProp device = {};
  double copy = 0;
  if (!options.list) {
    check(cudaGetDeviceProperties(&device, 0), "no GPU");
    printf("%s, compute capability %d.%d, %d multiprocessors, L2 %d MB\n", device.name, device.major, device.minor,
           device.multiProcessorCount, device.l2CacheSize >> 20);
    if (!options.small) {
      copy = copy_rate(options.repeats);
      printf("device copy: %.3f TB/s\n", copy / 1e9);
    }
  }
  int failed = 0;
  for (const Case& timed : all_cases(options.small ? Size::kSmall : Size::kGPU)) {
    if (!timed.gpu || timed.name.find(options.filter) == std::string::npos) continue;
    Count counted = {};
    try {
      counted = count(timed);
      if (options.list) {
        report.row(timed, counted, nullptr, copy, "");
        continue;
      }
      const Times times = time_case(timed, options.repeats, options.small ? 0 : int64_t{4} * device.l2CacheSize);
      report.row(timed, counted, options.small ? nullptr : &times, copy, "");
    } catch (const std::runtime_error& error) {  // the others may work
      report.row(timed, counted, nullptr, copy, error.what());
      ++failed;
    }
  }
  report.save(device.name, copy);
  return failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace edm2::bench

int main(int argc, char** argv) {
  try {
    return edm2::bench::run(edm2::bench::parse(argc, argv));
  } catch (const std::invalid_argument& error) {
    fprintf(stderr, "edm2_cuda_bench: %s\n%s", error.what(), edm2::bench::kUsage);
    return 2;
  } catch (const std::exception& error) {
    fprintf(stderr, "edm2_cuda_bench: %s\n", error.what());
    return 1;
  }
}
