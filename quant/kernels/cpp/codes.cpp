#include <algorithm>

#include "kernels.h"
#include "pool.h"
#include "product.h"

// Rows of weights in others' codes to f32. Every argument is checked by Python.
COLDSTREAM_API int32_t cs_widen_codes(const coldstream::CodesJob* job) {
  using namespace coldstream;
  return guarded([&] {
    const Kernels& table = kernels();
    const int64_t step = std::max<int64_t>(1, (1 << 16) / job->columns);
    parallel((job->rows + step - 1) / step, [&](int64_t task, int) {
      table.widen_codes(*job, task * step, std::min(task * step + step, job->rows));
    });
  });
}
