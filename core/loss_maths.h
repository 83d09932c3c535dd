// The maths of the losses, once, for every backend: it compiles under g++ and nvcc and is templated
// on the number type, so that kernels run it in float and tests in double. Everything here is
// called once a row (the target's column, the row's loss), never once a logit.
//
// Sources: hard mining is the paper's Equation 2 and Algorithm 1; Knot Magnify is Rao et al.'s; psi
// is SphereFace's (Liu et al. 2017) extended to m1 theta + m2 (ArcFace, Deng et al. 2019) and to m3
// (CosFace, Wang et al. 2018); centers move as in Wen et al. 2016. The Euclidean margin loss is our
// reading of "Making Faces More Separable", of which only the abstract is public to us.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "core/loss.h"

#ifdef __CUDACC__
#define HARDMINE_HD __host__ __device__
#else
#define HARDMINE_HD
#endif

namespace hardmine {

// 1 / (1 + e^-x), split by sign so that no exponential overflows.
template <typename T>
HARDMINE_HD T sigmoid(T x) {
  if (x >= T(0)) return T(1) / (T(1) + std::exp(-x));
  const T e = std::exp(x);
  return e / (T(1) + e);
}

// ---- The weighting of a row's loss ----

// A row's loss L after the weighting, W(L), and dW/dL, which multiplies the row's gradient.
template <typename T>
struct WeightedLoss {
  T weighted;
  T gradient_weight;
};

// Knot Magnify's gamma p with p = e^-L, and 1 / (gamma p + 1).
template <typename T>
struct Knot {
  T gamma_p;
  T inverse;
};

template <typename T>
HARDMINE_HD Knot<T> knot_at(T loss, const Weighting& weighting) {
  const T gamma_p = T(weighting.gamma) * std::exp(-loss);
  return {gamma_p, T(1) / (gamma_p + T(1))};
}

// W(L) / L. Hard mining: c g(L) with g(L) = sigmoid(A (beta L - B)) and c = alpha (Equation 2) or
// alpha beta (Algorithm 1, whose x is already beta L). Knot Magnify: (gamma p + 1)^-2. 1 without a
// weighting.
template <typename T>
HARDMINE_HD T weighting_ratio(T loss, const Weighting& weighting) {
  if (weighting.kind == WeightingKind::none) return T(1);
  if (weighting.kind == WeightingKind::knot_magnify) {
    const Knot<T> knot = knot_at(loss, weighting);
    return knot.inverse * knot.inverse;
  }
  const T beta = T(weighting.beta);
  const T c =
      weighting.form == HardMiningForm::equation ? T(weighting.alpha) : T(weighting.alpha) * beta;
  return c * sigmoid(T(weighting.A) * (beta * loss - T(weighting.B)));
}

// HM(L) = c L g and dHM/dL = c [g + beta A L g (1 - g)]; KM(L) = L (gamma p + 1)^-2 and dKM/dL =
// (gamma p + 1)^-2 + 2 gamma p L (gamma p + 1)^-3. The reduction plays no part: `loss` is one row's
// loss, or the mean of a batch.
template <typename T>
HARDMINE_HD WeightedLoss<T> weight_loss(T loss, const Weighting& weighting) {
  if (weighting.kind == WeightingKind::none) return {loss, T(1)};
  if (weighting.kind == WeightingKind::knot_magnify) {
    const Knot<T> knot = knot_at(loss, weighting);
    const T ratio = knot.inverse * knot.inverse;
    return {loss * ratio, ratio * (T(1) + T(2) * knot.gamma_p * knot.inverse * loss)};
  }
  const T beta = T(weighting.beta), A = T(weighting.A), B = T(weighting.B);
  const T ratio = weighting_ratio(loss, weighting);
  const T closed = sigmoid(A * (B - beta * loss));  // 1 - g, without cancellation
  return {loss * ratio, ratio * (T(1) + beta * A * (loss * closed))};
}

// The weighting over a whole batch; all spans have one element a row. Reduction::sample weighs each
// loss by itself. Reduction::batch is the paper read literally: HM of the mean loss, so every row's
// gradient weight is dHM/dL at the mean, and weighted[i] = L_i HM(mean) / mean (their mean is
// HM(mean)).
inline void weight_losses(std::span<const double> losses, const Weighting& weighting,
                          std::span<double> weighted, std::span<double> gradient_weight) {
  if (weighting.reduction == Reduction::sample) {
    for (size_t i = 0; i < losses.size(); ++i) {
      const WeightedLoss<double> row = weight_loss(losses[i], weighting);
      weighted[i] = row.weighted;
      gradient_weight[i] = row.gradient_weight;
    }
    return;
  }
  double mean = 0;
  for (const double loss : losses) mean += loss;
  mean /= static_cast<double>(losses.size());
  const double ratio = weighting_ratio(mean, weighting);
  const double factor = weight_loss(mean, weighting).gradient_weight;
  for (size_t i = 0; i < losses.size(); ++i) {
    weighted[i] = losses[i] * ratio;
    gradient_weight[i] = factor;
  }
}

// What the weighting does to a row's gradient, for the step's statistics.
enum class Gate : uint8_t { silenced, kept, amplified };

template <typename T>
HARDMINE_HD Gate gate_of(T gradient_weight) {
  if (gradient_weight < T(0.1)) return Gate::silenced;
  return gradient_weight > T(1) ? Gate::amplified : Gate::kept;
}

// ---- The margin at the target's column ----

// The target's cosine after the margin, before the scale, and its derivative by the cosine.
template <typename T>
struct MarginValue {
  T value;
  T derivative;
};

// The law with its margin grown to the share `factor` of [0, 1] (warm-up of the margin).
HARDMINE_HD inline MarginLaw warmed_up(MarginLaw law, double factor) {
  law.m1 = 1 + (law.m1 - 1) * factor;
  law.m2 *= factor;
  law.m3 *= factor;
  return law;
}

// psi(cos) = (-1)^k cos(phi) - 2k - m3 with phi = m1 acos(cos) + m2 and k = floor(phi / pi) when
// `mirror` (monotone and continuous beyond pi), else k = 0: the formula as printed. Mixed with the
// plain cosine as (lambda cos + psi) / (1 + lambda). d psi / d cos = (-1)^k m1 sin(phi) /
// sin(theta) diverges at |cos| = 1, so the derivative alone, not the value, is taken at cos clamped
// to
// +-(1 - 1e-7); detached, it is 1.
template <typename T>
HARDMINE_HD MarginValue<T> margin_target(T cosine, const MarginLaw& law) {
  const T pi = T(3.14159265358979323846);
  const T m1 = T(law.m1), m2 = T(law.m2), m3 = T(law.m3), lambda = T(law.lambda);
  MarginValue<T> psi{cosine - m3, T(1)};
  if (m1 != T(1) || m2 != T(0)) {
    const T inside = cosine > T(1)    ? T(1)
                     : cosine < T(-1) ? T(-1)
                                      : cosine;  // rounding may leave it
    const T phi = m1 * std::acos(inside) + m2;
    const T k = law.mirror ? std::floor(phi / pi) : T(0);
    const T sign = std::fmod(k, T(2)) == T(0) ? T(1) : T(-1);
    psi.value = sign * std::cos(phi) - T(2) * k - m3;
    if (!law.detached) {
      const T limit = T(1) - T(1e-7);
      const T c = cosine > limit ? limit : cosine < -limit ? -limit : cosine;
      const T theta = std::acos(c);
      const T phi_c = m1 * theta + m2;
      const T k_c = law.mirror ? std::floor(phi_c / pi) : T(0);
      const T sign_c = std::fmod(k_c, T(2)) == T(0) ? T(1) : T(-1);
      psi.derivative = sign_c * m1 * std::sin(phi_c) / std::sin(theta);
    }
  }
  return {(lambda * cosine + psi.value) / (T(1) + lambda),
          (lambda + psi.derivative) / (T(1) + lambda)};
}

// ---- The Euclidean margin over classes in parts ----
//
// With z_j = 2 cos_j every distance is d_j = 2 - z_j, so that margin + d_y - d_j = z_j - (z_y -
// margin): a hinge is what a class's logit z_j is above one threshold of its row.

inline constexpr double kEuclideanScale = 2;  // z_j / cos_j

// The law with its margin grown to the share `factor` of [0, 1].
HARDMINE_HD inline EuclideanMargin warmed_up(EuclideanMargin law, double factor) {
  law.margin *= factor;
  return law;
}

// The hinges of some classes of a row: their sum, how many are above 0 (one that is exactly 0 is
// not active; one that is NaN is, so that the loss shows it), and the largest logit, active or not.
// The default is that of no classes.
template <typename T>
struct HingeSum {
  T sum = T(0);
  T max = std::numeric_limits<T>::lowest();
  int32_t active = 0;
};

template <typename T>
HARDMINE_HD void add_hinge(HingeSum<T>& sums, T logit, T threshold) {
  const T hinge = logit - threshold;
  if (!(hinge <= T(0))) {
    sums.sum += hinge;
    ++sums.active;
  }
  if (logit > sums.max) sums.max = logit;
}

template <typename T>
HARDMINE_HD HingeSum<T> merge(const HingeSum<T>& a, const HingeSum<T>& b) {
  return {a.sum + b.sum, a.max > b.max ? a.max : b.max, a.active + b.active};
}

// A row's loss from the hinges of all the other classes. Every active class has the derivative 1 /
// active by its logit; that of the target, -([active > 0] + pull), is given in units of it.
template <typename T>
struct EuclideanLoss {
  T loss;
  T unit;
  T target;
};

template <typename T>
HARDMINE_HD EuclideanLoss<T> euclidean_loss(T target, const HingeSum<T>& others,
                                            const EuclideanMargin& law) {
  const T count = others.active > 0 ? T(others.active) : T(1);
  // Rounding may take the target's cosine above 1.
  const T distance = target > T(kEuclideanScale) ? T(0) : T(kEuclideanScale) - target;
  const T pull = T(law.pull);
  return {others.sum / count + pull * distance, T(1) / count,
          -((others.active > 0 ? T(1) : T(0)) + pull) * count};
}

// ---- Softmax over classes in parts ----

// max and sum of e^(z - max) over some logits; the default is that of no logits. Finite instead of
// -infinity so that merging two empty parts gives no NaN.
template <typename T>
struct SoftmaxSum {
  T max = std::numeric_limits<T>::lowest();
  T sum = T(0);
};

template <typename T>
HARDMINE_HD SoftmaxSum<T> merge(const SoftmaxSum<T>& a, const SoftmaxSum<T>& b) {
  const T max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * std::exp(a.max - max) + b.sum * std::exp(b.max - max)};
}

// Cross-entropy of a row and its derivative by the target's logit, from the target's logit and the
// softmax sum of all the other classes: with d = max + ln sum - target, L = ln(1 + e^d) and
// dL/dtarget = -sigmoid(d) = p - 1. Nothing cancels and nothing is clamped: L stays exact to the
// last bits from 1e-30 to thousands.
template <typename T>
struct TargetLoss {
  T loss;
  T derivative;
};

template <typename T>
HARDMINE_HD TargetLoss<T> target_loss(T target, const SoftmaxSum<T>& others) {
  if (others.sum == T(0)) return {T(0), T(0)};  // the only class
  const T d = others.max + std::log(others.sum) - target;
  const T loss = d > T(0) ? d + std::log1p(std::exp(-d)) : std::log1p(std::exp(d));
  return {loss, -sigmoid(d)};
}

}  // namespace hardmine
