// The element-wise loops of the margin head, compiled once per instruction set (head_loops.cpp) and
// picked at run time. Logits of a softmax are in base 2 (already multiplied by log2 e), so that it
// needs 2^x alone.
#pragma once

#include <cstdint>

namespace hardmine {

// Columns of a padded batch: class-major tiles hold a multiple of this many rows, the most floats
// of one vector, so that no loop has a remainder.
inline constexpr int64_t kRowMultiple = 16;

inline constexpr float kLog2E = 1.44269504F;

// A class-major tile of the logits: element [j, i] is
// dots[j * rows + i] * class_scale[j] * row_scale[i] + bias[j] log2 e.
struct LogitTile {
  const float* dots;
  int64_t classes;
  int64_t rows;              // padded to kRowMultiple; also the stride
  const float* class_scale;  // [classes]
  const float* bias;         // [classes] or null
  const float* row_scale;    // [rows], log2 e included where a softmax follows
};

// The hinges of rows so far: see core/loss_maths.h. Logits are in base e here.
struct HingeRows {
  const float* threshold;  // [rows]
  float* sum;              // [rows]
  float* max;              // [rows]
  int32_t* active;         // [rows]
};

struct SgdCoefficients {
  float lr;
  float momentum;
};

struct HeadLoops {
  // ---- fused ----
  // Merges a tile into each row's running max and sum of 2^(logit - max).
  void (*softmax_tile)(const LogitTile& tile, float* max, float* sum);
  // out[j, i] = 2^(logit - log_sum[i]) * class_scale[j]; out may be the tile's own dots.
  void (*gradient_tile)(const LogitTile& tile, const float* log_sum, float* out);
  // The same, rounded to bfloat16.
  void (*gradient_tile_bf16)(const LogitTile& tile, const float* log_sum, uint16_t* out);
  // Adds a tile's hinges to each row's.
  void (*hinge_tile)(const LogitTile& tile, const HingeRows& rows);
  // out[j, i] = class_scale[j] where the logit is above threshold[i], else 0; out may be the tile's
  // own dots.
  void (*hinge_gradient_tile)(const LogitTile& tile, const float* threshold, float* out);
  // The same, rounded to bfloat16.
  void (*hinge_gradient_tile_bf16)(const LogitTile& tile, const float* threshold, uint16_t* out);
  // ---- rows of any length ----
  void (*to_bf16)(const float* values, uint16_t* out, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*dot_bf16)(const uint16_t* a, const float* b, int64_t n);
  // out = factor * values
  void (*scale)(const float* values, float factor, float* out, int64_t n);
  // out = y + factor * x; out may be y
  void (*add_scaled)(const float* y, const float* x, float factor, float* out, int64_t n);
  // v = momentum v + (gradient + pull w); w -= lr v; returns the new w's sum of squares.
  float (*sgd)(const float* gradient, float pull, const SgdCoefficients& coefficients, float* w,
               float* v, int64_t n);
  // ---- unfused: a row of [rows, classes] ----
  // Max of a row and sum of e^(z - max).
  void (*softmax_row)(const float* logits, int64_t n, float* max, float* sum);
  // out = logits - log_sum
  void (*log_softmax_row)(const float* logits, float log_sum, float* out, int64_t n);
  // out = factor * e^log_probability
  void (*softmax_gradient_row)(const float* log_probability, float factor, float* out, int64_t n);
  // Sum and number of the hinges z - threshold above 0, and the largest z.
  void (*hinge_row)(const float* logits, float threshold, int64_t n, float* sum, float* max,
                    int32_t* active);
  // out = factor where the logit is above the threshold, else 0
  void (*hinge_gradient_row)(const float* logits, float threshold, float factor, float* out,
                             int64_t n);
};

// The loops of the best instruction set this CPU has.
const HeadLoops& head_loops();

namespace baseline {
extern const HeadLoops kHeadLoops;
}
namespace avx2 {
extern const HeadLoops kHeadLoops;
}
namespace avx512 {
extern const HeadLoops kHeadLoops;
}

}  // namespace hardmine
