// Every kernel, in the order in which they use each other, and the table of them.
#include "quantize.inl"
#include "feedback.inl"
#include "codes.inl"
#include "activations.inl"
#include "unpack.inl"
#include "gemv.inl"
#include "gemm.inl"
#include "dense.inl"
#include "floats.inl"
#include "attend.inl"
#include "attend_compressed.inl"
#include "key_ranges.inl"
#include "peak.inl"

static constexpr Kernels table(const char* name, void (*its_attend)(const AttendTask&),
                               decltype(Kernels::turned) its_turned = dense_turned) {
  return Kernels{name, kLanes, kPanelRows, quantize_rows, quantize_columns, round_with_feedback, widen_codes,
                 quantize_activations, gemv, gemm, dense, dense_turned, its_turned, silu_multiply, rms_norm,
                 add_scaled, blend, its_attend, find_ranges, bound_scores, checksum, dot_products};
}
