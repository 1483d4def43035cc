// Pages of a mapped file that are lost, because somebody cut the file, read as zeros instead of ending the process.
// Whoever asked for it looks at the file afterwards and throws away what was computed.
#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

#include "kernels.h"

namespace coldstream {
namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // empty where begin is 0
};

constexpr int kRanges = 1024;
Range ranges[kRanges];
std::mutex ranges_mutex;
struct sigaction handler_before;

// Only what POSIX lets a handler do, and mmap, which is a plain system call.
void on_lost_page(int, siginfo_t* info, void*) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    const uintptr_t begin = range.begin.load(), end = range.end.load();
    if (begin == 0 || address < begin || address >= end) continue;
    const int error = errno;
    // All of the range: one page at a time could need more mappings than a process may have.
    void* zeros = mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ,
                       MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    errno = error;
    if (zeros != MAP_FAILED) return;
  }
  sigaction(SIGBUS, &handler_before, nullptr);  // not ours: it comes again, to whoever had it before
}

int32_t install_once() {
  static bool installed = false;
  if (installed) return kOk;
  struct sigaction ours = {};
  ours.sa_sigaction = on_lost_page;
  ours.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  if (sigaction(SIGBUS, &ours, &handler_before) != 0) return kUnsupported;
  installed = true;
  return kOk;
}

}  // namespace
}  // namespace coldstream

// From now on `bytes` bytes at `memory`, a mapped file's pages, become zeros if the file loses them.
COLDSTREAM_API int32_t cs_guard(const void* memory, int64_t bytes) {
  using namespace coldstream;
  if (!memory || bytes <= 0) return kBadArgument;
  std::lock_guard<std::mutex> lock(ranges_mutex);
  if (const int32_t status = install_once()) return status;
  for (Range& range : ranges) {
    if (range.begin.load() != 0) continue;
    range.end.store(reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes));
    range.begin.store(reinterpret_cast<uintptr_t>(memory));
    return kOk;
  }
  return kNoMemory;
}

// What was guarded at `memory` is about to be unmapped.
COLDSTREAM_API int32_t cs_unguard(const void* memory) {
  using namespace coldstream;
  std::lock_guard<std::mutex> lock(ranges_mutex);
  for (Range& range : ranges) {
    if (range.begin.load() == reinterpret_cast<uintptr_t>(memory)) range.begin.store(0);
  }
  return kOk;
}
