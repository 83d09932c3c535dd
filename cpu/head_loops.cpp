// The margin head's element-wise loops. Compiled once per instruction set into namespace
// HARDMINE_ISA; nothing from the standard library is used here, so that no inline function compiled
// for a newer CPU can be shared with code that runs on an older one.
#include "cpu/head_loops.h"

namespace hardmine::HARDMINE_ISA {
namespace {

constexpr float kLowest = -3.40282347e38F;

inline float larger(float a, float b) {
  return a > b ? a : b;
}

// 2^x for x <= 128, to 1.5e-7 relative; 2^-126 below that. x = n + f with n integral and f in
// [-0.5, 0.5]: adding 1.5 * 2^23 leaves n in the low bits of the float, and shifting them to the
// exponent multiplies by 2^n. The polynomial is our minimax fit of 2^f with constant term 1
// (9.2e-8).
inline float exp2_fast(float x) {
  x = x < -126.0F ? -126.0F : x;
  const float shifted = x + 12582912.0F;
  const float f = x - (shifted - 12582912.0F);
  float p = 0.001326472614891827F;
  p = p * f + 0.009671512991189957F;
  p = p * f + 0.05550733581185341F;
  p = p * f + 0.24022242426872253F;
  p = p * f + 0.6931470036506653F;
  p = p * f + 1.0F;
  const uint32_t bits =
      __builtin_bit_cast(uint32_t, p) + (__builtin_bit_cast(uint32_t, shifted) << 23);
  return __builtin_bit_cast(float, bits);
}

// Round to nearest, ties to even. Inputs are finite: norms are checked before any product.
inline uint16_t bf16_of(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

inline float float_of(uint16_t bf16) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bf16) << 16);
}

// Two passes over a strip that stays in the first-level cache: the max, then the sum, so that the
// running sum is rescaled once a strip.
constexpr int64_t kStripClasses = 32;
constexpr int64_t kStripRows = 128;  // 32 * 128 floats: 16 KiB

void softmax_strip(const LogitTile& tile, int64_t class_from, int64_t class_to, int64_t row_from,
                   int64_t rows, float* max, float* sum) {
  float old[kStripRows];
  const float* row_scale = tile.row_scale + row_from;
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) old[i] = max[i];
  for (int64_t j = class_from; j < class_to; ++j) {
    const float* dots = tile.dots + j * tile.rows + row_from;
    const float scale = tile.class_scale[j];
    const float bias = tile.bias != nullptr ? tile.bias[j] * kLog2E : 0.0F;
#pragma omp simd
    for (int64_t i = 0; i < rows; ++i)
      max[i] = larger(dots[i] * scale * row_scale[i] + bias, max[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < rows; ++i) sum[i] *= exp2_fast(old[i] - max[i]);
  for (int64_t j = class_from; j < class_to; ++j) {
    const float* dots = tile.dots + j * tile.rows + row_from;
    const float scale = tile.class_scale[j];
    const float bias = tile.bias != nullptr ? tile.bias[j] * kLog2E : 0.0F;
#pragma omp simd
    for (int64_t i = 0; i < rows; ++i)
      sum[i] += exp2_fast(dots[i] * scale * row_scale[i] + bias - max[i]);
  }
}

void softmax_tile(const LogitTile& tile, float* max, float* sum) {
  for (int64_t j = 0; j < tile.classes; j += kStripClasses) {
    const int64_t class_to = j + kStripClasses < tile.classes ? j + kStripClasses : tile.classes;
    for (int64_t i = 0; i < tile.rows; i += kStripRows) {
      const int64_t rows = tile.rows - i < kStripRows ? tile.rows - i : kStripRows;
      softmax_strip(tile, j, class_to, i, rows, max + i, sum + i);
    }
  }
}

void gradient_tile(const LogitTile& tile, const float* log_sum, float* out) {
  for (int64_t j = 0; j < tile.classes; ++j) {
    const float* dots = tile.dots + j * tile.rows;
    float* gradient = out + j * tile.rows;
    const float scale = tile.class_scale[j];
    const float bias = tile.bias != nullptr ? tile.bias[j] * kLog2E : 0.0F;
#pragma omp simd
    for (int64_t i = 0; i < tile.rows; ++i)
      gradient[i] = exp2_fast(dots[i] * scale * tile.row_scale[i] + bias - log_sum[i]) * scale;
  }
}

void gradient_tile_bf16(const LogitTile& tile, const float* log_sum, uint16_t* out) {
  for (int64_t j = 0; j < tile.classes; ++j) {
    const float* dots = tile.dots + j * tile.rows;
    uint16_t* gradient = out + j * tile.rows;
    const float scale = tile.class_scale[j];
    const float bias = tile.bias != nullptr ? tile.bias[j] * kLog2E : 0.0F;
#pragma omp simd
    for (int64_t i = 0; i < tile.rows; ++i)
      gradient[i] =
          bf16_of(exp2_fast(dots[i] * scale * tile.row_scale[i] + bias - log_sum[i]) * scale);
  }
}

// The hinges of a strip are summed apart, so that a row of many classes loses few digits.
void hinge_strip(const LogitTile& tile, int64_t class_from, int64_t class_to, int64_t row_from,
                 int64_t count, const HingeRows& rows) {
  float sum[kStripRows];
  const float* row_scale = tile.row_scale + row_from;
  const float* threshold = rows.threshold + row_from;
  float* max = rows.max + row_from;
  int32_t* active = rows.active + row_from;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] = 0.0F;
  for (int64_t j = class_from; j < class_to; ++j) {
    const float* dots = tile.dots + j * tile.rows + row_from;
    const float scale = tile.class_scale[j];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float logit = dots[i] * scale * row_scale[i];
      const float hinge = logit - threshold[i];
      sum[i] += hinge <= 0.0F ? 0.0F : hinge;
      active[i] += hinge <= 0.0F ? 0 : 1;
      max[i] = larger(logit, max[i]);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) rows.sum[row_from + i] += sum[i];
}

void hinge_tile(const LogitTile& tile, const HingeRows& rows) {
  for (int64_t j = 0; j < tile.classes; j += kStripClasses) {
    const int64_t class_to = j + kStripClasses < tile.classes ? j + kStripClasses : tile.classes;
    for (int64_t i = 0; i < tile.rows; i += kStripRows) {
      const int64_t count = tile.rows - i < kStripRows ? tile.rows - i : kStripRows;
      hinge_strip(tile, j, class_to, i, count, rows);
    }
  }
}

void hinge_gradient_tile(const LogitTile& tile, const float* threshold, float* out) {
  for (int64_t j = 0; j < tile.classes; ++j) {
    const float* dots = tile.dots + j * tile.rows;
    float* gradient = out + j * tile.rows;
    const float scale = tile.class_scale[j];
#pragma omp simd
    for (int64_t i = 0; i < tile.rows; ++i)
      gradient[i] = dots[i] * scale * tile.row_scale[i] - threshold[i] <= 0.0F ? 0.0F : scale;
  }
}

void hinge_gradient_tile_bf16(const LogitTile& tile, const float* threshold, uint16_t* out) {
  for (int64_t j = 0; j < tile.classes; ++j) {
    const float* dots = tile.dots + j * tile.rows;
    uint16_t* gradient = out + j * tile.rows;
    const float scale = tile.class_scale[j];
    const uint16_t rounded = bf16_of(scale);
#pragma omp simd
    for (int64_t i = 0; i < tile.rows; ++i)
      gradient[i] =
          dots[i] * scale * tile.row_scale[i] - threshold[i] <= 0.0F ? uint16_t{0} : rounded;
  }
}

void to_bf16(const float* values, uint16_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_of(values[i]);
}

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

float dot_bf16(const uint16_t* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += float_of(a[i]) * b[i];
  return sum;
}

void scale(const float* values, float factor, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor * values[i];
}

void add_scaled(const float* y, const float* x, float factor, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = y[i] + factor * x[i];
}

float sgd(const float* gradient, float pull, const SgdCoefficients& coefficients, float* w,
          float* v, int64_t n) {
  const float lr = coefficients.lr, momentum = coefficients.momentum;
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const float velocity = momentum * v[i] + (gradient[i] + pull * w[i]);
    const float weight = w[i] - lr * velocity;
    v[i] = velocity;
    w[i] = weight;
    squares += weight * weight;
  }
  return squares;
}

void softmax_row(const float* logits, int64_t n, float* max, float* sum) {
  float m = kLowest;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = larger(logits[i], m);
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += exp2_fast((logits[i] - m) * kLog2E);
  *max = m;
  *sum = s;
}

void log_softmax_row(const float* logits, float log_sum, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = logits[i] - log_sum;
}

void softmax_gradient_row(const float* log_probability, float factor, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor * exp2_fast(log_probability[i] * kLog2E);
}

void hinge_row(const float* logits, float threshold, int64_t n, float* sum, float* max,
               int32_t* active) {
  float s = 0, m = kLowest;
  int32_t count = 0;
#pragma omp simd reduction(+ : s, count) reduction(max : m)
  for (int64_t i = 0; i < n; ++i) {
    const float hinge = logits[i] - threshold;
    s += hinge <= 0.0F ? 0.0F : hinge;
    count += hinge <= 0.0F ? 0 : 1;
    m = larger(logits[i], m);
  }
  *sum = s;
  *max = m;
  *active = count;
}

void hinge_gradient_row(const float* logits, float threshold, float factor, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = logits[i] - threshold <= 0.0F ? 0.0F : factor;
}

}  // namespace

extern const HeadLoops kHeadLoops = {softmax_tile,
                                     gradient_tile,
                                     gradient_tile_bf16,
                                     hinge_tile,
                                     hinge_gradient_tile,
                                     hinge_gradient_tile_bf16,
                                     to_bf16,
                                     dot,
                                     dot_bf16,
                                     scale,
                                     add_scaled,
                                     sgd,
                                     softmax_row,
                                     log_softmax_row,
                                     softmax_gradient_row,
                                     hinge_row,
                                     hinge_gradient_row};

}  // namespace hardmine::HARDMINE_ISA
