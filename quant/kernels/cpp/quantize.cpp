#include <vector>

#include "kernels.h"
#include "pool.h"
#include "product.h"

// Quantize one float matrix into caller-owned packed words and scales. Every argument is checked by Python.
COLDSTREAM_API int32_t cs_quantize(const coldstream::QuantizeJob* job, coldstream::QuantizeStats* stats) {
  using namespace coldstream;
  struct alignas(64) Own {
    QuantizeStats stats;
  };
  return guarded([&] {
    const Kernels& table = kernels();
    std::vector<Own> own(size_t(thread_count()), Own{});
    const int64_t groups = job->k / job->group;
    if (!job->transposed) {
      const int64_t step = 1 + (1 << 16) / job->k;
      parallel((job->n + step - 1) / step, [&](int64_t task, int worker) {
        int64_t row = task * step, end = row + step < job->n ? row + step : job->n;
        table.quantize_rows(*job, row, end, &own[size_t(worker)].stats);
      });
    } else {
      const int64_t wide = 512, tall = 4, across = (job->n + wide - 1) / wide, down = (groups + tall - 1) / tall;
      parallel(across * down, [&](int64_t task, int worker) {
        int64_t column = task % across * wide, g = task / across * tall;
        table.quantize_columns(*job, column, column + wide < job->n ? column + wide : job->n, g,
                               g + tall < groups ? g + tall : groups, &own[size_t(worker)].stats);
      });
    }
    *stats = QuantizeStats{};
    for (const Own& part : own) {
      stats->nonfinite += part.stats.nonfinite;
      stats->squared_error += part.stats.squared_error;
      stats->squared_sum += part.stats.squared_sum;
    }
  });
}

// Round one f32 matrix to the scales it is given. Every argument is checked by Python.
COLDSTREAM_API int32_t cs_round(const coldstream::FeedbackJob* job) {
  using namespace coldstream;
  return guarded([&] {
    const Kernels& table = kernels();
    const int64_t step = 64;
    parallel((job->n + step - 1) / step, [&](int64_t task, int) {
      int64_t row = task * step;
      table.round_with_feedback(*job, row, row + step < job->n ? row + step : job->n);
    });
  });
}
