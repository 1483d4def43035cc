#include "product.h"

#include <algorithm>
#include <atomic>

namespace coldstream {
namespace {

struct FreeBlock {
  void operator()(void* block) const { std::free(block); }
};

struct Blocks {
  std::vector<std::pair<std::unique_ptr<void, FreeBlock>, int64_t>> owned;
  size_t block = 0;
  int64_t used = 0;
};

thread_local Blocks blocks;

constexpr int64_t kSmallestBlock = 1 << 20, kKeep = 64 << 20;

// Rows of one task: enough bytes to make claiming it free, few enough that the last task is short.
int64_t rows_per_task(const Product& product, int64_t all_bytes, int threads) {
  const int64_t share = all_bytes / (threads * 8);
  const int64_t bytes = std::clamp<int64_t>(share, 16 << 10, 64 << 10);
  const int64_t rows = std::max<int64_t>(bytes / std::max<int64_t>(product.weight.row_bytes(), 1), 4);
  return round_up(rows, kernels().gemv_rows);
}

// One product's rows, cut into tasks.
struct Span {
  const Product* product;
  int64_t rows, first_task;
  bool gemm;
};

// The rows of all products as tasks, in the order in which they are shared out.
struct Tasks {
  std::vector<Span> spans;
  int64_t count = 0;

  Tasks(const Product* products, int products_count, bool exact) {
    const int threads = thread_count();
    int64_t all_bytes = 0;
    for (int i = 0; i < products_count; ++i) all_bytes += products[i].weight.row_bytes() * products[i].weight.n;
    for (int i = 0; i < products_count; ++i) {
      const Product& product = products[i];
      const Weight& w = product.weight;
      if (!product.tokens || !w.n) continue;
      const bool many = product.tokens > kGemvTokens;
      const int64_t rows = many ? kernels().gemm_rows : rows_per_task(product, all_bytes, threads);
      spans.push_back({&product, rows, count, many && !exact && w.is_packed()});
      count += (w.n + rows - 1) / rows;
    }
  }

  const Span& of(int64_t task) const {
    auto next = std::upper_bound(spans.begin(), spans.end(), task,
                                 [](int64_t value, const Span& span) { return value < span.first_task; });
    return *--next;
  }
};

// One byte of every cache line: the line comes along.
void touch_bytes(const uint8_t* from, int64_t count) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < count; i += kLine) (void)*static_cast<const volatile uint8_t*>(from + i);
  if (count) (void)*static_cast<const volatile uint8_t*>(from + count - 1);
}

}  // namespace

Scratch::Scratch() {
  blocks.block = 0;
  blocks.used = 0;
}

Scratch::~Scratch() {
  int64_t total = 0;
  for (auto& [block, size] : blocks.owned) total += size;
  if (total > kKeep) blocks.owned.clear();
}

void* Scratch::bytes(int64_t count) {
  count = round_up(std::max<int64_t>(count, 1), 64);
  for (; blocks.block < blocks.owned.size(); ++blocks.block, blocks.used = 0) {
    auto& [block, size] = blocks.owned[blocks.block];
    if (blocks.used + count > size) continue;
    void* result = static_cast<char*>(block.get()) + blocks.used;
    blocks.used += count;
    return result;
  }
  const int64_t size = std::max(count, kSmallestBlock);
  void* fresh = std::aligned_alloc(64, size_t(size));
  if (!fresh) throw std::bad_alloc();
  blocks.owned.emplace_back(fresh, size);
  blocks.block = blocks.owned.size() - 1;
  blocks.used = count;
  return fresh;
}

void quantize_inputs(Product* products, int count, Scratch& scratch) {
  struct Input {
    const Product* from;
    int8_t* q;
    float* scale;
    int32_t* sum;
    int64_t first_task;
  };
  std::vector<Input> inputs;
  int64_t tasks = 0, values = 0;
  for (int i = 0; i < count; ++i) {
    Product& product = products[i];
    const Weight& w = product.weight;
    if (!w.is_packed() || !product.tokens) continue;
    auto same = std::find_if(products, products + i, [&](const Product& other) {
      return other.weight.kind == w.kind && other.weight.group == w.group && other.weight.k == w.k &&
             other.x == product.x && other.ldx == product.ldx && other.tokens == product.tokens;
    });
    if (same != products + i) {
      product.quantized = same->quantized;
      continue;
    }
    const int64_t q_stride = round_up(w.k, 256), g_stride = round_up(w.groups(), kGroupRun);
    Input input{&product, scratch.take<int8_t>(product.tokens * q_stride),
                scratch.take<float>(product.tokens * g_stride), scratch.take<int32_t>(product.tokens * g_stride),
                tasks};
    product.quantized = Activations{input.q, input.scale, input.sum, q_stride, g_stride};
    inputs.push_back(input);
    tasks += product.tokens;
    values += product.tokens * w.k;
  }
  const Kernels& table = kernels();
  auto one = [&](int64_t task, int) {
    auto next = std::upper_bound(inputs.begin(), inputs.end(), task,
                                 [](int64_t value, const Input& input) { return value < input.first_task; });
    const Input& input = *--next;
    const int64_t t = task - input.first_task;
    const Product& product = *input.from;
    const Activations& rows = product.quantized;
    table.quantize_activations(product.x + t * product.ldx, product.weight.k, product.weight.kind,
                               product.weight.group, product.tokens == 1, input.q + t * rows.q_stride,
                               input.scale + t * rows.g_stride, input.sum + t * rows.g_stride);
  };
  if (values < (64 << 10)) {  // a few microseconds of work: waking the others costs more
    for (int64_t task = 0; task < tasks; ++task) one(task, 0);
  } else {
    parallel(tasks, one);
  }
}

void multiply(const Product* products, int count, bool exact, Scratch& scratch) {
  const Kernels& table = kernels();
  const Tasks tasks(products, count, exact);
  int64_t panel = 0;
  for (const Span& span : tasks.spans) {
    const Weight& w = span.product->weight;
    if (span.gemm)
      panel = std::max(panel, round_up(w.k * table.gemm_rows, 64) + w.groups() * table.gemm_rows * 4);
  }
  panel = round_up(panel, 4096);
  uint8_t* panels = panel ? scratch.take<uint8_t>(panel * thread_count()) : nullptr;
  parallel(tasks.count, [&](int64_t task, int worker) {
    const Span& span = tasks.of(task);
    const Product& product = *span.product;
    const Weight& w = product.weight;
    const int64_t row0 = (task - span.first_task) * span.rows, row1 = std::min(row0 + span.rows, w.n);
    const int tokens = int(product.tokens);
    if (span.gemm)
      table.gemm(w, row0, row1, product.quantized, tokens, product.y, product.ldy, panels + worker * panel);
    else if (exact || !w.is_packed())
      table.dense(w, row0, row1, product.x, product.ldx, tokens, product.y, product.ldy);
    else
      table.gemv(w, row0, row1, product.quantized, tokens, product.y, product.ldy);
  });
}

int64_t touch(const Product* products, int count, bool exact, int64_t budget, bool (*stop)(const void*),
              const void* context) {
  const Tasks tasks(products, count, exact);
  const int64_t workers = thread_count();
  std::atomic<int64_t> touched{0};
  parallel(workers, [&](int64_t worker, int) {
    int64_t done = 0;
    const int64_t last = first_task(tasks.count, worker + 1, workers);
    for (int64_t task = first_task(tasks.count, worker, workers); task < last; ++task) {
      const Span& span = tasks.of(task);
      const Weight& w = span.product->weight;
      const int64_t row0 = (task - span.first_task) * span.rows, row1 = std::min(row0 + span.rows, w.n);
      const int64_t scales = w.is_packed() ? w.groups() * 2 : 0;
      for (int64_t row = row0; row < row1; ++row) {
        if (done + w.row_bytes() + scales > budget / workers || stop(context)) {
          touched.fetch_add(done, std::memory_order_relaxed);
          return;
        }
        touch_bytes(w.packed + row * w.stride(), w.row_bytes());
        if (scales) touch_bytes(reinterpret_cast<const uint8_t*>(w.scale + row * w.scale_stride()), scales);
        done += w.row_bytes() + scales;
      }
    }
    touched.fetch_add(done, std::memory_order_relaxed);
  });
  return touched.load(std::memory_order_relaxed);
}

}  // namespace coldstream

// y = x · Wᵀ. Tokens are taken in blocks, so that scratch stays small whatever the prompt.
COLDSTREAM_API int32_t cs_linear(const coldstream::Weight* weight, const float* x, int64_t ldx, int64_t tokens,
                                 float* y, int64_t ldy, int32_t exact) {
  using namespace coldstream;
  constexpr int64_t kBlock = 1024;
  return guarded([&] {
    for (int64_t first = 0; first < tokens; first += kBlock) {
      Scratch scratch;
      Product product{*weight, x + first * ldx, ldx, std::min(kBlock, tokens - first), y + first * ldy, ldy, {}};
      if (!exact) quantize_inputs(&product, 1, scratch);
      multiply(&product, 1, exact != 0, scratch);
    }
  });
}
