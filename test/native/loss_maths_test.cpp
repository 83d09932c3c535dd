// The loss maths in double against formulas written out here, central differences and limits.
#include "core/loss_maths.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

using namespace hardmine;

namespace {

constexpr double kPi = std::numbers::pi;

Weighting hard_mining(HardMiningForm form = HardMiningForm::equation) {
  Weighting weighting;
  weighting.kind = WeightingKind::hard_mining;
  weighting.form = form;
  return weighting;
}

template <typename F>
double central_difference(const F& f, double x, double h) {
  return (f(x + h) - f(x - h)) / (2 * h);
}

// Error of a central difference with step h: rounding of f over h plus h^2 of its third derivative.
void check_derivative(double found, double expected) {
  CHECK(std::abs(found - expected) <= 1e-6 * std::max(1.0, std::abs(expected)));
}

}  // namespace

TEST_CASE("sigmoid is finite and right at both ends") {
  CHECK(sigmoid(0.0) == 0.5);
  for (const double x : {-700.0, -30.0, -1.0, 0.3, 5.0, 40.0}) {
    CHECK(sigmoid(x) == doctest::Approx(1 / (1 + std::exp(-x))).epsilon(1e-15));
    CHECK(sigmoid(x) + sigmoid(-x) == doctest::Approx(1).epsilon(1e-15));
  }
  CHECK(sigmoid(-1e6) == 0.0);
  CHECK(sigmoid(1e6) == 1.0);
  CHECK(sigmoid(-200.0F) >= 0.0F);  // e^200 overflows fp32; the split never takes it
  CHECK(sigmoid(200.0F) == 1.0F);
}

TEST_CASE("hard mining has the values of the paper's formula") {
  // Loss, HM / L by Equation 2, dHM/dL by Equation 2 and by Algorithm 1, worked out beforehand and
  // rounded; each with the unit of its last digit, half of which is the tolerance.
  struct Row {
    double loss, ratio, ratio_digit, equation, equation_digit, algorithm, algorithm_digit;
  };
  for (const Row& row : {Row{0.10, 2.8e-10, 1e-11, 1.4e-9, 1e-10, 1.5e-9, 1e-10},
                         Row{0.30, 6.2e-7, 1e-8, 7.8e-6, 1e-7, 8.6e-6, 1e-7},
                         Row{0.50, 1.4e-3, 1e-4, 0.028, 1e-3, 0.030, 1e-3},
                         Row{0.60, 0.062, 1e-3, 1.43, 1e-2, 1.57, 1e-2},
                         Row{0.65, 0.341, 1e-3, 6.93, 1e-2, 7.62, 1e-2},
                         Row{0.75, 1.40, 1e-2, 4.13, 1e-2, 4.54, 1e-2},
                         Row{0.80, 1.48, 1e-2, 1.96, 1e-2, 2.16, 1e-2}}) {
    CAPTURE(row.loss);
    CHECK(std::abs(weighting_ratio(row.loss, hard_mining()) - row.ratio) <= 0.5 * row.ratio_digit);
    CHECK(std::abs(weight_loss(row.loss, hard_mining()).gradient_weight - row.equation) <=
          0.5 * row.equation_digit);
    CHECK(std::abs(weight_loss(row.loss, hard_mining(HardMiningForm::algorithm)).gradient_weight -
                   row.algorithm) <= 0.5 * row.algorithm_digit);
  }
  // The largest weights, near L = 0.6858, and the limits for hard rows.
  CHECK(weight_loss(0.6858, hard_mining()).gradient_weight ==
        doctest::Approx(10.65).epsilon(0.001));
  CHECK(weight_loss(0.6858, hard_mining(HardMiningForm::algorithm)).gradient_weight ==
        doctest::Approx(11.72).epsilon(0.001));
  CHECK(weight_loss(5.0, hard_mining()).gradient_weight == doctest::Approx(1.5).epsilon(1e-12));
  CHECK(weight_loss(5.0, hard_mining(HardMiningForm::algorithm)).gradient_weight ==
        doctest::Approx(1.65).epsilon(1e-12));
}

TEST_CASE("hard mining's derivative is that of its value") {
  for (const HardMiningForm form : {HardMiningForm::equation, HardMiningForm::algorithm}) {
    const Weighting weighting = hard_mining(form);
    for (double loss = 0.02; loss<3; loss += loss> 0.5 && loss < 0.9 ? 0.005 : 0.03) {
      CAPTURE(loss);
      // The third derivative reaches 1e5 inside the gate: h = 1e-6 keeps h^2 of it below 1e-6.
      check_derivative(
          weight_loss(loss, weighting).gradient_weight,
          central_difference([&](double l) { return weight_loss(l, weighting).weighted; }, loss,
                             1e-6));
    }
  }
}

TEST_CASE("hard mining stays finite where a plain exponential would not") {
  for (const float loss : {0.0F, 1e-30F, 0.97F, 2.99F, 100.0F, 1e6F}) {
    const WeightedLoss<float> row = weight_loss(loss, hard_mining());
    CHECK(std::isfinite(row.weighted));
    CHECK(std::isfinite(row.gradient_weight));
    CHECK(row.gradient_weight >= 0);
  }
}

namespace {

Weighting knot_magnify(double gamma) {
  Weighting weighting;
  weighting.kind = WeightingKind::knot_magnify;
  weighting.gamma = gamma;
  return weighting;
}

}  // namespace

TEST_CASE("Knot Magnify has the values of the poster's formula") {
  for (const double gamma : {0.0, 0.1, 1.0, 2.0, 8.0, 1e6}) {
    for (const double loss : {0.0, 1e-300, 1e-9, 0.3, 1.4, 1.7, 2.2, 5.0, 40.0, 700.0, 1e300}) {
      CAPTURE(gamma);
      CAPTURE(loss);
      const double d = gamma * std::exp(-loss) + 1;
      const WeightedLoss<double> row = weight_loss(loss, knot_magnify(gamma));
      CHECK(row.weighted == doctest::Approx(loss / (d * d)).epsilon(1e-14));
      CHECK(row.gradient_weight ==
            doctest::Approx(1 / (d * d) + 2 * gamma * std::exp(-loss) * loss / (d * d * d))
                .epsilon(1e-14));
      CHECK(weighting_ratio(loss, knot_magnify(gamma)) ==
            doctest::Approx(1 / (d * d)).epsilon(1e-14));
      // In float: finite for every gamma that is taken, and as near as its numbers.
      if (loss > 1e30) continue;
      const WeightedLoss<float> single = weight_loss(static_cast<float>(loss), knot_magnify(gamma));
      CHECK(single.weighted == doctest::Approx(row.weighted).epsilon(1e-5));
      CHECK(single.gradient_weight == doctest::Approx(row.gradient_weight).epsilon(1e-5));
    }
  }
  // Nothing is weighted where gamma p is nothing.
  CHECK(weight_loss(1e6F, knot_magnify(8)).gradient_weight == 1);
  CHECK(weight_loss(0.0, knot_magnify(1)).gradient_weight == 0.25);
}

TEST_CASE("Knot Magnify's derivative is that of its value") {
  for (const double gamma : {0.1, 1.0, 2.0, 4.0, 8.0, 100.0}) {
    for (double loss = 0.01; loss < 8; loss += 0.03) {
      CAPTURE(gamma);
      CAPTURE(loss);
      check_derivative(
          weight_loss(loss, knot_magnify(gamma)).gradient_weight,
          central_difference([&](double l) { return weight_loss(l, knot_magnify(gamma)).weighted; },
                             loss, 1e-5));
    }
  }
}

TEST_CASE("hinges over parts of the classes, and the loss they come to") {
  // d_j = 2 - 2 cos_j, straight from the definition.
  const EuclideanMargin law{0.3, 0.7};
  const std::vector<double> cosines = {0.9, 0.2, -0.4, 0.5, 0.76, 0.74, 1.0};
  for (size_t y = 0; y < cosines.size(); ++y) {
    CAPTURE(y);
    const auto loss_at = [&](const std::vector<double>& c) {
      const auto distance = [&](size_t j) { return 2 - 2 * c[j]; };
      double sum = 0;
      int active = 0;
      for (size_t j = 0; j < c.size(); ++j) {
        const double hinge = law.margin + distance(y) - distance(j);
        if (j == y || hinge <= 0) continue;
        sum += hinge;
        ++active;
      }
      return sum / std::max(1, active) + law.pull * distance(y);
    };
    const double threshold = 2 * cosines[y] - law.margin;
    HingeSum<double> whole, left, right;
    for (size_t j = 0; j < cosines.size(); ++j) {
      if (j == y) continue;
      add_hinge(whole, 2 * cosines[j], threshold);
      add_hinge(j < 3 ? left : right, 2 * cosines[j], threshold);
    }
    const HingeSum<double> merged = merge(left, right);
    CHECK(merged.sum == doctest::Approx(whole.sum).epsilon(1e-15));
    CHECK(merged.max == whole.max);
    CHECK(merged.active == whole.active);
    const EuclideanLoss<double> row = euclidean_loss(2 * cosines[y], merged, law);
    CHECK(row.loss == doctest::Approx(loss_at(cosines)).epsilon(1e-14));
    for (size_t j = 0; j < cosines.size(); ++j) {
      const auto moved = [&](double c) {
        std::vector<double> changed = cosines;
        changed[j] = c;
        return loss_at(changed);
      };
      const bool active = 2 * cosines[j] - threshold > 0;
      const double by_logit = j == y ? row.unit * row.target : active ? row.unit : 0;
      // Piecewise linear, and no hinge here is within 0.01 of 0.
      CHECK(2 * by_logit ==
            doctest::Approx(central_difference(moved, cosines[j], 1e-4)).epsilon(1e-9));
    }
  }
}

TEST_CASE("hinges at the ends: exactly 0, none, rounded above 1, not a number") {
  const EuclideanMargin law{2, 0.5};
  HingeSum<float> sums;
  add_hinge(sums, 0.0F, 2.0F - 2.0F);  // cos_y = 1 and cos_j = 0 at a margin of 2
  CHECK(sums.active == 0);
  CHECK(sums.sum == 0);
  CHECK(sums.max == 0);
  EuclideanLoss<float> row = euclidean_loss(2.0F, sums, law);
  CHECK(row.loss == 0);
  CHECK(row.unit == 1);
  CHECK(row.target == -0.5F);
  CHECK(euclidean_loss(2.0F + 1e-6F, sums, law).loss == 0);
  CHECK(merge(HingeSum<float>{}, HingeSum<float>{}).active == 0);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(euclidean_loss(nan, sums, law).loss));
  add_hinge(sums, nan, 0.0F);
  CHECK(std::isnan(euclidean_loss(2.0F, sums, law).loss));
}

TEST_CASE("both reductions over a batch") {
  const std::vector<double> losses = {0.1, 0.6, 0.69, 0.8, 3.0};
  std::vector<double> weighted(5), factor(5);
  Weighting weighting = hard_mining();
  weight_losses(losses, weighting, weighted, factor);
  for (size_t i = 0; i < losses.size(); ++i) {
    const double g = 1 / (1 + std::exp(-35 * (1.1 * losses[i] - 0.75)));
    CHECK(weighted[i] == doctest::Approx(1.5 * losses[i] * g).epsilon(1e-12));
  }
  weighting.reduction = Reduction::batch;
  const double mean = (0.1 + 0.6 + 0.69 + 0.8 + 3.0) / 5;
  const double gate = 1 / (1 + std::exp(-35 * (1.1 * mean - 0.75)));
  weight_losses(losses, weighting, weighted, factor);
  double mean_weighted = 0;
  for (size_t i = 0; i < losses.size(); ++i) {
    CHECK(weighted[i] == doctest::Approx(losses[i] * 1.5 * gate).epsilon(1e-12));
    CHECK(factor[i] == factor[0]);
    mean_weighted += weighted[i] / 5;
  }
  CHECK(mean_weighted == doctest::Approx(1.5 * mean * gate).epsilon(1e-12));
  check_derivative(
      factor[0],
      central_difference([&](double m) { return 1.5 * m / (1 + std::exp(-35 * (1.1 * m - 0.75))); },
                         mean, 1e-6));
  // A batch without any loss: no division by the mean.
  const std::vector<double> zeros(3);
  std::vector<double> w(3), f(3);
  weight_losses(zeros, weighting, w, f);
  CHECK(w[0] == 0);
  CHECK(std::isfinite(f[0]));
  weighting.kind = WeightingKind::none;
  weight_losses(losses, weighting, weighted, factor);
  CHECK(weighted == losses);
  CHECK(factor == std::vector<double>(5, 1.0));
}

TEST_CASE("the margin's value is the printed formula before pi") {
  for (double theta = 0.001; theta < 2.6; theta += 0.05) {
    const double c = std::cos(theta);
    MarginLaw law;
    law.m2 = 0.5;
    CHECK(margin_target(c, law).value == doctest::Approx(std::cos(theta + 0.5)).epsilon(1e-12));
    law.m2 = 0;
    law.m3 = 0.35;
    CHECK(margin_target(c, law).value == c - 0.35);
    CHECK(margin_target(c, law).derivative == 1);
  }
  MarginLaw combined;
  combined.m1 = 0.9;
  combined.m2 = 0.3;
  combined.m3 = 0.2;
  combined.lambda = 4;
  const double psi = std::cos(0.9 * 1.1 + 0.3) - 0.2;
  CHECK(margin_target(std::cos(1.1), combined).value ==
        doctest::Approx((4 * std::cos(1.1) + psi) / 5).epsilon(1e-12));
}

TEST_CASE("A-Softmax's psi for m = 4 is (-1)^k cos(4 theta) - 2k, falling and continuous") {
  MarginLaw law;
  law.m1 = 4;
  law.norm_scale = true;
  double before = 2;
  for (int step = 0; step <= 2000; ++step) {
    const double theta = kPi * step / 2000;
    const int k = std::min(3, static_cast<int>(theta / (kPi / 4)));
    const double psi = (k % 2 == 0 ? 1 : -1) * std::cos(4 * theta) - 2 * k;
    const double found = margin_target(std::cos(theta), law).value;
    // acos(cos theta) loses 1e-8 of theta at the ends, where psi changes by 4 sin(4 theta).
    CHECK(std::abs(found - psi) < 1e-6);
    CHECK(found <= before + 1e-9);
    before = found;
  }
  CHECK(margin_target(-1.0, law).value == doctest::Approx(-7));
}

TEST_CASE("beyond pi: mirror is continuous and falls, none turns back up") {
  MarginLaw law;
  law.m2 = 0.5;
  const double edge = kPi - 0.5;
  CHECK(margin_target(std::cos(edge - 1e-7), law).value ==
        doctest::Approx(margin_target(std::cos(edge + 1e-7), law).value).epsilon(1e-9));
  CHECK(margin_target(std::cos(edge + 0.2), law).value ==
        doctest::Approx(-2 - std::cos(kPi + 0.2)).epsilon(1e-12));
  CHECK(margin_target(std::cos(edge + 0.2), law).derivative > 0);
  law.mirror = false;
  CHECK(margin_target(std::cos(edge + 0.2), law).value ==
        doctest::Approx(std::cos(kPi + 0.2)).epsilon(1e-12));
  CHECK(margin_target(std::cos(edge + 0.2), law).derivative < 0);
}

TEST_CASE("the margin's derivative is that of its value") {
  struct Case {
    double m1, m2, m3, lambda;
    bool mirror;
  };
  for (const Case& c : {Case{1, 0.5, 0, 0, true}, Case{1, 0.5, 0, 0, false}, Case{4, 0, 0, 0, true},
                        Case{4, 0, 0, 5, true}, Case{1, 0.3, 0.2, 0, true},
                        Case{1.7, 0.1, 0.05, 0.5, true}, Case{0.9, 0.4, 0.15, 0, true}}) {
    MarginLaw law;
    law.m1 = c.m1, law.m2 = c.m2, law.m3 = c.m3, law.lambda = c.lambda, law.mirror = c.mirror;
    for (double cosine = -0.995; cosine < 0.995; cosine += 0.00731) {
      CAPTURE(c.m1);
      CAPTURE(c.m2);
      CAPTURE(cosine);
      // h = 1e-6: rounding leaves 1e-10, the third derivative (at most 1e4 here) 1e-8.
      check_derivative(
          margin_target(cosine, law).derivative,
          central_difference([&](double x) { return margin_target(x, law).value; }, cosine, 1e-6));
    }
    law.detached = true;
    CHECK(margin_target(0.3, law).derivative == 1);
  }
}

TEST_CASE("at |cos| = 1 the value is exact and the derivative finite and bounded") {
  MarginLaw law;
  law.m2 = 0.5;
  for (const double cosine : {1.0, -1.0, 1 - 1e-12, -1 + 1e-12, 1 + 3e-8, -1 - 3e-8}) {
    const MarginValue<double> psi = margin_target(cosine, law);
    // sin(theta + m) / sin(theta) at cos = 1 - 1e-7, where sin(theta) = 4.47e-4.
    CHECK(std::abs(psi.derivative) < 0.4794 / 4.47e-4 * 1.01);
    CHECK(std::isfinite(psi.value));
    const MarginValue<float> single = margin_target(static_cast<float>(cosine), law);
    CHECK(std::isfinite(single.value));
    CHECK(std::abs(single.derivative) < 2000);
  }
  CHECK(margin_target(1.0, law).value == doctest::Approx(std::cos(0.5)).epsilon(1e-15));
}

TEST_CASE("warm-up of the margin goes from none to all of it") {
  MarginLaw law;
  law.m1 = 4, law.m2 = 0.5, law.m3 = 0.2;
  CHECK(margin_target(0.3, warmed_up(law, 0)).value == doctest::Approx(0.3).epsilon(1e-15));
  const MarginLaw half = warmed_up(law, 0.5);
  CHECK(half.m1 == 2.5);
  CHECK(half.m2 == 0.25);
  CHECK(half.m3 == 0.1);
  CHECK(warmed_up(law, 1).m1 == 4);
  CHECK(warmed_up(EuclideanMargin{0.4, 0.5}, 0.25).margin == 0.1);
  CHECK(warmed_up(EuclideanMargin{0.4, 0.5}, 0.25).pull == 0.5);
}

TEST_CASE("softmax parts merge to the whole") {
  const std::vector<double> logits = {-64, 3, 12.5, 64, -1000, 63.9, 0};
  SoftmaxSum<double> whole, left, right;
  for (size_t i = 0; i < logits.size(); ++i) {
    whole = merge(whole, {logits[i], 1});
    (i < 3 ? left : right) = merge(i < 3 ? left : right, {logits[i], 1});
  }
  double sum = 0;
  for (const double z : logits) sum += std::exp(z - 64);
  CHECK(whole.max == 64);
  CHECK(whole.sum == doctest::Approx(sum).epsilon(1e-14));
  const SoftmaxSum<double> merged = merge(left, right);
  CHECK(merged.max == whole.max);
  CHECK(merged.sum == doctest::Approx(whole.sum).epsilon(1e-14));
  const SoftmaxSum<double> nothing = merge(SoftmaxSum<double>{}, SoftmaxSum<double>{});
  CHECK(nothing.sum == 0);
}

TEST_CASE("the row's loss is exact from tiny to huge") {
  const SoftmaxSum<double> others{0, 1};  // one other class with logit 0
  for (const double target : {-3000.0, -30.0, -1.0, 0.0, 2.0, 30.0, 60.0}) {
    const TargetLoss<double> row = target_loss(target, others);
    const double expected =
        target < 0 ? -target + std::log1p(std::exp(target)) : std::log1p(std::exp(-target));
    CHECK(row.loss == doctest::Approx(expected).epsilon(1e-14));
    CHECK(row.derivative == doctest::Approx(-1 / (1 + std::exp(target))).epsilon(1e-14));
  }
  CHECK(target_loss(60.0, others).loss > 0);  // 8.8e-27: not lost beside 1
  CHECK(target_loss(5.0, SoftmaxSum<double>{}).loss == 0);
}

TEST_CASE("gate classes") {
  CHECK(gate_of(0.0999) == Gate::silenced);
  CHECK(gate_of(0.1) == Gate::kept);
  CHECK(gate_of(1.0) == Gate::kept);
  CHECK(gate_of(1.0001) == Gate::amplified);
}
