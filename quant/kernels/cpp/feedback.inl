// Rounding with feedback: a lane is a row of the weight, so that lanes never meet and results do not depend on how
// many there are. A value's target is its weight plus what the errors of other columns of the block call for; the
// first pass looks at the columns already rounded, the second at all others.

constexpr int kFeedbackVectors = 2, kFeedbackRows = kFeedbackVectors * kLanes, kFeedbackBlock = 256;

struct FeedbackBlock {  // one block of columns of kFeedbackRows rows, in the order in which they are rounded
  alignas(64) float weight[kFeedbackBlock][kFeedbackRows];
  alignas(64) float scale[kFeedbackBlock][kFeedbackRows];
  alignas(64) float error[kFeedbackBlock][kFeedbackRows];
  alignas(64) float value[kFeedbackBlock][kFeedbackRows];
};

// Rounds column i for the errors of columns [0, count), count even, by `row` of the matrix; two sums hide the latency
// of adding. What is kept as its error is counted from the target in the first pass and from the weight in the second.
INLINE void round_column(FeedbackBlock& b, int i, int count, const float* row, float low, float high, bool second) {
  vf even[kFeedbackVectors] = {}, odd[kFeedbackVectors] = {};
  for (int j = 0; j < count; j += 2)
    for (int v = 0; v < kFeedbackVectors; ++v) {
      even[v] += load<vf>(b.error[j] + v * kLanes) * row[j];
      odd[v] += load<vf>(b.error[j + 1] + v * kLanes) * row[j + 1];
    }
  for (int v = 0; v < kFeedbackVectors; ++v) {
    const vf weight = load<vf>(b.weight[i] + v * kLanes), scale = load<vf>(b.scale[i] + v * kLanes);
    const vf target = weight + (even[v] + odd[v]);
    const vf value = to_float(rounded(larger(smaller(target / scale, splat(high)), splat(low))));
    store(b.value[i] + v * kLanes, value);
    store(b.error[i] + v * kLanes, (second ? weight : target) - value * scale);
  }
}

static void round_with_feedback(const FeedbackJob& job, int64_t row0, int64_t row1) {
  static thread_local FeedbackBlock b;
  const int64_t groups = job.k / job.group;
  const float low = float(job.low), high = float(job.high);
  for (int64_t row = row0; row < row1; row += kFeedbackRows) {
    const int rows = int(row1 - row < kFeedbackRows ? row1 - row : kFeedbackRows);
    for (int64_t start = 0; start < job.k; start += job.block) {
      const int width = int(job.k - start < job.block ? job.k - start : job.block);
      const int32_t* order = job.order + start;
      for (int i = 0; i < width; ++i) {
        const int64_t column = start + order[i];
        for (int r = 0; r < kFeedbackRows; ++r) {
          const int64_t at = row + (r < rows ? r : 0);  // lanes past the end repeat a row
          b.weight[i][r] = job.weight[at * job.k + column];
          b.scale[i][r] = bf16_to_float(job.scale[at * groups + column / job.group]);
        }
      }
      const int64_t square = start * job.block;
      __builtin_memset(b.error, 0, sizeof b.error);  // column i itself may be summed: its factor is zero
      for (int i = 0; i < width; ++i)
        round_column(b, i, (i + 1) & ~1, job.first + square + int64_t(i) * job.block, low, high, false);
      for (int i = 0; i < width; ++i)
        for (int v = 0; v < kFeedbackVectors; ++v) {
          const vf done = load<vf>(b.value[i] + v * kLanes) * load<vf>(b.scale[i] + v * kLanes);
          store(b.error[i] + v * kLanes, load<vf>(b.weight[i] + v * kLanes) - done);
        }
      for (int i = 0; i < width; ++i)
        round_column(b, i, width, job.again + square + int64_t(i) * job.block, low, high, true);
      for (int i = 0; i < width; ++i)
        for (int r = 0; r < rows; ++r)
          job.values[(row + r) * job.k + start + order[i]] = int8_t(b.value[i][r]);
    }
  }
}
