// This instruction set's kernels as one table.
static constexpr Kernels table(const char* name) {
  return Kernels{name, 0, quantize_rows, quantize_columns, checksum};
}
