// The training session on the CPU: a TrainingNetwork and a CpuMarginHead.
#pragma once

#include <memory>
#include <vector>

#include "core/backend.h"

namespace hardmine {

std::unique_ptr<TrainingSession> make_cpu_session(const SessionSpec& spec,
                                                  const Execution& execution);

}  // namespace hardmine
