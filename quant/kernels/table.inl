// This instruction set's kernels as one table.
static constexpr Kernels table(const char* name) {
  return Kernels{name, kPanelRows, quantize_rows, quantize_columns, quantize_activations, gemv, gemm,
                 dense, silu_multiply, rms_norm, add_scaled, attend, checksum};
}
