#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"
#include "product.h"

namespace coldstream {
namespace {

// Long enough to bridge the Python between two calls of one layer, short enough not to fight torch's own pool.
constexpr auto kSpin = std::chrono::microseconds(60);

// Until then idle workers look for work instead of going to sleep: nanoseconds of the steady clock.
std::atomic<int64_t> awake_until{0};

int64_t nanoseconds(std::chrono::steady_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

// Cores this process may run on, hyper-threads of one core counted once.
int physical_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      char path[96], line[128] = "";
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
      if (FILE* file = std::fopen(path, "r")) {
        if (!std::fgets(line, sizeof line, file)) line[0] = 0;
        std::fclose(file);
      }
      cores.insert(line[0] ? std::string(line) : std::to_string(cpu));
    }
    if (!cores.empty()) return int(cores.size());
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// `state` = round << 32 | open << 31 | workers inside. A worker joins an open round once; the caller closes the
// round when the tasks are gone and waits only for those inside, never for a worker that is still asleep.
class Pool {
 public:
  // With fewer threads than that where the system starts no more: the caller alone computes the same.
  explicit Pool(int threads) : ranges_(size_t(threads)) {
    threads_.reserve(size_t(threads));
    try {
      for (int worker = 1; worker < threads; ++worker) threads_.emplace_back([this, worker] { work(worker); });
    } catch (const std::system_error&) {  // no thread
    } catch (const std::bad_alloc&) {     // no memory for one
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return int(threads_.size()) + 1; }

  void run(int64_t tasks, Task function, void* context) {
    function_ = function;
    context_ = context;
    const int64_t workers = size();
    for (int64_t worker = 0; worker < workers; ++worker) {
      ranges_[size_t(worker)].next.store(first_task(tasks, worker, workers), std::memory_order_relaxed);
      ranges_[size_t(worker)].end = first_task(tasks, worker + 1, workers);
    }
    state_.store((++round_ << 32) | kOpen);
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    drain(0);
    state_.fetch_and(~kOpen);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & kInside) != 0; ++spins) {
      if (spins < 4096) relax();
      else sched_yield();
    }
  }

 private:
  static constexpr uint64_t kOpen = uint64_t(1) << 31, kInside = kOpen - 1;

  // Adjacent tasks of one worker: what it prefetches past a task's end is its own next task. Ends on a line of
  // its own, so that claiming is free until another worker, done with its range, comes to help.
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void drain(int worker) {
    const int workers = size();
    for (int i = 0; i < workers; ++i) {
      Range& range = ranges_[size_t((worker + i) % workers)];
      for (;;) {
        const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= range.end) break;
        function_(context_, task, worker);
      }
    }
  }

  bool news(uint64_t seen) const {
    uint64_t state = state_.load();
    return (state & kOpen) && (state >> 32) != seen;
  }

  void work(int worker) {
    uint64_t seen = 0;
    for (;;) {
      auto give_up = std::chrono::steady_clock::now() + kSpin;
      while (!news(seen) && !stop_.load(std::memory_order_relaxed)) {
        for (int i = 0; i < 32 && !news(seen); ++i) relax();
        const auto now = std::chrono::steady_clock::now();
        if (now < give_up || nanoseconds(now) < awake_until.load(std::memory_order_relaxed)) continue;
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return news(seen) || stop_.load(); });
        sleepers_.fetch_sub(1);
      }
      if (stop_.load()) return;
      uint64_t state = state_.load();
      while ((state & kOpen) && (state >> 32) != seen) {
        if (!state_.compare_exchange_weak(state, state + 1)) continue;
        seen = state >> 32;
        drain(worker);
        state_.fetch_sub(1, std::memory_order_release);
        break;
      }
    }
  }

  std::vector<Range> ranges_;
  std::vector<std::thread> threads_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  uint64_t round_ = 0;
  Task function_ = nullptr;
  void* context_ = nullptr;
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

std::mutex pool_mutex;  // one round at a time, whichever Python thread asks
Pool* pool = nullptr;   // never freed at exit: workers may outlive static destructors
int wanted_threads = 0;

// A forked child has none of its parent's threads: it starts its own pool on first use.
void forget_pool() {
  pool = nullptr;
  new (&pool_mutex) std::mutex;
}

Pool& current_pool() {
  if (!pool) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    if (!wanted_threads) wanted_threads = physical_cores();
    pool = new Pool(wanted_threads);
  }
  return *pool;
}

}  // namespace

int thread_count() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  return current_pool().size();
}

void keep_awake(std::chrono::microseconds time) {
  awake_until.store(nanoseconds(std::chrono::steady_clock::now() + time), std::memory_order_relaxed);
}

void run_tasks(int64_t tasks, Task function, void* context) {
  if (tasks <= 0) return;
  std::lock_guard<std::mutex> lock(pool_mutex);
  current_pool().run(tasks, function, context);
}

}  // namespace coldstream

COLDSTREAM_API int32_t cs_set_threads(int32_t threads) {
  using namespace coldstream;
  if (threads < 1 || threads > 1024) return kBadArgument;
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (pool && wanted_threads == threads) return kOk;
  delete pool;
  pool = nullptr;
  wanted_threads = threads;
  return kOk;
}

COLDSTREAM_API int32_t cs_keep_awake(int64_t microseconds) {
  if (microseconds < 0 || microseconds > 1000000) return coldstream::kBadArgument;
  coldstream::keep_awake(std::chrono::microseconds(microseconds));
  return coldstream::kOk;
}

// How many there are, or a negative status; and how many there should be.
COLDSTREAM_API int32_t cs_threads() {
  using namespace coldstream;
  int32_t count = 0;
  const int32_t status = guarded([&] { count = thread_count(); });
  return status ? status : count;
}

COLDSTREAM_API int32_t cs_threads_wanted() {
  using namespace coldstream;
  std::lock_guard<std::mutex> lock(pool_mutex);
  return wanted_threads;
}
