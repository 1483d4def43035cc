// Which pages a few rows of one KV head read, by what bounds their scores: the greatest first, until what is left is
// proved to have no more than a share of epsilon of each row's softmax.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace coldstream {

class PageChoice {
 public:
  // `q` [rows, head_dim] as they are multiplied, `ranges` of as many pages. `rounded`: queries may be rounded to bf16.
  PageChoice(const float* q, int64_t rows, int64_t head_dim, bool rounded, const std::vector<const uint16_t*>& ranges);

  // The pages to be read next, ascending; none if what is left may be left out. `top` and `total` [rows] are the rows'
  // largest scores so far and sums of weights relative to them. Nothing else matters but the rows and what bounds them.
  std::vector<int64_t> next(const float* top, const float* total, double epsilon);

  int64_t left() const { return left_; }

  // The greatest share that what is left can have of a row's softmax.
  double share(const float* top, const float* total) const;

 private:
  struct Row {
    std::vector<int32_t> order;   // pages that are not read
    std::vector<float> scores;    // [pages]
    std::vector<double> weights;  // [pages]: what each can weigh, relative to e^best
    double best;
  };

  void take(Row& row, double allowed, std::vector<int64_t>& found);

  std::vector<Row> rows_;
  std::vector<char> read_;
  int64_t left_, at_once_;
};

}  // namespace coldstream
