// One thread pool for every native kernel: the caller takes part, idle workers spin briefly and then sleep.
#pragma once
#include <chrono>
#include <cstdint>
#include <type_traits>

namespace coldstream {

// A moment of a loop that waits for memory to change.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Task = void (*)(void* context, int64_t task, int worker);

int thread_count();
void run_tasks(int64_t tasks, Task function, void* context);

// Of `tasks`, the first that is `worker`'s own: it does those up to the next worker's, and then helps the others.
inline int64_t first_task(int64_t tasks, int64_t worker, int64_t workers) { return tasks * worker / workers; }

// For that long, workers that have nothing to do look for work instead of going to sleep.
void keep_awake(std::chrono::microseconds time);

// body(task, worker) for every task in [0, tasks), on any worker in [0, thread_count()). Every
// worker claims tasks of its own share one by one and then helps with the others', so that a core that the system
// takes away delays only the task it holds.
template <class Body>
void parallel(int64_t tasks, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_tasks(
      tasks, [](void* context, int64_t task, int worker) { (*static_cast<Plain*>(context))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace coldstream
