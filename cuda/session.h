// The training session on CUDA: a network, its margin head and their optimiser. A whole step
// (augmentation, forward, head, backward, check, SGD, figures) is one captured graph; batches are
// copied on a second stream while the step before them runs, and the host waits only at the end of
// a run of steps, or for a batch's memory to be free.
#pragma once

#include <memory>
#include <vector>

#include "core/backend.h"
#include "cuda/libraries.h"

namespace hardmine::cuda {

// Any list of nodes that ends in an embedding of head.dim; batch and seed as in SessionSpec. Throws
// codes::kOutOfMemory that names a batch that would fit.
std::unique_ptr<TrainingSession> make_cuda_session(const std::vector<Node>& nodes,
                                                   const HeadSpec& head, int64_t batch,
                                                   uint64_t seed, const Execution& execution,
                                                   const Libraries& libraries);

}  // namespace hardmine::cuda
