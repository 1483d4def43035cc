#include <sys/mman.h>

#include <atomic>
#include <chrono>

#include "kernels.h"
#include "pool.h"
#include "product.h"

// Best GB/s over repeated reads of a buffer of `nbytes`, every thread reading its own chunks.
COLDSTREAM_API double cs_read_bandwidth(int64_t nbytes, double seconds) {
  using namespace coldstream;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kChunk = 1 << 20;
  const int64_t chunks = nbytes / kChunk > 0 ? nbytes / kChunk : 1;
  const size_t size = size_t(chunks * kChunk);
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return -1.0;
#ifdef MADV_HUGEPAGE
  madvise(map, size, MADV_HUGEPAGE);
#endif
  char* base = static_cast<char*>(map);
  const int32_t written = guarded([&] {
    parallel(chunks, [&](int64_t chunk, int) { std::memset(base + chunk * kChunk, int(chunk) | 1, kChunk); });
  });
  if (written != kOk) {
    munmap(map, size);
    return -1.0;
  }
  std::atomic<uint64_t> checksum{0};
  double best = 0, spent = 0;
  while (spent < seconds || best == 0) {
    auto start = Clock::now();
    parallel(chunks, [&](int64_t chunk, int) { checksum += kernels().checksum(base + chunk * kChunk, kChunk); });
    double took = std::chrono::duration<double>(Clock::now() - start).count();
    spent += took;
    if (double(size) / took > best) best = double(size) / took;
  }
  munmap(map, size);
  return checksum.load() ? best / 1e9 : 0.0;
}
