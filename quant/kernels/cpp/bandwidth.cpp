#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "product.h"

namespace coldstream {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kChunk = 1 << 20, kWindow = 64;  // chunks: 2 ms where memory gives 30 GB/s

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The rate that one window in ten exceeds. Others who use a core or the memory for a moment slow some windows down, and
// what of one a large cache still holds makes another seem faster than memory is.
double typical_best(std::vector<double>& rates) {
  std::sort(rates.begin(), rates.end());
  return rates[(rates.size() - 1) * 9 / 10] / 1e9;
}

// GB/s of reading `chunks` chunks over and over for `seconds`, every thread its own.
double read_rate(const char* base, int64_t chunks, double seconds) {
  std::atomic<uint64_t> checksum{0};
  std::vector<double> rates;
  for (double spent = 0; spent < seconds || rates.empty();)
    for (int64_t first = 0; first < chunks; first += kWindow) {
      const int64_t count = std::min(kWindow, chunks - first);
      const auto start = Clock::now();
      parallel(count, [&](int64_t chunk, int) { checksum += kernels().checksum(base + (first + chunk) * kChunk, kChunk); });
      const double took = seconds_since(start);
      spent += took;
      rates.push_back(double(count * kChunk) / took);
      if (spent >= seconds) break;  // a large buffer need not be read whole
    }
  return checksum.load() ? typical_best(rates) : 0.0;
}

}  // namespace
}  // namespace coldstream

// GB/s at which all threads together read `nbytes` from `base`, which stay as they are.
COLDSTREAM_API double cs_read_rate(const char* base, int64_t nbytes, double seconds) {
  using namespace coldstream;
  if (nbytes < kChunk) return 0.0;
  double rate = 0;
  return guarded([&] { rate = read_rate(base, nbytes / kChunk, seconds); }) == kOk ? rate : -1.0;
}

// 10^9 products of bytes per second and added up, by all threads together, at the rate of the instruction that the
// kernels use: a bound for them, not a measure of them.
COLDSTREAM_API double cs_dot_rate(double seconds) {
  using namespace coldstream;
  constexpr int64_t kRounds = 1 << 14;
  double rate = 0;
  const int32_t status = guarded([&] {
    const int64_t tasks = 8 * thread_count();
    std::atomic<int64_t> products{0};
    std::vector<double> rates;
    for (double spent = 0; spent < seconds || rates.empty();) {
      products.store(0);
      const auto start = Clock::now();
      parallel(tasks, [&](int64_t, int) { products += kernels().dot_products(kRounds); });
      const double took = seconds_since(start);
      spent += took;
      rates.push_back(double(products.load()) / took);
    }
    rate = typical_best(rates);
  });
  return status == kOk ? rate : -1.0;
}

// The same of a new buffer of `nbytes` as of cs_read_rate.
COLDSTREAM_API double cs_read_bandwidth(int64_t nbytes, double seconds) {
  using namespace coldstream;
  const int64_t chunks = nbytes / kChunk > 0 ? nbytes / kChunk : 1;
  const size_t size = size_t(chunks * kChunk);
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return -1.0;
#ifdef MADV_HUGEPAGE
  madvise(map, size, MADV_HUGEPAGE);
#endif
  char* base = static_cast<char*>(map);
  const int32_t written = guarded([&] {
    parallel(chunks, [&](int64_t chunk, int) {  // a byte of each page is enough to have it
      for (int64_t byte = 0; byte < kChunk; byte += 4096) base[chunk * kChunk + byte] = 1;
    });
  });
  if (written != kOk) {
    munmap(map, size);
    return -1.0;
  }
  const double rate = cs_read_rate(base, chunks * kChunk, seconds);
  munmap(map, size);
  return rate;
}
