// Initial values of parameters, the same on every device: they are drawn on the host from the seed
// and the parameter's name.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/network.h"

namespace hardmine {

// Convolutions Kaiming normal, fan-out (as torchvision's ResNet).
void initialise_convolution(const Node& node, uint64_t seed, std::span<float> weight);
// torch's Linear: weight and bias uniform in +-1/sqrt(in).
void initialise_linear(const Node& node, uint64_t seed, std::span<float> weight,
                       std::span<float> bias);
// Class weights N(0, 0.01) (standard deviation 0.01), as InsightFace's heads.
void initialise_class_weights(uint64_t seed, std::span<float> weights);

}  // namespace hardmine
