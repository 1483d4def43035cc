#include "page_choice.h"

#include <algorithm>
#include <cmath>

namespace coldstream {
namespace {

constexpr int64_t kFirst = 4, kMore = 16;  // pages of a row that are read at first, and how many times as many then
constexpr double kTiny = 1e-290, kHuge = 1e290;  // less is nothing that can be compared, and what is infinite is more
constexpr double kSafety = 1 - 1.0 / 512;  // sums of weights are rounded, to 4e-5 each
// Queries are rounded to bf16, or to 16 bits of the row's largest; what sums lose in f32 is less than half of that.
constexpr float kRoundedTo = 1.0f / 256, kOfLargest = 1.0f / 32768;

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
    row.weights.resize(size_t(pages));
    for (int64_t i = 0; i < pages; ++i)
      row.weights[size_t(i)] = kPageTokens * std::exp(row.scores[size_t(i)] - row.best);
  }
}

std::vector<int64_t> PageChoice::next(const float* top, const float* total, double epsilon) {
  std::vector<int64_t> found;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const double allowed = epsilon * kSafety * double(total[r]) * std::exp(double(top[r]) - rows_[r].best);
    take(rows_[r], allowed > kTiny ? std::min(allowed, kHuge) : -1.0, found);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  for (int64_t page : found) read_[size_t(page)] = 1;
  left_ -= int64_t(found.size());
  at_once_ *= kMore;
  return found;
}

// Add to `found` the next pages that a row wants: of the greatest scores, until what is left weighs no more than
// `allowed`. Nothing is sorted but where that ends.
void PageChoice::take(Row& row, double allowed, std::vector<int64_t>& found) {
  const auto before = [&](int32_t a, int32_t b) {
    const float of_a = row.scores[size_t(a)], of_b = row.scores[size_t(b)];
    return of_a != of_b ? of_a > of_b : a < b;
  };
  // Those that are read already, for other rows too, are done.
  row.order.erase(std::remove_if(row.order.begin(), row.order.end(), [&](int32_t page) { return read_[size_t(page)]; }),
                  row.order.end());
  const auto first = row.order.begin(), last = row.order.end();
  auto end = last - first > at_once_ ? first + at_once_ : last;
  if (end != last) std::nth_element(first, end, last, before);
  double rest = 0;
  for (auto page = end; page != last; ++page) rest += row.weights[size_t(*page)];
  if (rest <= allowed) {
    double least = INFINITY;
    for (auto page = first; page != end; ++page) least = std::min(least, row.weights[size_t(*page)]);
    if (rest + least <= allowed) {
      std::sort(first, end, before);
      while (end != first && rest + row.weights[size_t(*(end - 1))] <= allowed) rest += row.weights[size_t(*--end)];
    }
  }
  found.insert(found.end(), first, end);
}

double PageChoice::share(const float* top, const float* total) const {
  double greatest = 0;
  if (!left_) return greatest;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const Row& row = rows_[r];
    double rest = 0;
    for (size_t i = 0; i < row.scores.size(); ++i)
      if (!read_[i]) rest += row.weights[i];
    greatest = std::max(greatest, rest / (double(total[r]) * std::exp(double(top[r]) - row.best)));
  }
  return greatest;
}

}  // namespace coldstream
