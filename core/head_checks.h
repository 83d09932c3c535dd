// What a margin head is asked for, checked before any backend works on it: the same sentences on
// every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "core/backend.h"
#include "core/error.h"
#include "core/loss_maths.h"

namespace hardmine {

inline void require_finite(const char* name, double value) {
  if (!std::isfinite(value)) {
    throw Error(codes::kConfig, std::string("The loss's ") + name + " is " + std::to_string(value) +
                                    "; it must be a finite number.");
  }
}

inline void require_positive(const char* name, double value) {
  require_finite(name, value);
  if (value <= 0) {
    throw Error(codes::kConfig, std::string("The loss's ") + name + " is " + std::to_string(value) +
                                    "; it must be above 0.");
  }
}

inline void require_not_negative(const char* name, double value) {
  require_finite(name, value);
  if (value < 0) {
    throw Error(codes::kConfig, std::string("The loss's ") + name + " is " + std::to_string(value) +
                                    "; it must be 0 or more.");
  }
}

inline void require_law(const EuclideanMargin& law) {
  require_not_negative("margin", law.margin);
  require_not_negative("pull", law.pull);
}

inline void require_law(const MarginLaw& law) {
  require_positive("m1", law.m1);
  require_finite("m2", law.m2);
  require_finite("m3", law.m3);
  if (!law.norm_scale) require_positive("scale", law.scale);
  require_finite("lambda", law.lambda);
  if (law.lambda < 0) {
    throw Error(codes::kConfig, "The loss's lambda is " + std::to_string(law.lambda) +
                                    "; it must be 0 (the margin alone) or more.");
  }
  if (law.norm_scale && !law.mirror && law.m1 != 1) {
    throw Error(
        codes::kConfig,
        "A-Softmax needs beyondPi 'mirror': the plain formula 'none' is not monotone for m > 1 "
        "and would reward wrong angles.");
  }
}

inline void require_base(const LossSpec& loss) {
  if (loss.base == BaseKind::margin) require_law(loss.margin);
  if (loss.base == BaseKind::euclidean_margin) require_law(loss.euclidean);
}

// The loss of a step: its margin as far as it has grown, A-Softmax's lambda as it is then.
inline LossSpec in_force(LossSpec loss, const StepSettings& settings) {
  const auto factor = double{settings.margin_factor};
  loss.margin = warmed_up(loss.margin, factor);
  loss.margin.lambda = double{settings.lambda};
  loss.euclidean = warmed_up(loss.euclidean, factor);
  return loss;
}

inline void require_weighting(const Weighting& weighting) {
  if (weighting.kind == WeightingKind::hard_mining) {
    require_positive("alpha", weighting.alpha);
    require_positive("beta", weighting.beta);
    require_positive("A", weighting.A);
    require_finite("B", weighting.B);
  }
  if (weighting.kind == WeightingKind::knot_magnify) {
    require_not_negative("gamma", weighting.gamma);
    constexpr double kMostGamma = 1e6;  // there p = 1 has a weight of 1e-12: no sample is left
    if (weighting.gamma > kMostGamma) {
      throw Error(codes::kConfig, "The loss's gamma is " + std::to_string(weighting.gamma) +
                                      "; it must be at most 1000000.");
    }
    if (weighting.reduction == Reduction::batch) {
      throw Error(codes::kConfig,
                  "The weighting knot-magnify has the reduction batch; it is defined for each "
                  "sample alone, so use the reduction sample.");
    }
  }
}

inline void require_centers(const CenterLoss& center) {
  require_not_negative("center weight", center.weight);
  require_not_negative("center rate", center.rate);
  if (center.rate > 1) {
    throw Error(
        codes::kConfig,
        "The loss's center rate is " + std::to_string(center.rate) +
            "; it must be at most 1, where a center becomes the mean of itself and its rows.");
  }
}

// `most_dim`: the longest embedding that the backend takes.
inline void require_head_spec(const HeadSpec& spec, int64_t most_dim) {
  if (spec.classes < 1 || spec.classes > std::numeric_limits<int32_t>::max()) {
    throw Error(codes::kConfig, "A margin head needs 1 to 2147483647 classes, not " +
                                    std::to_string(spec.classes) + ".");
  }
  if (spec.dim < 1 || spec.dim > most_dim) {
    throw Error(codes::kConfig, "A margin head needs an embedding of 1 to " +
                                    std::to_string(most_dim) + " numbers, not " +
                                    std::to_string(spec.dim) + ".");
  }
  require_base(spec.loss);
  require_weighting(spec.loss.weighting);
  require_centers(spec.loss.center);
}

inline void require_size(const char* what, size_t found, int64_t expected) {
  if (found != static_cast<size_t>(expected)) {
    throw Error(codes::kInput, std::string("The ") + what + " have " + std::to_string(found) +
                                   " numbers; " + std::to_string(expected) + " were expected.");
  }
}

inline void require_labels(std::span<const int32_t> labels, int64_t classes) {
  for (size_t i = 0; i < labels.size(); ++i) {
    if (labels[i] < 0 || labels[i] >= classes) {
      throw Error(codes::kInput,
                  "The label of row " + std::to_string(i) + " is " + std::to_string(labels[i]) +
                      "; the head has " + std::to_string(classes) +
                      " classes, so labels must be from 0 to " + std::to_string(classes - 1) + ".");
    }
  }
}

inline void require_head_input(const HeadInput& input, const HeadSpec& spec) {
  const auto rows = static_cast<int64_t>(input.labels.size());
  if (rows < 1) throw Error(codes::kInput, "The batch is empty; at least one row is needed.");
  require_size("embeddings", input.embeddings.size(), rows * spec.dim);
  require_labels(input.labels, spec.classes);
}

// Index of the first element that is NaN or infinite, or -1.
inline int64_t first_non_finite(std::span<const float> values) {
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i])) return static_cast<int64_t>(i);
  return -1;
}

// Products' operands are fp32 at most: a norm beyond its range has no usable embedding.
inline void require_embedding(int64_t row, std::span<const float> embedding) {
  double squares = 0;
  for (const float x : embedding) squares += double{x} * x;
  if (std::sqrt(squares) <= double{std::numeric_limits<float>::max()}) return;
  const int64_t k = first_non_finite(embedding);
  throw Error(codes::kNonFinite,
              "The embedding of row " + std::to_string(row) +
                  (k < 0 ? std::string(" is too large for its norm to be a finite number")
                         : " has " + std::to_string(embedding[static_cast<size_t>(k)]) +
                               " at position " + std::to_string(k)) +
                  "; finite numbers are expected: look at the images of this batch or lower the "
                  "learning rate.");
}

inline void require_embeddings(const HeadInput& input, const HeadSpec& spec) {
  const auto dim = static_cast<size_t>(spec.dim);
  for (size_t row = 0; row < input.labels.size(); ++row)
    require_embedding(static_cast<int64_t>(row), input.embeddings.subspan(row * dim, dim));
}

// `weights` are those of class `j`; their norm is no finite number.
[[noreturn]] inline void throw_bad_class(int64_t j, std::span<const float> weights) {
  const int64_t k = first_non_finite(weights);
  throw Error(codes::kNonFinite,
              "The class weights of class " + std::to_string(j) +
                  (k < 0 ? std::string(" are too large for their norm to be a finite number")
                         : " have " + std::to_string(weights[static_cast<size_t>(k)]) +
                               " at position " + std::to_string(k)) +
                  "; finite numbers are expected: start from other weights or lower the learning "
                  "rate.");
}

[[noreturn]] inline void throw_bad_bias(int64_t j, float bias) {
  throw Error(codes::kNonFinite, "The bias of class " + std::to_string(j) + " is " +
                                     std::to_string(bias) + "; a finite number is expected.");
}

// `center` is that of class `j`; not all of it is finite.
[[noreturn]] inline void throw_bad_center(int64_t j, std::span<const float> center) {
  const int64_t k = std::max<int64_t>(first_non_finite(center), 0);
  throw Error(codes::kNonFinite, "The center of class " + std::to_string(j) + " has " +
                                     std::to_string(center[static_cast<size_t>(k)]) +
                                     " at position " + std::to_string(k) +
                                     "; finite numbers are expected: set other centers.");
}

[[noreturn]] inline void throw_bad_loss(int64_t row, double loss) {
  throw Error(codes::kNonFinite,
              "The loss of row " + std::to_string(row) + " is " + std::to_string(loss) +
                  " although its embedding and the class weights are finite: a logit is beyond "
                  "fp32's range; use smaller embeddings, weights or scale.");
}

}  // namespace hardmine
