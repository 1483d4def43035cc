#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "product.h"

// GB/s of reading a buffer of `nbytes` over and over for `seconds`, every thread its own chunks: of reads of one window
// after another, the rate that one in ten exceeds. Others who use a core or the memory for a moment slow some windows
// down, and what of one a large cache still holds makes another seem faster than memory is.
COLDSTREAM_API double cs_read_bandwidth(int64_t nbytes, double seconds) {
  using namespace coldstream;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kChunk = 1 << 20, kWindow = 64;  // chunks: 2 ms where memory gives 30 GB/s
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
  std::atomic<uint64_t> checksum{0};
  std::vector<double> rates;
  for (double spent = 0; spent < seconds || rates.empty();) {
    for (int64_t first = 0; first < chunks; first += kWindow) {
      const int64_t count = std::min(kWindow, chunks - first);
      const auto start = Clock::now();
      parallel(count, [&](int64_t chunk, int) { checksum += kernels().checksum(base + (first + chunk) * kChunk, kChunk); });
      const double took = std::chrono::duration<double>(Clock::now() - start).count();
      spent += took;
      rates.push_back(double(count * kChunk) / took);
    }
  }
  munmap(map, size);
  std::sort(rates.begin(), rates.end());
  return checksum.load() ? rates[(rates.size() - 1) * 9 / 10] / 1e9 : 0.0;
}
