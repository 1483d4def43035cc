// Products y = x · Wᵀ, many at a time: quantize the activations, cut all rows into tasks, one parallel pass.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace coldstream {

// Buffers of one call, from blocks that the calling thread keeps for its next call.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * int64_t(sizeof(T))));
  }

 private:
  void* bytes(int64_t count);
};

// Activations of `tokens` rows, quantized for one kind and group size.
struct QuantizedInput {
  Activations rows;
  int32_t kind, group;
};

struct Product {
  Weight weight;
  const float* x;  // [T, K], row stride ldx
  int64_t ldx;
  int64_t tokens;
  float* y;  // [T, N], row stride ldy
  int64_t ldy;
  Activations quantized;  // filled by quantize_inputs for packed weights unless exact
};

// Quantize the inputs of all packed products; products that share x, stride, tokens, kind and group share the
// result.
void quantize_inputs(Product* products, int count, Scratch& scratch);

// One parallel pass over the rows of all products. `exact` keeps f32 activations.
void multiply(const Product* products, int count, bool exact, Scratch& scratch);

// Reads into each worker's caches what it will read first when `multiply` is called with these products, `budget`
// bytes in all, until `stop(context)`, which is asked after every row. Returns how many bytes were read.
int64_t touch(const Product* products, int count, bool exact, int64_t budget, bool (*stop)(const void*),
              const void* context);

// Pages of a KV cache that are elsewhere could not be brought.
struct NoPages {};

// Runs `body`, turning what it throws into a status.
template <class Body>
int32_t guarded(Body&& body) {
  try {
    body();
    return kOk;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (const NoPages&) {
    return kNoPages;
  }
}

}  // namespace coldstream
