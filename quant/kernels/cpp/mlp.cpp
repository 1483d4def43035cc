#include "mlp.h"

#include <algorithm>

namespace coldstream {
namespace {

// Rows of all jobs that are in flight together: bounds the scratch, and is where more rows no longer help.
constexpr int64_t kBatchRows = 256;
constexpr int64_t kSerialValues = 8 << 10;  // floats whose elementwise work is not worth waking the others

// A run of one job's tokens.
struct Piece {
  const Job* job;
  int64_t first, count;
  const float* x;  // [count, K]
  int64_t ldx;
  float *gate, *up, *down;
  const float *gate_bias, *up_bias, *down_bias;  // of the job, in f32

  int64_t token(int64_t i) const { return job->tokens ? job->tokens[first + i] : first + i; }
  int64_t out_row(int64_t i) const { return job->out_rows ? job->out_rows[first + i] : token(i); }
  float in_scale(int64_t i) const { return job->in_scale ? job->in_scale[first + i] : 1.0f; }
  float out_weight(int64_t i) const { return job->out_weight ? job->out_weight[first + i] : 1.0f; }
};

template <class Body>
void each(int64_t tasks, int64_t values, Body&& body) {
  if (values < kSerialValues || tasks == 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
  } else {
    parallel(tasks, body);
  }
}

// The tokens of a piece as adjacent rows: where x already has them so, nothing is copied.
void gather(Piece& piece, const float* x, int64_t ldx, Scratch& scratch) {
  const int64_t k = piece.job->gate.k, start = piece.token(0);
  bool adjacent = true;
  for (int64_t i = 1; i < piece.count; ++i) adjacent &= piece.token(i) == start + i;
  if (adjacent) {
    piece.x = x + start * ldx;
    piece.ldx = ldx;
    return;
  }
  float* rows = scratch.take<float>(piece.count * k);
  each(piece.count, piece.count * k,
       [&](int64_t i, int) { std::memcpy(rows + i * k, x + piece.token(i) * ldx, size_t(k) * 4); });
  piece.x = rows;
  piece.ldx = k;
}

// Biases and the numbers of a job's own, so that silu_multiply does the rest: silu(a * g) / a is g * sigmoid(a * g).
void prepare(const Piece& piece, float* gate, float* up, float scale) {
  const Job& job = *piece.job;
  for (int64_t i = 0; i < job.gate.n; ++i) {
    const float g = std::min(gate[i] * scale + (piece.gate_bias ? piece.gate_bias[i] : 0.0f), job.limit);
    const float u = up[i] * scale + (piece.up_bias ? piece.up_bias[i] : 0.0f);
    gate[i] = job.alpha * g;
    up[i] = (std::max(-job.limit, std::min(u, job.limit)) + job.offset) / job.alpha;
  }
}

// `count` values of `kind`, bf16 or f32, as f32: themselves, or widened.
const float* widened(const void* values, int32_t kind, int64_t count, Scratch& scratch) {
  if (!values || kind == kF32) return static_cast<const float*>(values);
  float* to = scratch.take<float>(count);
  const uint16_t* halves = static_cast<const uint16_t*>(values);
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_to_float(halves[i]);
  return to;
}

void run_batch(std::vector<Piece>& pieces, const float* x, int64_t ldx, float* out, int64_t ldout, bool exact) {
  Scratch scratch;
  const Kernels& table = kernels();
  std::vector<Product> products;
  for (Piece& piece : pieces) {
    gather(piece, x, ldx, scratch);
    const int64_t inner = piece.job->gate.n;
    piece.gate = scratch.take<float>(piece.count * inner);
    piece.up = scratch.take<float>(piece.count * inner);
    piece.down = scratch.take<float>(piece.count * piece.job->down.n);
    piece.gate_bias = widened(piece.job->gate_bias, piece.job->bias_kind, inner, scratch);
    piece.up_bias = widened(piece.job->up_bias, piece.job->bias_kind, inner, scratch);
    piece.down_bias = widened(piece.job->down_bias, piece.job->bias_kind, piece.job->down.n, scratch);
    products.push_back({piece.job->gate, piece.x, piece.ldx, piece.count, piece.gate, inner, {}});
    products.push_back({piece.job->up, piece.x, piece.ldx, piece.count, piece.up, inner, {}});
  }
  if (!exact) quantize_inputs(products.data(), int(products.size()), scratch);
  multiply(products.data(), int(products.size()), exact, scratch);

  std::vector<std::pair<const Piece*, int64_t>> rows;
  int64_t values = 0;
  products.clear();
  for (const Piece& piece : pieces) {
    const int64_t inner = piece.job->gate.n;
    for (int64_t i = 0; i < piece.count; ++i) rows.emplace_back(&piece, i);
    values += piece.count * inner;
    products.push_back({piece.job->down, piece.gate, inner, piece.count, piece.down, piece.job->down.n, {}});
  }
  each(int64_t(rows.size()), values, [&](int64_t task, int) {
    auto [piece, i] = rows[size_t(task)];
    const int64_t inner = piece->job->gate.n;
    float *gate = piece->gate + i * inner, *up = piece->up + i * inner, scale = piece->in_scale(i);
    if (!piece->job->is_silu()) {
      prepare(*piece, gate, up, scale);
      scale = 1.0f;
    }
    table.silu_multiply(gate, up, inner, scale);
  });
  if (!exact) quantize_inputs(products.data(), int(products.size()), scratch);
  multiply(products.data(), int(products.size()), exact, scratch);

  // Columns are shared out, not tokens: two jobs may add to one token, and the order of adding stays the same.
  const int64_t n = pieces[0].job->down.n, step = std::max<int64_t>(64, round_up(n / (4 * thread_count()), 64));
  each((n + step - 1) / step, int64_t(rows.size()) * n, [&](int64_t task, int) {
    const int64_t column = task * step, width = std::min(step, n - column);
    for (const auto& [piece, i] : rows) {
      float* part = piece->down + i * n + column;  // whole before it is weighed, as where parts are summed later
      if (piece->down_bias) table.add_scaled(part, piece->down_bias + column, width, 1.0f);
      table.add_scaled(out + piece->out_row(i) * ldout + column, part, width, piece->out_weight(i));
    }
  });
}

}  // namespace

void run_jobs(const Job* jobs, int64_t count, const float* x, int64_t ldx, float* out, int64_t ldout, bool exact) {
  std::vector<Piece> batch;
  int64_t rows = 0;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t first = 0; first < jobs[j].count;) {
      const int64_t take = std::min(jobs[j].count - first, kBatchRows);
      if (rows + take > kBatchRows) {
        run_batch(batch, x, ldx, out, ldout, exact);
        batch.clear();
        rows = 0;
      }
      batch.push_back({&jobs[j], first, take, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr});
      rows += take;
      first += take;
    }
  if (!batch.empty()) run_batch(batch, x, ldx, out, ldout, exact);
}

}  // namespace coldstream

COLDSTREAM_API int32_t cs_mlp(const coldstream::Job* jobs, int64_t count, const float* x, int64_t ldx, float* out,
                              int64_t ldout, int32_t exact) {
  using namespace coldstream;
  return guarded([&] { run_jobs(jobs, count, x, ldx, out, ldout, exact != 0); });
}
