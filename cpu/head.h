// The margin head on the CPU, as the session uses it: MarginHead plus access to its state for
// checkpoints. head_fused.cpp and head_unfused.cpp implement it.
#pragma once

#include <memory>
#include <span>

#include "core/backend.h"

namespace hardmine {

class CpuMarginHead : public MarginHead {
 public:
  // State in place; call state_changed() after writing.
  virtual std::span<float> weights() = 0;          // [classes, dim]
  virtual std::span<float> bias() = 0;             // [classes], empty unless softmax
  virtual std::span<float> weight_momentum() = 0;  // [classes, dim]
  virtual std::span<float> bias_momentum() = 0;
  virtual std::span<float> centers() = 0;  // [classes, dim], empty without a center loss
  virtual void state_changed() = 0;
};

// Picks by HeadSpec::implementation. Must be made and used on one thread, whose OpenMP team it
// uses.
std::unique_ptr<CpuMarginHead> make_cpu_head(const HeadSpec& spec, const Execution& execution);

}  // namespace hardmine
