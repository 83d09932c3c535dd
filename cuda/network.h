// A network in training on CUDA: forward, backward and SGD, enqueued on one stream and fit to be
// captured in a graph. Convolutions are cuDNN's, the last product cuBLASLt's, everything between
// them our own kernels, but batch-norms where cuDNN's are faster. Beside the stream, joined to it
// within each pass, run a block's shortcut, the weight gradients and, under the next step's forward
// pass, SGD: small maps do not fill a GPU, and kernels that wait for memory leave it time to
// multiply. Feature maps and operands have the network's precision T; weights, momentum,
// statistics, batch-norm's gradients and the vectors after the pooling are fp32.
//
// What is kept for the backward pass: each convolution's output and each batch-norm's but those
// that their readers make as they read (the max-pool always, a convolution where that is faster);
// of the pool one byte an element. A batch-norm's gradient overwrites the convolution output it
// read, or takes the place of the map that was not written; where a residual joins, the masked
// gradient stays in its buffer as the residual's own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/network.h"
#include "cuda/kernels/sgd.cuh"
#include "cuda/libraries.h"
#include "cuda/runtime.h"

namespace hardmine::cuda {

class TrainingNetwork {
 public:
  virtual ~TrainingNetwork() = default;

  virtual const std::vector<Node>& nodes() const = 0;
  int64_t embedding() const { return nodes().back().out_channels; }

  // Memory: each twice, counting and real (Arena), the state first. Everything starts as zero.
  virtual void layout_state(Arena& arena) = 0;  // does not depend on the batch
  virtual void layout_batch(Arena& arena) = 0;
  // Settles how convolutions, batch-norms and lanes run, which may take timing, and runs everything
  // once, so that nothing is prepared later. Leaves rubbish everywhere: initialise() comes after.
  virtual void prepare() = 0;
  // Parameters from the seed, batch-norms as torch's, momentum 0. Waits for the stream.
  virtual void initialise(uint64_t seed) = 0;

  // A step: forward, backward, conclude. Its update stays pending until the next step's forward or
  // apply_pending(), and the parameters and their momentum are those before it until then.
  //
  // Enqueues the update that is pending and the forward pass over images [batch, size, size, 3] by
  // batch statistics, which also moves the running ones. Gives the embeddings [batch, embedding].
  virtual const float* forward(const uint8_t* images, const Augmentation* augmentations) = 0;
  // Enqueues gradients of all parameters from that of the embeddings [batch, embedding], and their
  // check.
  virtual void backward(const float* grad_embeddings) = 0;
  // Enqueues the decision which update is pending from now on (none where a gradient is not
  // finite) and, in fp16, the loss scale's next value. Copies the parameters.
  virtual void conclude(const StepParameters* parameters) = 0;
  // Enqueues the update that is pending; then none is. After the last step of a run, so that the
  // functions below see all of it.
  virtual void apply_pending() = 0;

  virtual const std::vector<TensorInfo>& tensors() const = 0;
  // These wait for the stream.
  virtual void read(const std::string& name, std::span<float> values) const = 0;
  virtual void write(const std::string& name, std::span<const float> values) = 0;
  // The gradient of a parameter by the last backward, unscaled.
  virtual void read_gradient(const std::string& name, std::span<float> values) const = 0;
  virtual LossScale loss_scale() const = 0;
  virtual void write_loss_scale(const LossScale& scale) = 0;
  // Names the first tensor that holds NaN or infinity: parameters, then activations in order; empty
  // if there is none.
  virtual std::string first_non_finite() const = 0;
  // Which plan every convolution runs, which ones do work of the batch-norms beside them, and which
  // batch-norms are cuDNN's.
  virtual std::string engines() const = 0;
};

// Any list of nodes that reads one image and ends in a vector. Throws codes::kConfig for a network
// that cannot be trained here.
std::unique_ptr<TrainingNetwork> make_training_network(std::vector<Node> nodes, int64_t batch,
                                                       Precision precision, bool deterministic,
                                                       const Libraries& libraries,
                                                       const Stream& stream);

}  // namespace hardmine::cuda
