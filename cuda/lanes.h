// The lanes of a step, and the buffers of its backward pass that go from layer to layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/runtime.h"

namespace hardmine::cuda {

// The streams of a step. What only waits for its own operands need not wait for the rest.
enum class Lane : uint8_t {
  main,
  shortcut,  // the convolution and batch-norm beside a block's two
  weights,   // weight gradients and what becomes of all gradients: their check and SGD
};

// Memory for a gradient: a buffer of the backward pass, or (buffer -1) an output that is not needed
// any more.
struct Gradient {
  void* values = nullptr;
  int buffer = -1;
};

// Buffers of the backward pass, handed on to later layers of their lane when they are free.
class GradientBuffers {
 public:
  explicit GradientBuffers(Arena& arena) : arena_(arena) {}

  Gradient take(size_t bytes, Lane lane) {
    int best = -1;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const Buffer& buffer = buffers_[i];
      if (!buffer.idle || buffer.lane != lane || buffer.bytes < bytes) continue;
      if (best < 0 || buffer.bytes < buffers_[static_cast<size_t>(best)].bytes)
        best = static_cast<int>(i);
    }
    if (best < 0) {
      best = static_cast<int>(buffers_.size());
      buffers_.push_back({arena_.take<char>(static_cast<int64_t>(bytes)), bytes, lane, true});
    }
    Buffer& buffer = buffers_[static_cast<size_t>(best)];
    buffer.idle = false;
    return {buffer.memory, best};
  }

  // By a node of `lane`. What one lane reads is not free for the other before the two meet.
  void release(const Gradient& gradient, Lane lane) {
    if (gradient.buffer < 0) return;
    Buffer& buffer = buffers_[static_cast<size_t>(gradient.buffer)];
    if (lane == buffer.lane && lane == Lane::main) {
      buffer.idle = true;
    } else {
      until_lanes_meet_.push_back(gradient.buffer);
    }
  }
  void lanes_meet() {
    for (const int buffer : std::exchange(until_lanes_meet_, {}))
      buffers_[static_cast<size_t>(buffer)].idle = true;
  }

 private:
  struct Buffer {
    void* memory;
    size_t bytes;
    Lane lane;
    bool idle;
  };
  Arena& arena_;
  std::vector<Buffer> buffers_;
  std::vector<int> until_lanes_meet_;
};

}  // namespace hardmine::cuda
