// What a loss is, as data: the base loss, its margin law and the weighting over it. The formulas
// are in core/loss_maths.h; every backend takes these structures.
#pragma once

#include <cstdint>

namespace hardmine {

// softmax: logits x.w + b. margin: logits scale * cos, the target's scale * psi(theta).
// A-Softmax is the margin law with m1 = m, the embedding's norm as scale and lambda annealing.
// euclidean_margin: hinges on the distances between normalised vectors instead of a softmax.
enum class BaseKind : uint8_t { softmax, margin, euclidean_margin };

// Whether a base loss sees embeddings and class weights by their directions alone.
constexpr bool normalises(BaseKind base) {
  return base != BaseKind::softmax;
}

struct MarginLaw {
  // psi(theta) = cos(m1 theta + m2) - m3 while m1 theta + m2 <= pi; beyond see `mirror`.
  double m1 = 1, m2 = 0, m3 = 0;
  double scale = 64;        // s; ignored when norm_scale
  bool norm_scale = false;  // s_i = ||x_i|| (A-Softmax)
  double lambda = 0;        // target = (lambda cos + psi) / (1 + lambda)
  bool mirror = true;       // beyond pi: (-1)^k cos phi - 2k - m3, k = floor(phi / pi)
  bool detached = false;    // d psi / d cos taken as 1 (arcface_torch's "characteristic gradient")
};

// With d_j = ||x_hat - w_hat_j||^2 = 2 - 2 cos_j, y the target and the mean over the classes whose
// hinge is above 0:
//   L = mean_{j != y} max(0, margin + d_y - d_j) + pull d_y
struct EuclideanMargin {
  double margin = 0.4;
  double pull = 0.5;
};

enum class WeightingKind : uint8_t { none, hard_mining, knot_magnify };
enum class HardMiningForm : uint8_t {
  equation,
  algorithm
};  // Equation 2; Algorithm 1 (a factor beta)
enum class Reduction : uint8_t { sample, batch };

struct Weighting {
  WeightingKind kind = WeightingKind::none;
  double alpha = 1.5, beta = 1.1, A = 35, B = 0.75;  // the paper's constants
  double gamma = 0;                                  // Knot Magnify
  HardMiningForm form = HardMiningForm::equation;
  Reduction reduction = Reduction::sample;
};

// Added to the mean weighted loss: weight / (2 N) sum_i ||x_i - c_y||^2 on the raw embeddings. A
// step then moves each center by c -= rate sum_i (c - x_i) / (1 + n) over its n rows.
struct CenterLoss {
  double weight = 0;  // 0: none
  double rate = 0.5;
};

struct LossSpec {
  BaseKind base = BaseKind::margin;
  MarginLaw margin;           // of BaseKind::margin
  EuclideanMargin euclidean;  // of BaseKind::euclidean_margin
  Weighting weighting;
  CenterLoss center;

  bool scales_by_norm() const { return base == BaseKind::margin && margin.norm_scale; }
  bool has_centers() const { return center.weight > 0; }
};

}  // namespace hardmine
