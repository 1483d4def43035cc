// Which experts the coming layers will probably choose: their routers on the hidden state as it is now.
#pragma once
#include <vector>

#include "kernels.h"
#include "router.h"

namespace coldstream {

// What a guess is made from: a token's embedding, a layer's output without its missing experts, a whole output, the
// embedding of a token that is itself a guess.
enum GuessKind : int32_t { kFromEmbedding = 0, kFromPartial = 1, kFromOutput = 2, kFromGuessedToken = 3 };
constexpr int kGuessKinds = 4;

// Filled by Python. Legend: L MoE layers, E experts, k chosen per token, D how many layers a guess reaches, B bins.
struct Lookahead {
  Weight routers;  // [L * E, H] plain, each row multiplied by its layer's norm weight
  int32_t layers, experts, top_k, depth;
  int32_t bins;          // of the margin between the last chosen and the next logit, in standard deviations
  int32_t slots;         // guesses that are kept for a layer until it has chosen
  float trust, memory;   // read for guesses right this often; what one comparison leaves of the past
  const float* edges;    // [B - 1]
  float* right;          // [kGuessKinds, D, B]: how often such guesses were right
  int32_t* guesses;      // [L, slots, 2 + k]: index into `right`, the token's row in the step, experts
  int32_t* counts;       // [L]: slots in use
  const float* bias;     // [L * E] or null: added to the logits of the normed state
  const float* correction;  // [L * E] or null: see Selection
  Selection selection;
};

struct Expected {
  int32_t index, expert;  // MoE layer by its place among the MoE layers
};

// Guesses for the MoE layers after `here` (-1: from the first on) from x [rows, H], nearest first; appends those worth
// a read, each once.
void guess(const Lookahead& lookahead, GuessKind kind, int32_t here, const float* x, int64_t rows,
           std::vector<Expected>& expected);

// Compare what was guessed for MoE layer `index` with what each row chose, [rows, k].
void learn(const Lookahead& lookahead, int32_t index, const int32_t* chosen, int64_t rows);

}  // namespace coldstream
