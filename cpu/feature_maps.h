// What the training network and the inference network share: memory, the layout of feature maps and
// the list of a network's tensors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "core/backend.h"
#include "cpu/memory.h"
#include "cpu/network_loops.h"
#include "cpu/onednn.h"

namespace hardmine {

// Zeroed memory on a cache line's boundary. Padding channels of blocked layouts stay zero.
class AlignedMemory {
 public:
  AlignedMemory() = default;
  explicit AlignedMemory(size_t bytes) : data_(take_memory(bytes, "The network")) {}
  template <typename T = void>
  T* data() const {
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// Memory whose address is known only when the whole network has been planned, and the oneDNN
// memories that look at it.
class Buffer {
 public:
  explicit Buffer(bool shared) : shared_(shared) {}
  void reserve(size_t bytes) { bytes_ = std::max(bytes_, bytes); }
  size_t bytes() const { return bytes_; }
  bool shared() const { return shared_; }
  // A oneDNN memory of this descriptor, `offset` bytes into the buffer.
  onednn::memory view(const onednn::memory::desc& desc, const onednn::engine& engine,
                      size_t offset = 0) {
    reserve(offset + desc.get_size());
    views_.push_back({onednn::memory(desc, engine, DNNL_MEMORY_NONE), offset});
    return views_.back().memory;
  }
  void allocate() {
    memory_ = AlignedMemory(bytes_);
    for (View& view : views_) view.memory.set_data_handle(memory_.data<std::byte>() + view.offset);
  }
  template <typename T = void>
  T* data() const {
    return memory_.data<T>();
  }

 private:
  bool shared_;  // gradients take turns in it
  size_t bytes_ = 0;
  AlignedMemory memory_;
  struct View {
    onednn::memory memory;
    size_t offset;
  };
  std::vector<View> views_;
};

// The planes of one feature map (network_loops.h) for a whole batch.
struct Layout {
  int64_t planes = 0;  // images * channel blocks
  int64_t blocks = 1;  // channel blocks per image
  Plane plane;         // pixels, channels of one block

  int64_t padded_channels() const { return blocks * plane.channels; }
  int64_t elements_per_plane() const { return plane.pixels * plane.channels; }
  int64_t elements() const { return planes * elements_per_plane(); }
};

// The layout of every feature map in a network: what oneDNN prefers for a convolution in the middle
// of it, so that no map is ever reordered. Channels last, or blocks of channels.
class MapFormat {
 public:
  MapFormat(const onednn::engine& engine, const std::vector<Node>& nodes, int64_t batch,
            onednn::memory::data_type type);
  onednn::memory::desc desc(int64_t batch, int64_t channels, int64_t size) const;
  Layout layout(int64_t batch, int64_t channels, int64_t size) const;

 private:
  onednn::memory::data_type type_;
  int64_t block_ = 0;  // 0: channels last
};

onednn::Convolution convolution_of(const Node& node, int64_t batch);

// Where pixels go in the source of a first convolution.
ImageLayout image_layout(const onednn::memory::desc& desc, int64_t size);

// Throws codes::kConfig for a precision that this CPU cannot compute in.
onednn::memory::data_type data_type_of(Precision precision);

}  // namespace hardmine
