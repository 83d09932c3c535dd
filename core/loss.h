// What a loss is, as data: the base loss, its margin law and the weighting over it. The formulas
// are in core/loss_maths.h; every backend takes these structures.
#pragma once

#include <cstdint>

namespace hardmine {

// softmax: logits x.w + b. margin: logits scale * cos, the target's scale * psi(theta).
// A-Softmax is the margin law with m1 = m, the embedding's norm as scale and lambda annealing.
enum class BaseKind : uint8_t { softmax, margin };

struct MarginLaw {
  // psi(theta) = cos(m1 theta + m2) - m3 while m1 theta + m2 <= pi; beyond see `mirror`.
  double m1 = 1, m2 = 0, m3 = 0;
  double scale = 64;        // s; ignored when norm_scale
  bool norm_scale = false;  // s_i = ||x_i|| (A-Softmax)
  double lambda = 0;        // target = (lambda cos + psi) / (1 + lambda)
  bool mirror = true;       // beyond pi: (-1)^k cos phi - 2k - m3, k = floor(phi / pi)
  bool detached = false;    // d psi / d cos taken as 1 (arcface_torch's "characteristic gradient")
};

enum class WeightingKind : uint8_t { none, hard_mining };
enum class HardMiningForm : uint8_t {
  equation,
  algorithm
};  // Equation 2; Algorithm 1 (a factor beta)
enum class Reduction : uint8_t { sample, batch };

struct Weighting {
  WeightingKind kind = WeightingKind::none;
  double alpha = 1.5, beta = 1.1, A = 35, B = 0.75;  // the paper's constants
  HardMiningForm form = HardMiningForm::equation;
  Reduction reduction = Reduction::sample;
};

struct LossSpec {
  BaseKind base = BaseKind::margin;
  MarginLaw margin;
  Weighting weighting;
};

}  // namespace hardmine
