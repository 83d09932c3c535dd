// The CPU margin head, fused and unfused, against a float64 reference written here from the
// formulas alone (full Jacobians, no code shared with the head).
#include "cpu/head.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/random.h"
#include "cpu/head_loops.h"

using namespace hardmine;

namespace {

constexpr double kPi = std::numbers::pi;

struct Problem {
  int64_t rows, dim, classes;
  std::vector<float> x, w, bias;  // bias empty unless softmax
  std::vector<int32_t> labels;
};

struct Reference {
  std::vector<double> base, weighted, factor, grad_x, grad_w, grad_bias;
  std::vector<double> plain;  // [rows, classes] logits before the margin
  double loss = 0;
};

struct Psi {
  double value, slope;
};

// The contract's law, straight from its words.
Psi reference_psi(double cosine, const MarginLaw& law) {
  const auto value_at = [&](double theta) {
    const double phi = law.m1 * theta + law.m2;
    const double k = law.mirror ? std::floor(phi / kPi) : 0;
    return std::pow(-1, k) * std::cos(phi) - 2 * k - law.m3;
  };
  const auto slope_at = [&](double theta) {
    const double phi = law.m1 * theta + law.m2;
    const double k = law.mirror ? std::floor(phi / kPi) : 0;
    return std::pow(-1, k) * law.m1 * std::sin(phi) / std::sin(theta);
  };
  double psi = value_at(std::acos(std::clamp(cosine, -1.0, 1.0)));
  double slope = law.detached ? 1 : slope_at(std::acos(std::clamp(cosine, -1 + 1e-7, 1 - 1e-7)));
  psi = (law.lambda * cosine + psi) / (1 + law.lambda);
  slope = (law.lambda + slope) / (1 + law.lambda);
  return {psi, slope};
}

double reference_gate(double loss, const Weighting& w) {
  return 1 / (1 + std::exp(-w.A * (w.beta * loss - w.B)));
}
double reference_weighted(double loss, const Weighting& w) {
  if (w.kind == WeightingKind::none) return loss;
  if (w.kind == WeightingKind::knot_magnify)
    return loss / std::pow(w.gamma * std::exp(-loss) + 1, 2);
  const double x = w.form == HardMiningForm::equation ? loss : w.beta * loss;
  return w.alpha * x * reference_gate(loss, w);
}
double reference_factor(double loss, const Weighting& w) {
  if (w.kind == WeightingKind::none) return 1;
  if (w.kind == WeightingKind::knot_magnify) {
    const double p = std::exp(-loss);
    return std::pow(w.gamma * p + 1, -2) + 2 * w.gamma * p * loss * std::pow(w.gamma * p + 1, -3);
  }
  const double g = reference_gate(loss, w);
  const double c = w.form == HardMiningForm::equation ? w.alpha : w.alpha * w.beta;
  return c * (g + w.beta * w.A * loss * g * (1 - g));
}

// margin + d_y - d_j of a class, from its cosine and the target's.
double reference_hinge(double target, double cosine, const EuclideanMargin& law) {
  const double own = 2 - 2 * target, other = 2 - 2 * cosine;
  return law.margin + own - other;
}

Reference reference(const LossSpec& spec, const Problem& p) {
  Reference r;
  const bool euclidean = spec.base == BaseKind::euclidean_margin;
  const bool softmax = spec.base == BaseKind::softmax;
  const MarginLaw& law = spec.margin;
  const int64_t n = p.rows, d = p.dim, c = p.classes;
  std::vector<double> x(p.x.begin(), p.x.end()), w(p.w.begin(), p.w.end());
  std::vector<double> x_norm(n, 1), w_norm(c, 1), dots(n * c);
  const auto norm = [&](const double* v) {
    double s = 0;
    for (int64_t k = 0; k < d; ++k) s += v[k] * v[k];
    return std::max(std::sqrt(s), 1e-12);
  };
  for (int64_t i = 0; i < n; ++i) x_norm[i] = norm(&x[i * d]);
  for (int64_t j = 0; j < c; ++j) w_norm[j] = norm(&w[j * d]);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < c; ++j) {
      double s = 0;
      for (int64_t k = 0; k < d; ++k) s += x[i * d + k] * w[j * d + k];
      dots[i * c + j] = s;
    }
  }
  r.base.resize(n), r.weighted.resize(n), r.factor.resize(n), r.plain.resize(n * c);
  r.grad_x.assign(n * d, 0), r.grad_w.assign(c * d, 0), r.grad_bias.assign(softmax ? c : 0, 0);
  std::vector<double> dz(n * c);  // dL_i / dz_ij, unweighted
  std::vector<Psi> psi(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = p.labels[i];
    const double s = softmax || euclidean ? 1 : law.norm_scale ? x_norm[i] : law.scale;
    std::vector<double> z(c);
    for (int64_t j = 0; j < c; ++j) {
      z[j] = softmax ? dots[i * c + j] + double{p.bias[j]}
                     : s * dots[i * c + j] / (x_norm[i] * w_norm[j]);
      r.plain[i * c + j] = z[j];
    }
    if (euclidean) {  // dz is by the cosine then
      int active = 0;
      for (int64_t j = 0; j < c; ++j) {
        const double hinge = reference_hinge(z[y], z[j], spec.euclidean);
        if (j == y || hinge <= 0) continue;
        r.base[i] += hinge;
        ++active;
      }
      r.base[i] = r.base[i] / std::max(1, active) + spec.euclidean.pull * (2 - 2 * z[y]);
      dz[i * c + y] = -2 * spec.euclidean.pull - (active > 0 ? 2 : 0);
      for (int64_t j = 0; j < c; ++j) {
        if (j != y && reference_hinge(z[y], z[j], spec.euclidean) > 0) dz[i * c + j] = 2.0 / active;
      }
      continue;
    }
    if (!softmax) {
      psi[i] = reference_psi(dots[i * c + y] / (x_norm[i] * w_norm[y]), law);
      z[y] = s * psi[i].value;
    }
    // L = ln sum_j e^(z_j - z_y), with the 1 of the target apart so that small losses keep digits.
    double top = 0;
    for (int64_t j = 0; j < c; ++j) top = std::max(top, z[j] - z[y]);
    double others = 0;
    for (int64_t j = 0; j < c; ++j) {
      if (j != y) others += std::exp(z[j] - z[y] - top);
    }
    r.base[i] = top == 0 ? std::log1p(others) : top + std::log(others + std::exp(-top));
    const double total = others + std::exp(-top);
    for (int64_t j = 0; j < c; ++j) {
      dz[i * c + j] = j == y ? -others / total : std::exp(z[j] - z[y] - top) / total;
    }
  }
  if (spec.weighting.reduction == Reduction::batch && spec.weighting.kind != WeightingKind::none) {
    double mean = 0;
    for (const double l : r.base) mean += l / static_cast<double>(n);
    for (int64_t i = 0; i < n; ++i) {
      r.weighted[i] = r.base[i] * reference_weighted(mean, spec.weighting) / mean;
      r.factor[i] = reference_factor(mean, spec.weighting);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      r.weighted[i] = reference_weighted(r.base[i], spec.weighting);
      r.factor[i] = reference_factor(r.base[i], spec.weighting);
    }
  }
  for (const double l : r.weighted) r.loss += l / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = p.labels[i];
    const double s = softmax || euclidean ? 1 : law.norm_scale ? x_norm[i] : law.scale;
    for (int64_t j = 0; j < c; ++j) {
      const double g = r.factor[i] / static_cast<double>(n) * dz[i * c + j];
      double* gx = &r.grad_x[i * d];
      double* gw = &r.grad_w[j * d];
      if (softmax) {
        r.grad_bias[j] += g;
        for (int64_t k = 0; k < d; ++k) {
          gx[k] += g * w[j * d + k];
          gw[k] += g * x[i * d + k];
        }
        continue;
      }
      const double cosine = dots[i * c + j] / (x_norm[i] * w_norm[j]);
      const double t = j == y ? psi[i].value : cosine;
      const double slope = s * (j == y && !euclidean ? psi[i].slope : 1);
      for (int64_t k = 0; k < d; ++k) {
        const double xk = x[i * d + k], wk = w[j * d + k];
        gx[k] += g * slope * (wk / (x_norm[i] * w_norm[j]) - cosine * xk / (x_norm[i] * x_norm[i]));
        gw[k] += g * slope * (xk / (x_norm[i] * w_norm[j]) - cosine * wk / (w_norm[j] * w_norm[j]));
        if (law.norm_scale) gx[k] += g * t * xk / x_norm[i];  // d ||x|| / dx
      }
    }
  }
  return r;
}

// ---- Problems ----

LossSpec loss_of(const std::string& base) {
  LossSpec spec;
  if (base == "softmax") spec.base = BaseKind::softmax;
  if (base == "euclidean") spec.base = BaseKind::euclidean_margin;
  if (base == "arcface") spec.margin.m2 = 0.5;
  if (base == "cosface") spec.margin.m3 = 0.35;
  if (base == "combined") spec.margin.m1 = 0.9, spec.margin.m2 = 0.4, spec.margin.m3 = 0.15;
  if (base == "a-softmax" || base == "a-softmax-annealed") {
    spec.margin.m1 = 4;
    spec.margin.norm_scale = true;
    if (base == "a-softmax-annealed") spec.margin.lambda = 5;
  }
  return spec;
}

const std::vector<std::string> kBases = {
    "softmax", "arcface", "cosface", "combined", "a-softmax", "a-softmax-annealed", "euclidean"};

bool is_angular(const LossSpec& spec) {
  return spec.base == BaseKind::margin;
}

double mean_length(const LossSpec& spec) {
  if (spec.base == BaseKind::softmax) return 20;
  return spec.margin.norm_scale ? 40 : 3;
}

// Random weights and labels; x_i = length ((1 - t) away_i + t w_hat_y) with `away` pointing away
// from the class and t found by bisection so that row i's base loss is target(i).
Problem make_problem(const LossSpec& spec, int64_t rows, int64_t dim, int64_t classes,
                     const std::function<double(int64_t)>& target, uint64_t seed = 1) {
  Problem p{rows, dim, classes, {}, {}, {}, {}};
  const double length = mean_length(spec);
  p.w.resize(classes * dim), p.x.resize(rows * dim), p.labels.resize(rows);
  for (int64_t k = 0; k < classes * dim; ++k) {
    p.w[k] =
        static_cast<float>(random_normal(seed, 1, k) * (0.5 + 0.001 * static_cast<double>(k % 7)));
  }
  if (spec.base == BaseKind::softmax) {
    for (int64_t j = 0; j < classes; ++j) {
      p.bias.push_back(static_cast<float>(0.3 * random_normal(seed, 2, j)));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    // Every fifth row shares its label with the one before: duplicates.
    p.labels[i] = i % 5 == 4 ? p.labels[i - 1]
                             : static_cast<int32_t>(random_below(random_bits(seed, 3, i), classes));
    const int64_t y = p.labels[i];
    std::vector<double> away(dim), toward(dim);
    double w_norm = 0, away_norm = 0;
    for (int64_t k = 0; k < dim; ++k) w_norm += double{p.w[y * dim + k]} * p.w[y * dim + k];
    w_norm = std::sqrt(w_norm);
    for (int64_t k = 0; k < dim; ++k) {
      toward[k] = p.w[y * dim + k] / w_norm;
      away[k] =
          random_normal(seed, 4, i * dim + k) / std::sqrt(static_cast<double>(dim)) - toward[k];
    }
    for (const double a : away) away_norm += a * a;
    for (double& a : away) a /= std::sqrt(away_norm);
    // Logits are linear in t before normalisation: dots with both ends once, then bisection is
    // cheap.
    std::vector<double> from(classes), to(classes);
    double mixed = 0;
    for (int64_t j = 0; j < classes; ++j) {
      for (int64_t k = 0; k < dim; ++k) {
        from[j] += away[k] * p.w[j * dim + k];
        to[j] += toward[k] * p.w[j * dim + k];
      }
    }
    for (int64_t k = 0; k < dim; ++k) mixed += away[k] * toward[k];
    std::vector<double> norms(classes);
    for (int64_t j = 0; j < classes; ++j) {
      for (int64_t k = 0; k < dim; ++k) norms[j] += double{p.w[j * dim + k]} * p.w[j * dim + k];
      norms[j] = std::sqrt(norms[j]);
    }
    const auto hinge_at = [&](double t, int64_t j) {
      const double x_norm = std::sqrt((1 - t) * (1 - t) + t * t + 2 * t * (1 - t) * mixed);
      const auto cosine = [&](int64_t of) {
        return ((1 - t) * from[of] + t * to[of]) / (x_norm * norms[of]);
      };
      return std::pair(reference_hinge(cosine(y), cosine(j), spec.euclidean), 2 - 2 * cosine(y));
    };
    const auto loss_at = [&](double t) {
      if (spec.base == BaseKind::euclidean_margin) {
        double sum = 0;
        int active = 0;
        for (int64_t j = 0; j < classes; ++j) {
          const double hinge = j == y ? 0 : hinge_at(t, j).first;
          sum += std::max(0.0, hinge);
          active += hinge > 0 ? 1 : 0;
        }
        return sum / std::max(1, active) + spec.euclidean.pull * hinge_at(t, y).second;
      }
      const double x_norm = std::sqrt((1 - t) * (1 - t) + t * t + 2 * t * (1 - t) * mixed);
      double own = 0, sum = 0;
      const auto logit = [&](int64_t j) {
        const double dot = length * ((1 - t) * from[j] + t * to[j]);
        if (spec.base == BaseKind::softmax) return dot + double{p.bias[j]};
        const double cosine = dot / (length * x_norm * norms[j]);
        const double s = spec.margin.norm_scale ? length * x_norm : spec.margin.scale;
        return s * (j == y ? reference_psi(cosine, spec.margin).value : cosine);
      };
      own = logit(y);
      for (int64_t j = 0; j < classes; ++j) {
        if (j != y) sum += std::exp(std::min(700.0, logit(j) - own));
      }
      return std::log1p(sum);
    };
    double low = 0, high = 1;  // loss falls from low to high
    for (int step = 0; step < 60; ++step) {
      const double middle = (low + high) / 2;
      (loss_at(middle) > target(i) ? low : high) = middle;
    }
    // The Euclidean margin loss jumps where a hinge is 0, which fp32 may see on its other side:
    // rows keep clear of it by some fifty roundings of a cosine.
    constexpr double kClear = 5e-6;
    const auto touches = [&] {
      for (int64_t j = 0; j < classes; ++j)
        if (j != y && std::abs(hinge_at(high, j).first) < kClear) return true;
      return false;
    };
    while (spec.base == BaseKind::euclidean_margin && touches()) high += kClear;
    for (int64_t k = 0; k < dim; ++k) {
      p.x[i * dim + k] = static_cast<float>(length * ((1 - high) * away[k] + high * toward[k]));
    }
  }
  return p;
}

// Three of four rows inside the gate, the others easy or hard.
double gate_target(int64_t i) {
  if (i % 8 == 3) return 1e-4;
  if (i % 8 == 7) return 3;
  return 0.55 + 0.3 * random_uniform(9, 9, i);
}

struct Result {
  std::vector<float> base, weighted, grad_x, grad_w, grad_bias;
  double loss = 0;
};

std::unique_ptr<CpuMarginHead> make_head(const LossSpec& spec, const Problem& p,
                                         Implementation implementation,
                                         Precision precision = Precision::fp32, int threads = 2) {
  Execution execution;
  execution.precision = precision;
  execution.threads = threads;
  auto head = make_cpu_head({p.classes, p.dim, spec, implementation}, execution);
  head->set_weights(p.w, p.bias);
  return head;
}

Result forward_backward(MarginHead& head, const Problem& p) {
  Result r;
  r.base.resize(p.rows), r.weighted.resize(p.rows);
  r.grad_x.resize(p.x.size()), r.grad_w.resize(p.w.size()), r.grad_bias.resize(p.bias.size());
  HeadOutput output;
  output.base_loss = r.base;
  output.weighted_loss = r.weighted;
  output.grad_embeddings = r.grad_x;
  output.grad_weights = r.grad_w;
  output.grad_bias = r.grad_bias;
  head.forward_backward({p.x, p.labels}, output);
  r.loss = output.loss;
  return r;
}

double relative_error(const std::vector<float>& found, const std::vector<double>& expected) {
  double difference = 0, size = 0;
  for (size_t k = 0; k < expected.size(); ++k) {
    difference += (found[k] - expected[k]) * (found[k] - expected[k]);
    size += expected[k] * expected[k];
  }
  return std::sqrt(difference) / std::max(std::sqrt(size), 1e-30);
}

bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

int64_t rows_in_gate(const Reference& r) {
  return std::count_if(r.base.begin(), r.base.end(), [](double l) { return l > 0.55 && l < 0.85; });
}

// The bounds of the specification: fp32 logits of size s = 64 carry about 64 * 2^-24 = 4e-6 each.
void check_parity(const LossSpec& spec, const Problem& p, Implementation implementation,
                  bool gradients = true) {
  const Reference expected = reference(spec, p);
  const auto head = make_head(spec, p, implementation);
  const Result found = forward_backward(*head, p);
  for (int64_t i = 0; i < p.rows; ++i) {
    CAPTURE(i);
    CHECK(std::abs(found.base[i] - expected.base[i]) <= 2e-5 * std::max(1.0, expected.base[i]));
  }
  // The weighting by the formula at the head's own losses.
  double mean = 0;
  for (const float l : found.base) mean += double{l} / static_cast<double>(p.rows);
  double loss = 0;
  std::vector<double> own_factor(p.rows);
  for (int64_t i = 0; i < p.rows; ++i) {
    const double own = found.base[i];
    const bool batch = spec.weighting.reduction == Reduction::batch &&
                       spec.weighting.kind == WeightingKind::hard_mining;
    const double weighted = batch ? own * reference_weighted(mean, spec.weighting) / mean
                                  : reference_weighted(own, spec.weighting);
    own_factor[i] = reference_factor(batch ? mean : own, spec.weighting);
    CAPTURE(own);
    CHECK(std::abs(found.weighted[i] - weighted) <= 1e-5 * std::max(1.0, weighted));
    loss += found.weighted[i] / static_cast<double>(p.rows);
  }
  CHECK(std::abs(found.loss - loss) <= 1e-6 * std::max(1.0, loss));
  CHECK(all_finite(found.grad_x));
  CHECK(all_finite(found.grad_w));
  if (!gradients) return;
  CHECK(relative_error(found.grad_x, expected.grad_x) < 1e-3);
  CHECK(relative_error(found.grad_w, expected.grad_w) < 1e-3);
  if (!p.bias.empty()) CHECK(relative_error(found.grad_bias, expected.grad_bias) < 1e-3);

  // The factor: what the weighting multiplies a row's gradient by, seen against the same head
  // without a weighting.
  if (spec.weighting.kind == WeightingKind::none) return;
  LossSpec plain_spec = spec;
  plain_spec.weighting.kind = WeightingKind::none;
  const Result plain = forward_backward(*make_head(plain_spec, p, implementation), p);
  for (int64_t i = 0; i < p.rows; ++i) {
    double with = 0, without = 0;
    for (int64_t k = 0; k < p.dim; ++k) {
      with += double{found.grad_x[i * p.dim + k]} * plain.grad_x[i * p.dim + k];
      without += double{plain.grad_x[i * p.dim + k]} * plain.grad_x[i * p.dim + k];
    }
    CAPTURE(own_factor[i]);
    if (without > 0)
      CHECK(std::abs(with / without - own_factor[i]) <= 1e-5 * std::max(1.0, own_factor[i]));
  }
}

constexpr Implementation kBoth[] = {Implementation::fused, Implementation::unfused};

std::string name_of(Implementation implementation) {
  return implementation == Implementation::fused ? "fused" : "unfused";
}

Weighting weighting_of(int kind) {
  Weighting weighting;
  if (kind == 0) return weighting;
  if (kind == 5) {
    weighting.kind = WeightingKind::knot_magnify;
    weighting.gamma = 2;
    return weighting;
  }
  weighting.kind = WeightingKind::hard_mining;
  weighting.form = kind % 2 == 1 ? HardMiningForm::equation : HardMiningForm::algorithm;
  weighting.reduction = kind <= 2 ? Reduction::sample : Reduction::batch;
  return weighting;
}

std::string error_code(const std::function<void()>& call, std::string* message = nullptr) {
  try {
    call();
  } catch (const Error& e) {
    if (message != nullptr) *message = e.what();
    return e.code();
  }
  return "";
}

}  // namespace

TEST_CASE("parity with the float64 reference: every base, form, reduction and gradient") {
  struct Shape {
    int64_t rows, dim, classes;
  };
  for (const Shape& shape : {Shape{1, 3, 2}, Shape{7, 33, 129}}) {
    for (const std::string& base : kBases) {
      for (int weighting = 0; weighting < 6; ++weighting) {
        for (const bool detached : {false, true}) {
          for (const bool mirror : {true, false}) {
            LossSpec spec = loss_of(base);
            if (!is_angular(spec) && (detached || !mirror)) continue;
            if (spec.margin.norm_scale && !mirror) continue;  // refused, see below
            spec.margin.detached = detached;
            spec.margin.mirror = mirror;
            spec.weighting = weighting_of(weighting);
            const Problem p = make_problem(spec, shape.rows, shape.dim, shape.classes, gate_target);
            CHECK(2 * rows_in_gate(reference(spec, p)) >= p.rows);
            for (const Implementation implementation : kBoth) {
              CAPTURE(name_of(implementation));
              CAPTURE(base);
              CAPTURE(weighting);
              CAPTURE(detached);
              CAPTURE(mirror);
              CAPTURE(shape.rows);
              check_parity(spec, p, implementation);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("parity at (64, 512, 1003)") {
  for (const std::string& base : kBases) {
    LossSpec spec = loss_of(base);
    spec.weighting = weighting_of(base == "cosface" ? 4 : base == "combined" ? 5 : 1);
    const Problem p = make_problem(spec, 64, 512, 1003, gate_target);
    CHECK(2 * rows_in_gate(reference(spec, p)) >= p.rows);
    for (const Implementation implementation : kBoth) {
      CAPTURE(name_of(implementation));
      CAPTURE(base);
      check_parity(spec, p, implementation);
    }
  }
}

TEST_CASE("parity over many tiles of classes, a ragged last one among them") {
  // 512 numbers a class: a few hundred classes fill a tile whatever the cache, so these are many.
  for (const std::string base : {"softmax", "arcface", "euclidean"}) {
    LossSpec spec = loss_of(base);
    spec.weighting = weighting_of(1);
    const Problem p = make_problem(spec, 17, 512, 4003, gate_target);
    for (const Implementation implementation : kBoth) {
      CAPTURE(name_of(implementation));
      CAPTURE(base);
      check_parity(spec, p, implementation);
    }
  }
}

TEST_CASE("Knot Magnify around its critical point, and Euclidean margins from none active to all") {
  // p_c is 0.11 to 0.24 for these gammas: losses of 1.4 to 2.2.
  const auto around = [](int64_t i) {
    return i % 4 == 3 ? 0.02 : 1.2 + 1.2 * random_uniform(9, 9, i);
  };
  for (const std::string& base : kBases) {
    for (const double gamma : {0.1, 2.0, 8.0}) {
      LossSpec spec = loss_of(base);
      spec.weighting = weighting_of(5);
      spec.weighting.gamma = gamma;
      const Problem p = make_problem(spec, 12, 33, 129, around);
      const Reference r = reference(spec, p);
      CHECK(2 * std::count_if(r.base.begin(), r.base.end(),
                              [](double l) { return l > 1.1 && l < 2.5; }) >=
            p.rows);
      for (const Implementation implementation : kBoth) {
        CAPTURE(name_of(implementation));
        CAPTURE(base);
        CAPTURE(gamma);
        check_parity(spec, p, implementation);
      }
    }
  }
  for (const double margin : {0.0, 0.05, 0.4, 1.2, 4.0}) {
    for (const double pull : {0.0, 0.5, 3.0}) {
      for (const int weighting : {0, 1, 5}) {
        LossSpec spec = loss_of("euclidean");
        spec.euclidean = {margin, pull};
        spec.weighting = weighting_of(weighting);
        const Problem p = make_problem(spec, 7, 33, 129, gate_target);
        for (const Implementation implementation : kBoth) {
          CAPTURE(name_of(implementation));
          CAPTURE(margin);
          CAPTURE(pull);
          check_parity(spec, p, implementation);
        }
      }
    }
  }
}

TEST_CASE("one class active, just, and none: the gradient is the hinge's and the pull's alone") {
  // Class weights along the axes: cosines are coordinates.
  LossSpec spec = loss_of("euclidean");
  const float edge = 0.5F - 0.2F;  // of cos_j at cos_y = 0.5 and a margin of 0.4
  for (const float off : {-1e-4F, 1e-4F}) {
    Problem p{1, 4, 3, {0.5F, edge + off, -0.3F, 0}, {}, {}, {0}};
    p.x[3] = std::sqrt(1 - 0.25F - (edge + off) * (edge + off) - 0.09F);
    for (int64_t k = 0; k < 12; ++k) p.w.push_back(k % 5 == 0 ? 3.0F : 0.0F);
    const double hinges = off > 0 ? 2 * double{off} : 0;
    for (const Implementation implementation : kBoth) {
      CAPTURE(name_of(implementation));
      check_parity(spec, p, implementation);
      const Result found = forward_backward(*make_head(spec, p, implementation), p);
      CHECK(found.loss == doctest::Approx(hinges + 0.5).epsilon(1e-6));
      // Of the inactive class nothing, to the last bit.
      for (int64_t k = 0; k < 4; ++k) {
        CHECK(found.grad_w[8 + k] == 0);
        if (off < 0) CHECK(found.grad_w[4 + k] == 0);
      }
    }
  }
}

TEST_CASE("the center loss beside every base: loss, gradient and movement") {
  for (const std::string& base : kBases) {
    LossSpec spec = loss_of(base);
    spec.weighting = weighting_of(base == "cosface" ? 5 : 1);
    spec.center = {0.2, 0.6};
    Problem p = make_problem(spec, 11, 33, 129, gate_target);
    for (const bool one_label : {false, true}) {
      if (one_label) std::fill(p.labels.begin(), p.labels.end(), 7);
      LossSpec plain = spec;
      plain.center.weight = 0;
      for (const Implementation implementation : kBoth) {
        for (const Precision precision : {Precision::fp32, Precision::bf16}) {
          CAPTURE(name_of(implementation));
          CAPTURE(base);
          const auto head = make_head(spec, p, implementation, precision);
          const auto without = make_head(plain, p, implementation, precision);
          std::vector<float> before(p.w.size()), after(p.w.size());
          StepSettings still;  // of the weights
          still.lr = 0;
          still.lambda = static_cast<float>(spec.margin.lambda);
          for (int step = 0; step < 3; ++step) {
            head->read_centers(before);
            if (step == 0) CHECK(before == std::vector<float>(p.w.size()));
            double loss = 0;
            std::vector<double> gradient(p.x.size());
            std::vector<double> centers(before.begin(), before.end());
            const Result base_found = forward_backward(*without, p);
            for (int64_t i = 0; i < p.rows; ++i) {
              const auto n =
                  static_cast<double>(std::count(p.labels.begin(), p.labels.end(), p.labels[i]));
              for (int64_t k = 0; k < p.dim; ++k) {
                const int64_t c = p.labels[i] * p.dim + k, at = i * p.dim + k;
                const double d = double{p.x[at]} - double{before[c]};
                loss += 0.2 / (2 * static_cast<double>(p.rows)) * d * d;
                gradient[at] =
                    0.2 / static_cast<double>(p.rows) * d + double{base_found.grad_x[at]};
                centers[c] += 0.6 * d / (1 + n);
              }
            }
            const Result found = forward_backward(*head, p);
            CHECK(found.loss == doctest::Approx(base_found.loss + loss).epsilon(1e-9));
            CHECK(found.base == base_found.base);
            CHECK(found.weighted == base_found.weighted);
            CHECK(found.grad_w == base_found.grad_w);
            CHECK(relative_error(found.grad_x, gradient) < 1e-6);
            head->read_centers(after);
            CHECK(after == before);
            std::vector<float> grad_x(p.x.size());
            const StepStats stats = head->step({p.x, p.labels}, still, grad_x);
            CHECK(stats.loss == doctest::Approx(found.loss).epsilon(1e-9));
            CHECK(grad_x == found.grad_x);
            head->read_centers(after);
            CHECK(relative_error(after, centers) < 1e-6);
          }
        }
      }
    }
  }
}

TEST_CASE("large biases") {
  LossSpec spec = loss_of("softmax");
  Problem p = make_problem(spec, 7, 33, 129, gate_target);  // 7 rows: the fused head pads them
  for (size_t j = 0; j < p.bias.size(); ++j) p.bias[j] += j % 2 == 0 ? 300.0F : -300.0F;
  p.bias[1] = 88.86F;  // e^88.86 = 2^128.2: beyond fp32, as a padded row's logit would be
  for (const Implementation implementation : kBoth) {
    CAPTURE(name_of(implementation));
    check_parity(spec, p, implementation);
  }
}

TEST_CASE("batches all easy and all hard") {
  for (const std::string& base : kBases) {
    for (const double target : {1e-6, 20.0}) {
      for (const int weighting : {0, 1}) {
        LossSpec spec = loss_of(base);
        spec.weighting = weighting_of(weighting);
        const Problem p = make_problem(spec, 7, 33, 129, [&](int64_t) { return target; });
        for (const Implementation implementation : kBoth) {
          CAPTURE(name_of(implementation));
          CAPTURE(base);
          CAPTURE(target);
          check_parity(spec, p, implementation);
        }
      }
    }
  }
}

TEST_CASE("angles around theta + m = pi, and |cos| near 1") {
  for (const std::string base : {"arcface", "combined", "a-softmax"}) {
    for (const bool mirror : {true, false}) {
      LossSpec spec = loss_of(base);
      if (spec.margin.norm_scale && !mirror) continue;
      spec.margin.mirror = mirror;
      const double edge = (kPi - spec.margin.m2) / spec.margin.m1;
      const std::vector<double> angles = {edge - 0.01, edge + 0.01, edge - 1e-4, edge + 1e-4,
                                          edge + 0.2,  0.3,         kPi - 0.05};
      Problem p = make_problem(spec, static_cast<int64_t>(angles.size()), 33, 129, gate_target);
      const auto place = [&](size_t row, double angle) {  // at `angle` from its class's weights
        const int64_t y = p.labels[row];
        std::vector<double> along(p.dim), across(p.dim);
        double norm = 0, dot = 0, across_norm = 0;
        for (int64_t k = 0; k < p.dim; ++k) norm += double{p.w[y * p.dim + k]} * p.w[y * p.dim + k];
        for (int64_t k = 0; k < p.dim; ++k) {
          along[k] = p.w[y * p.dim + k] / std::sqrt(norm);
          across[k] = random_normal(5, row, k);
          dot += along[k] * across[k];
        }
        for (int64_t k = 0; k < p.dim; ++k) {
          across[k] -= dot * along[k];
          across_norm += across[k] * across[k];
        }
        for (int64_t k = 0; k < p.dim; ++k) {
          p.x[row * p.dim + k] = static_cast<float>(
              mean_length(spec) *
              (std::cos(angle) * along[k] + std::sin(angle) * across[k] / std::sqrt(across_norm)));
        }
      };
      for (size_t i = 0; i < angles.size(); ++i) place(i, angles[i]);
      for (const Implementation implementation : kBoth) {
        CAPTURE(name_of(implementation));
        CAPTURE(base);
        CAPTURE(mirror);
        check_parity(spec, p, implementation);
      }
      // At the cusp itself the losses still agree; of the gradient only that it is finite and
      // bounded.
      const std::vector<double> cusps = {0, 1e-6, 1e-4, kPi, kPi - 1e-6, kPi - 1e-4, 0};
      for (size_t i = 0; i < cusps.size(); ++i) place(i, cusps[i]);
      for (const Implementation implementation : kBoth) {
        CAPTURE(name_of(implementation));
        check_parity(spec, p, implementation, false);
        const Result found = forward_backward(*make_head(spec, p, implementation), p);
        for (const float g : found.grad_x) {
          // |d psi / d cos| <= m1 / sin(theta) at cos = 1 - 1e-7, times s / ||x||, over 7 rows.
          CHECK(std::abs(g) < 4 / 4.47e-4 * 64);
        }
      }
    }
  }
}

TEST_CASE("an embedding of zeros gives finite results") {
  for (const std::string& base : kBases) {
    LossSpec spec = loss_of(base);
    spec.weighting = weighting_of(1);
    Problem p = make_problem(spec, 7, 33, 129, gate_target);
    std::fill_n(p.x.begin() + 2 * p.dim, p.dim, 0.0F);
    std::fill_n(p.w.begin() + 5 * p.dim, p.dim, 0.0F);  // and a class of zeros
    for (const Implementation implementation : kBoth) {
      CAPTURE(name_of(implementation));
      CAPTURE(base);
      const Result found = forward_backward(*make_head(spec, p, implementation), p);
      CHECK(std::isfinite(found.loss));
      CHECK(all_finite(found.base));
      CHECK(all_finite(found.grad_x));
      CHECK(all_finite(found.grad_w));
    }
  }
}

TEST_CASE("bf16 products stay near fp32") {
  for (const std::string& base : kBases) {
    LossSpec spec = loss_of(base);
    spec.weighting = weighting_of(0);
    const Problem p =
        make_problem(spec, 33, 128, 403, [](int64_t i) { return i % 2 == 0 ? 1.0 : 6.0; });
    const Reference expected = reference(spec, p);
    for (const Implementation implementation : kBoth) {
      CAPTURE(name_of(implementation));
      CAPTURE(base);
      const Result found =
          forward_backward(*make_head(spec, p, implementation, Precision::bf16), p);
      for (int64_t i = 0; i < p.rows; ++i) {
        // Operands rounded to 8 bits: 2^-9 relative each, so a cosine of 128 terms is off by about
        // 2^-9 sqrt(2 / 128) = 2.4e-4 in standard deviation, a logit at s = 64 by 0.016; A-Softmax
        // multiplies the target's cosine by up to m^2 = 16. Five deviations.
        const double bound = 0.08 * (spec.margin.m1 == 4 ? 16 : 1);
        CHECK(std::abs(found.base[i] - expected.base[i]) <
              bound * std::max(1.0, expected.base[i] / 6));
      }
      // Gradients: the logits' error of up to 0.08 changes p by as much, relatively; A-Softmax's
      // derivative more.
      const double gradient_bound = spec.margin.m1 == 4 ? 0.3 : 0.05;
      CHECK(relative_error(found.grad_x, expected.grad_x) < gradient_bound);
      CHECK(relative_error(found.grad_w, expected.grad_w) < gradient_bound);
    }
  }
}

TEST_CASE("step is SGD with momentum and decay on the reference gradient") {
  for (const std::string base : {"softmax", "arcface", "a-softmax", "euclidean"}) {
    for (const bool decay_all : {false, true}) {
      LossSpec spec = loss_of(base);
      spec.weighting = weighting_of(1);
      const Problem start = make_problem(spec, 7, 33, 129, gate_target);
      StepSettings settings;
      settings.lr = 0.1F;
      settings.momentum = 0.9F;
      settings.weight_decay = 0.01F;
      settings.decay_all = decay_all;
      settings.margin_factor = 0.6F;
      settings.lambda = 2;
      LossSpec stepped = spec;  // the law the settings make of it
      const double f = double{settings.margin_factor};
      stepped.margin.m1 = 1 + (spec.margin.m1 - 1) * f;
      stepped.margin.m2 = spec.margin.m2 * f;
      stepped.euclidean.margin = spec.euclidean.margin * f;
      stepped.margin.lambda = 2;
      for (const Implementation implementation : kBoth) {
        CAPTURE(name_of(implementation));
        CAPTURE(base);
        CAPTURE(decay_all);
        Problem p = start;
        const auto head = make_head(spec, p, implementation);
        std::vector<double> v(p.w.size()), vb(p.bias.size());
        std::vector<double> w(p.w.begin(), p.w.end()), b(p.bias.begin(), p.bias.end());
        for (int step = 0; step < 3; ++step) {
          const Reference r = reference(stepped, p);
          std::vector<float> grad_x(p.x.size());
          const StepStats stats = head->step({p.x, p.labels}, settings, grad_x);
          CHECK(relative_error(grad_x, r.grad_x) < 1e-3);
          CHECK(stats.loss == doctest::Approx(r.loss).epsilon(1e-3));
          double base_loss = 0;
          for (const double l : r.base) base_loss += l / 7;
          CHECK(stats.base_loss == doctest::Approx(base_loss).epsilon(2e-5));
          CHECK(stats.rows == 7);
          for (size_t k = 0; k < w.size(); ++k) {
            v[k] = double{settings.momentum} * v[k] + r.grad_w[k] +
                   double{settings.weight_decay} * w[k];
            w[k] -= double{settings.lr} * v[k];
            p.w[k] = static_cast<float>(w[k]);
          }
          for (size_t j = 0; j < b.size(); ++j) {
            const double decay = decay_all ? double{settings.weight_decay} * b[j] : 0;
            vb[j] = double{settings.momentum} * vb[j] + r.grad_bias[j] + decay;
            b[j] -= double{settings.lr} * vb[j];
            p.bias[j] = static_cast<float>(b[j]);
          }
        }
        std::vector<float> found(w.size()), found_bias(b.size());
        head->read_weights(found, found_bias);
        // The change of the weights, not the weights, to the gradients' tolerance.
        std::vector<float> change(w.size());
        std::vector<double> expected(w.size());
        for (size_t k = 0; k < w.size(); ++k) {
          change[k] = found[k] - start.w[k];
          expected[k] = w[k] - start.w[k];
        }
        CHECK(relative_error(change, expected) < 1e-3);
        CHECK(relative_error({head->weight_momentum().begin(), head->weight_momentum().end()}, v) <
              1e-3);
        if (!b.empty()) {
          CHECK(relative_error(found_bias, b) < 1e-4);
          CHECK(relative_error({head->bias_momentum().begin(), head->bias_momentum().end()}, vb) <
                1e-3);
        }
      }
    }
  }
}

TEST_CASE("statistics of a step") {
  for (const std::string base : {"arcface", "euclidean"}) {
    CAPTURE(base);
    LossSpec spec = loss_of(base);
    spec.weighting = weighting_of(base == "arcface" ? 1 : 5);
    if (base == "euclidean") spec.weighting.gamma = 8;
    const Problem p = make_problem(spec, 40, 33, 129, [](int64_t i) {
      return i % 8 == 5 ? 40 : gate_target(i);  // and some are wrong without any margin
    });
    const Reference r = reference(spec, p);
    int64_t correct = 0, silenced = 0, amplified = 0;
    double cosines = 0, norms = 0;
    int64_t pairs = 0;
    const auto dot = [&](int64_t a, int64_t b) {
      double s = 0;
      for (int64_t k = 0; k < p.dim; ++k) s += double{p.x[a * p.dim + k]} * p.x[b * p.dim + k];
      return s;
    };
    for (int64_t i = 0; i < p.rows; ++i) {
      const double* row = &r.plain[i * p.classes];
      correct += std::max_element(row, row + p.classes) - row == p.labels[i] ? 1 : 0;
      silenced += r.factor[i] < 0.1 ? 1 : 0;
      amplified += r.factor[i] > 1 ? 1 : 0;
      norms += std::sqrt(dot(i, i)) / static_cast<double>(p.rows);
      for (int64_t other = 0; other < p.rows; ++other) {
        if (p.labels[i] == p.labels[other]) continue;
        cosines += dot(i, other) / std::sqrt(dot(i, i) * dot(other, other));
        ++pairs;
      }
    }
    CHECK(silenced > 0);
    CHECK(amplified > 0);
    CHECK(correct > 0);
    CHECK(correct < p.rows);
    for (const Implementation implementation : kBoth) {
      CAPTURE(name_of(implementation));
      StepSettings settings;
      settings.lr = 0;
      const StepStats stats =
          make_head(spec, p, implementation)->step({p.x, p.labels}, settings, {});
      CHECK(stats.rows == p.rows);
      CHECK(stats.correct == correct);
      CHECK(stats.silenced == silenced);
      CHECK(stats.amplified == amplified);
      CHECK(stats.kept == p.rows - silenced - amplified);
      CHECK(stats.mean_cosine ==
            doctest::Approx(cosines / static_cast<double>(pairs)).epsilon(1e-9));
      CHECK(stats.embedding_norm == doctest::Approx(norms).epsilon(1e-9));
      const auto hardest = std::max_element(r.base.begin(), r.base.end()) - r.base.begin();
      // Several rows were made for a loss of 40: which of them is highest is rounding's to say.
      CHECK(r.base[stats.hardest.row] == doctest::Approx(r.base[hardest]).epsilon(1e-5));
      CHECK(stats.hardest.base_loss == doctest::Approx(r.base[hardest]).epsilon(1e-5));
      CHECK(stats.hardest.gradient_weight == doctest::Approx(r.factor[hardest]).epsilon(1e-4));
    }
  }
}

TEST_CASE("two runs of one thread count have the same bits") {
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    for (const Implementation implementation : kBoth) {
      for (const int threads : {1, 2, 3}) {
        CAPTURE(name_of(implementation));
        CAPTURE(threads);
        for (const std::string base : {"arcface", "euclidean"}) {
          LossSpec spec = loss_of(base);
          spec.weighting = weighting_of(1);
          spec.center.weight = 0.01;
          const Problem p = make_problem(spec, 33, 65, 517, gate_target);
          const auto trained = [&] {
            const auto head = make_head(spec, p, implementation, precision, threads);
            std::vector<float> grad_x(p.x.size()), w(p.w.size());
            for (int step = 0; step < 3; ++step) head->step({p.x, p.labels}, {}, grad_x);
            head->read_weights(w, {});
            w.insert(w.end(), grad_x.begin(), grad_x.end());
            w.insert(w.end(), head->centers().begin(), head->centers().end());
            return w;
          };
          const std::vector<float> first = trained(), second = trained();
          CHECK(std::memcmp(first.data(), second.data(), first.size() * sizeof(float)) == 0);
        }
      }
    }
  }
}

TEST_CASE("odd thread counts, more threads than classes, changing batches") {
  LossSpec spec = loss_of("arcface");
  spec.weighting = weighting_of(1);
  for (const Implementation implementation : kBoth) {
    for (const int threads : {1, 3, 8}) {
      CAPTURE(name_of(implementation));
      CAPTURE(threads);
      const Problem big = make_problem(spec, 19, 17, 70, gate_target);
      const auto head = make_head(spec, big, implementation, Precision::fp32, threads);
      for (const int64_t rows : {19, 1, 16, 19}) {
        Problem p = big;
        p.rows = rows;
        p.x.resize(rows * p.dim);
        p.labels.resize(rows);
        const Reference r = reference(spec, p);
        const Result found = forward_backward(*head, p);
        CHECK(relative_error(found.base, r.base) < 2e-5);
        CHECK(relative_error(found.grad_x, r.grad_x) < 1e-3);
        CHECK(relative_error(found.grad_w, r.grad_w) < 1e-3);
      }
    }
  }
}

TEST_CASE("the loops of every instruction set agree with the standard library") {
  std::vector<const HeadLoops*> tables = {&baseline::kHeadLoops};
#if defined(__x86_64__)
  if (&head_loops() != &baseline::kHeadLoops) tables.push_back(&avx2::kHeadLoops);
  if (&head_loops() == &avx512::kHeadLoops) tables.push_back(&avx512::kHeadLoops);
#endif
  constexpr int64_t kClasses = 77, kRows = 144;  // more than a strip of both
  std::vector<float> dots(kClasses * kRows), class_scale(kClasses), bias(kClasses),
      row_scale(kRows);
  for (size_t k = 0; k < dots.size(); ++k) dots[k] = static_cast<float>(random_normal(1, 1, k));
  for (int64_t j = 0; j < kClasses; ++j) {
    class_scale[j] = static_cast<float>(0.5 + random_uniform(1, 2, j));
    bias[j] = static_cast<float>(random_normal(1, 3, j));
  }
  for (int64_t i = 0; i < kRows; ++i) row_scale[i] = 30 * kLog2E;
  const LogitTile tile{dots.data(),        kClasses,    kRows,
                       class_scale.data(), bias.data(), row_scale.data()};
  const auto logit = [&](int64_t j, int64_t i) {
    return double{dots[j * kRows + i]} * class_scale[j] * 30 + double{bias[j]};
  };
  for (const HeadLoops* loops : tables) {
    // Hinges: every number of active classes, from a threshold that all pass to one that none does.
    std::vector<float> threshold(kRows), most(kRows, std::numeric_limits<float>::lowest()),
        hinges(kRows), gradient_row(kClasses), hinge_gradient(dots.size());
    std::vector<int32_t> active(kRows);
    std::vector<uint16_t> hinge_rounded(dots.size());
    for (int64_t i = 0; i < kRows; ++i) threshold[i] = static_cast<float>(i - 72) * 2;
    LogitTile plain = tile;
    plain.bias = nullptr;
    loops->hinge_tile(plain, {threshold.data(), hinges.data(), most.data(), active.data()});
    loops->hinge_gradient_tile(plain, threshold.data(), hinge_gradient.data());
    loops->hinge_gradient_tile_bf16(plain, threshold.data(), hinge_rounded.data());
    bool same = true;
    for (int64_t i = 0; i < kRows; ++i) {
      std::vector<float> z(kClasses);
      double hinge_sum = 0;
      int32_t count = 0;
      for (int64_t j = 0; j < kClasses; ++j) {
        z[j] = dots[j * kRows + i] * class_scale[j] * row_scale[i];
        const bool above = z[j] > threshold[i];
        hinge_sum += above ? double{z[j]} - double{threshold[i]} : 0;
        count += above ? 1 : 0;
        const int64_t at = j * kRows + i;
        same = same && hinge_gradient[at] == (above ? class_scale[j] : 0.0F);
        same = same && (hinge_rounded[at] != 0) == above;
      }
      CHECK(active[i] == count);
      CHECK(most[i] == doctest::Approx(*std::max_element(z.begin(), z.end())).epsilon(1e-6));
      // 77 terms of up to 300, in fp32.
      CHECK(hinges[i] == doctest::Approx(hinge_sum).epsilon(1e-5));
      float row_sum = 0, row_max = 0;
      int32_t row_active = 0;
      loops->hinge_row(z.data(), threshold[i], kClasses, &row_sum, &row_max, &row_active);
      CHECK(row_active == count);
      CHECK(row_sum == doctest::Approx(hinge_sum).epsilon(1e-5));
      CHECK(row_max == most[i]);
      loops->hinge_gradient_row(z.data(), threshold[i], 0.25F, gradient_row.data(), kClasses);
      for (int64_t j = 0; j < kClasses; ++j)
        same = same && gradient_row[j] == (z[j] > threshold[i] ? 0.25F : 0.0F);
    }
    CHECK(same);
    std::vector<float> max(kRows, std::numeric_limits<float>::lowest()), sum(kRows), log_sum(kRows);
    loops->softmax_tile(tile, max.data(), sum.data());
    std::vector<double> expected(kRows);
    for (int64_t i = 0; i < kRows; ++i) {
      double top = -1e300, total = 0;
      for (int64_t j = 0; j < kClasses; ++j) top = std::max(top, logit(j, i));
      for (int64_t j = 0; j < kClasses; ++j) total += std::exp(logit(j, i) - top);
      expected[i] = top + std::log(total);
      const double found = (double{max[i]} + std::log2(double{sum[i]})) / std::numbers::log2e;
      // Logits of size 100 in fp32: 100 * 2^-24 = 6e-6 each.
      CHECK(std::abs(found - expected[i]) < 2e-5);
      log_sum[i] = static_cast<float>(expected[i] * std::numbers::log2e);
    }
    std::vector<float> gradient(dots.size());
    std::vector<uint16_t> rounded(dots.size());
    loops->gradient_tile(tile, log_sum.data(), gradient.data());
    loops->gradient_tile_bf16(tile, log_sum.data(), rounded.data());
    bool near = true, near_bf16 = true;
    for (int64_t j = 0; j < kClasses; ++j) {
      for (int64_t i = 0; i < kRows; ++i) {
        const double p = std::exp(logit(j, i) - expected[i]) * class_scale[j];
        const int64_t at = j * kRows + i;
        near = near && std::abs(gradient[at] - p) < 5e-5 * p + 1e-37;
        const uint32_t bits = uint32_t{rounded[at]} << 16;
        float value = 0;
        std::memcpy(&value, &bits, sizeof value);
        // Half a unit of 8 bits; below 2^-126 nothing is promised.
        near_bf16 = near_bf16 && std::abs(value - gradient[at]) <= 0x1p-8 * gradient[at] + 1e-37;
      }
    }
    CHECK(near);
    CHECK(near_bf16);
    std::vector<float> probability(kClasses), logits(kClasses);
    for (int64_t j = 0; j < kClasses; ++j) logits[j] = static_cast<float>(logit(j, 3));
    float row_max = 0, row_sum = 0;
    loops->softmax_row(logits.data(), kClasses, &row_max, &row_sum);
    CHECK(row_max + std::log(row_sum) == doctest::Approx(expected[3]).epsilon(1e-6));
    loops->log_softmax_row(logits.data(), row_max + std::log(row_sum), logits.data(), kClasses);
    loops->softmax_gradient_row(logits.data(), 1, probability.data(), kClasses);
    double total = 0;
    for (const float p : probability) total += p;
    CHECK(total == doctest::Approx(1).epsilon(2e-5));
  }
}

TEST_CASE("a single class has no loss") {
  Problem p{3, 4, 1, std::vector<float>(12, 0.5F), std::vector<float>(4, 1.0F), {}, {0, 0, 0}};
  for (const Implementation implementation : kBoth) {
    // Of the Euclidean margin loss only the pull is left, and that is 0 at these angles.
    const Result euclidean =
        forward_backward(*make_head(loss_of("euclidean"), p, implementation), p);
    CHECK(euclidean.loss < 1e-6);
    CHECK(all_finite(euclidean.grad_x));
    const Result found = forward_backward(*make_head(loss_of("arcface"), p, implementation), p);
    CHECK(found.loss == 0);
    CHECK(all_finite(found.grad_x));
    CHECK(all_finite(found.grad_w));
  }
}

TEST_CASE("the fused head needs far less memory than the unfused one") {
  LossSpec spec = loss_of("arcface");
  const Problem p = make_problem(spec, 64, 32, 4000, gate_target);
  const auto fused = make_head(spec, p, Implementation::fused);
  const auto unfused = make_head(spec, p, Implementation::unfused);
  forward_backward(*fused, p);
  forward_backward(*unfused, p);
  const size_t matrix = 64 * 4000 * sizeof(float);
  CHECK(unfused->peak_extra_bytes() > 6 * matrix);
  CHECK(fused->peak_extra_bytes() > 0);
  CHECK(fused->peak_extra_bytes() < unfused->peak_extra_bytes());
}

TEST_CASE("what is timed takes time, until it is cancelled") {
  const LossSpec spec = loss_of("arcface");
  const Problem p = make_problem(spec, 8, 32, 100, gate_target);
  for (const Precision precision : {Precision::fp32, Precision::bf16}) {
    const auto head = make_head(spec, p, Implementation::fused, precision);
    for (const HeadWork work : {HeadWork::forward_backward, HeadWork::step, HeadWork::products}) {
      std::vector<double> ms(2);
      head->time(work, {p.x, p.labels}, ms, std::atomic<bool>(false));
      for (const double run_ms : ms) CHECK(run_ms > 0);
      ms = {0, 0};
      head->time(work, {p.x, p.labels}, ms, std::atomic<bool>(true));
      CHECK(ms == std::vector<double>{0, 0});
    }
  }
}

TEST_CASE("wrong input is refused with a sentence that names it") {
  LossSpec spec = loss_of("arcface");
  const Problem good = make_problem(spec, 7, 33, 129, gate_target);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Implementation implementation : kBoth) {
    CAPTURE(name_of(implementation));
    const auto head = make_head(spec, good, implementation);
    std::string message;
    for (const int32_t label : {-1, 129, std::numeric_limits<int32_t>::max()}) {
      Problem p = good;
      p.labels[4] = label;
      CHECK(error_code([&] { forward_backward(*head, p); }, &message) == codes::kInput);
      CHECK(message.find("row 4") != std::string::npos);
      CHECK(message.find(std::to_string(label)) != std::string::npos);
      CHECK(message.find("129 classes") != std::string::npos);
    }
    for (const float value : {nan, infinity, -infinity}) {
      Problem p = good;
      p.x[3 * p.dim + 5] = value;
      CHECK(error_code([&] { forward_backward(*head, p); }, &message) == codes::kNonFinite);
      CHECK(message.find("embedding of row 3") != std::string::npos);
      CHECK(message.find("position 5") != std::string::npos);
      CHECK(error_code([&] { head->step({p.x, p.labels}, {}, {}); }) == codes::kNonFinite);
      p = good;
      p.w[100 * p.dim + 32] = value;  // a class that no row has
      const auto spoiled = make_head(spec, p, implementation);
      CHECK(error_code([&] { forward_backward(*spoiled, p); }, &message) == codes::kNonFinite);
      CHECK(message.find("class 100") != std::string::npos);
      CHECK(message.find("position 32") != std::string::npos);
    }
    {
      Problem p = good;
      p.w[7] = 1e30F;  // finite, but its norm is not
      CHECK(error_code([&] { forward_backward(*make_head(spec, p, implementation), p); },
                       &message) == codes::kNonFinite);
      CHECK(message.find("too large") != std::string::npos);
    }
    {
      const LossSpec softmax = loss_of("softmax");
      Problem p = make_problem(softmax, 7, 33, 129, gate_target);
      p.bias[17] = nan;
      CHECK(error_code([&] { forward_backward(*make_head(softmax, p, implementation), p); },
                       &message) == codes::kNonFinite);
      CHECK(message.find("bias of class 17") != std::string::npos);
    }
    Problem p = good;
    p.x.pop_back();
    CHECK(error_code([&] { forward_backward(*head, p); }) == codes::kInput);
    p = good;
    p.labels.clear(), p.x.clear(), p.rows = 0;
    CHECK(error_code([&] { forward_backward(*head, p); }) == codes::kInput);
    CHECK(error_code([&] { head->set_weights(std::span(good.w).first(5), {}); }) == codes::kInput);
    CHECK(error_code([&] { head->set_weights(good.w, std::span(good.w).first(129)); }) ==
          codes::kInput);
    std::vector<float> small(3);
    CHECK(error_code([&] { head->read_weights(small, {}); }) == codes::kInput);
    CHECK(error_code([&] { head->step({good.x, good.labels}, {}, small); }) == codes::kInput);
    HeadOutput output;
    output.grad_weights = small;
    CHECK(error_code([&] {
            head->forward_backward({good.x, good.labels}, output);
          }) == codes::kInput);
    // After all that the head still works.
    CHECK(std::isfinite(forward_backward(*head, good).loss));
  }
}

TEST_CASE("wrong settings are refused when the head is made") {
  const auto code = [](const std::function<void(HeadSpec&, Execution&)>& spoil) {
    HeadSpec spec{10, 4, loss_of("arcface"), Implementation::fused};
    spec.loss.weighting = weighting_of(1);
    Execution execution;
    execution.threads = 1;
    spoil(spec, execution);
    return error_code([&] { make_cpu_head(spec, execution); });
  };
  CHECK(code([](HeadSpec&, Execution&) {}) == "");
  CHECK(code([](HeadSpec&, Execution& e) { e.precision = Precision::fp16; }) == codes::kConfig);
  CHECK(code([](HeadSpec&, Execution& e) { e.threads = -1; }) == codes::kConfig);
  CHECK(code([](HeadSpec&, Execution& e) { e.topology.world = 2; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.classes = 0; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.dim = -1; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.margin.scale = 0; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.margin.m1 = 0; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.margin.m2 = std::nan(""); }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.margin.lambda = -1; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.weighting.alpha = 0; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.weighting = weighting_of(5); }) == "");
  CHECK(code([](HeadSpec& s, Execution&) {
          s.loss.weighting = weighting_of(5);
          s.loss.weighting.gamma = -1;
        }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) {
          s.loss.weighting = weighting_of(5);
          s.loss.weighting.gamma = 1e7;
        }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) {
          s.loss.weighting = weighting_of(5);
          s.loss.weighting.reduction = Reduction::batch;
        }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) {
          s.loss = loss_of("euclidean");
          s.loss.euclidean.margin = -0.1;
        }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) {
          s.loss = loss_of("euclidean");
          s.loss.euclidean.pull = std::nan("");
        }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.center.weight = -1; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) { s.loss.center.rate = 1.5; }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) {
          s.loss = loss_of("a-softmax");
          s.loss.margin.mirror = false;
        }) == codes::kConfig);
  CHECK(code([](HeadSpec& s, Execution&) {
          s.classes = std::numeric_limits<int32_t>::max();
          s.dim = 1 << 20;  // 8 PiB of weights
        }) == codes::kOutOfMemory);
}
