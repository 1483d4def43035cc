#include "page_choice.h"

#include <algorithm>
#include <cmath>

namespace coldstream {
namespace {

constexpr int64_t kFirst = 4, kMore = 4;  // pages of a row that are read at first, and how many times as many then
constexpr double kTiny = 1e-290;  // less is nothing that can be compared
constexpr double kSafety = 1 - 1.0 / 512;  // sums of weights are rounded, to 4e-5 each
// Queries are rounded to bf16, or to 16 bits of the row's largest; what sums lose in f32 is less than half of that.
constexpr float kRoundedTo = 1.0f / 256, kOfLargest = 1.0f / 32768;

// e^(score - best) of a page's keys, all of them at its bound.
double weight(float score, double best) { return kPageTokens * std::exp(double(score) - best); }

}  // namespace

PageChoice::PageChoice(const float* q, int64_t rows, int64_t head_dim, bool rounded,
                       const std::vector<const uint16_t*>& ranges)
    : rows_(size_t(rows)), read_(ranges.size()), left_(int64_t(ranges.size())), at_once_(kFirst) {
  const int64_t width = range_width(head_dim), pages = left_;
  std::vector<float> parts(size_t(3 * rows * width)), scores(size_t(rows * pages));
  float *positive = parts.data(), *negative = positive + rows * width, *slack = negative + rows * width;
  for (int64_t r = 0; r < rows; ++r) {
    float largest = 0;
    bool finite = true;
    for (int64_t d = 0; d < head_dim; ++d) {
      const float value = q[r * head_dim + d];
      largest = std::max(largest, std::fabs(value));
      finite &= bool(std::isfinite(value));
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      const float value = q[r * head_dim + d];
      positive[r * width + d] = std::max(value, 0.0f);
      negative[r * width + d] = std::min(value, 0.0f);
      slack[r * width + d] = finite ? (rounded ? std::fabs(value) * kRoundedTo : 0.0f) + largest * kOfLargest : NAN;
    }
  }
  kernels().bound_scores({positive, negative, slack, rows, width}, ranges.data(), pages, scores.data());
  for (int64_t r = 0; r < rows; ++r) {
    Row& row = rows_[size_t(r)];
    row.scores.assign(scores.begin() + r * pages, scores.begin() + (r + 1) * pages);
    row.order.resize(size_t(pages));
    row.best = -INFINITY;
    for (int64_t i = 0; i < pages; ++i) {
      float& score = row.scores[size_t(i)];
      if (std::isfinite(score)) row.best = std::max(row.best, double(score));
      else score = INFINITY;  // what cannot be bounded is read
      row.order[size_t(i)] = int32_t(i);
    }
    std::sort(row.order.begin(), row.order.end(), [&](int32_t a, int32_t b) {
      const float of_a = row.scores[size_t(a)], of_b = row.scores[size_t(b)];
      return of_a != of_b ? of_a > of_b : a < b;
    });
    row.rest.assign(size_t(pages + 1), 0.0);
    for (int64_t i = pages; i--;)
      row.rest[size_t(i)] = row.rest[size_t(i + 1)] + weight(row.scores[size_t(row.order[size_t(i)])], row.best);
  }
}

std::vector<int64_t> PageChoice::next(const float* top, const float* total, double epsilon) {
  std::vector<int64_t> found;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const Row& row = rows_[r];
    const double allowed = epsilon * kSafety * double(total[r]) * std::exp(double(top[r]) - row.best);
    int64_t taken = 0;
    for (size_t i = 0; i < row.order.size() && taken < at_once_; ++i) {
      if (row.rest[i] <= allowed && allowed > kTiny && std::isfinite(row.rest[i])) break;
      const int32_t page = row.order[i];
      if (read_[size_t(page)] == 1) continue;
      ++taken;
      if (read_[size_t(page)] == 0) found.push_back(page);
      read_[size_t(page)] = 2;  // by another row, just now
    }
  }
  for (int64_t page : found) read_[size_t(page)] = 1;
  std::sort(found.begin(), found.end());
  left_ -= int64_t(found.size());
  at_once_ *= kMore;
  return found;
}

double PageChoice::share(const float* top, const float* total) const {
  double greatest = 0;
  if (!left_) return greatest;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const Row& row = rows_[r];
    double rest = 0;
    for (size_t i = 0; i < row.scores.size(); ++i)
      if (!read_[i]) rest += weight(row.scores[i], row.best);
    greatest = std::max(greatest, rest / (double(total[r]) * std::exp(double(top[r]) - row.best)));
  }
  return greatest;
}

}  // namespace coldstream
