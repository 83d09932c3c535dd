#include "core/initialise.h"

#include <cmath>

#include "core/random.h"

namespace hardmine {
namespace {

void fill_normal(uint64_t seed, const std::string& name, double deviation,
                 std::span<float> values) {
  const uint64_t stream = stream_of(name.c_str());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(deviation * random_normal(seed, stream, i));
  }
}

void fill_uniform(uint64_t seed, const std::string& name, double bound, std::span<float> values) {
  const uint64_t stream = stream_of(name.c_str());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(bound * (2 * random_uniform(seed, stream, i) - 1));
  }
}

}  // namespace

void initialise_convolution(const Node& node, uint64_t seed, std::span<float> weight) {
  const double fan_out = static_cast<double>(node.out_channels) * node.kernel * node.kernel;
  fill_normal(seed, node.name + ".weight", std::sqrt(2 / fan_out), weight);
}

void initialise_linear(const Node& node, uint64_t seed, std::span<float> weight,
                       std::span<float> bias) {
  const double bound = 1 / std::sqrt(static_cast<double>(node.in_channels));
  fill_uniform(seed, node.name + ".weight", bound, weight);
  fill_uniform(seed, node.name + ".bias", bound, bias);
}

void initialise_class_weights(uint64_t seed, std::span<float> weights) {
  fill_normal(seed, "head.weight", 0.01, weights);
}

}  // namespace hardmine
