// How batch-norms and lanes run, where there are several ways: timed, and compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>

#include "cuda/network_of.h"

namespace hardmine::cuda {

// What is timed is compared as well, and over zeros everything is equal. Convolutions' weights are
// a 64th of what training starts with, so that no weight gradient of a large batch overflows fp16;
// batch-norms make up for it.
template <typename T>
void NetworkOf<T>::fill_with_numbers() {
  std::minstd_rand random(1);
  std::uniform_real_distribution<float> unit(-1, 1);
  for (const Parameter& of : parameters_) {
    float middle = 0, spread = 0.3F;
    if (of.is_operand) {
      spread = std::sqrt(6.0F / static_cast<float>(of.layout.in * of.layout.taps)) / 64;
    } else if (of.name.ends_with(".weight")) {
      middle = 1;
    }
    std::vector<float> values(static_cast<size_t>(of.layout.count()));
    for (float& value : values) value = middle + spread * unit(random);
    write(of.name, values);
  }
  const int64_t size = nodes_.front().in_size, count = size * size * kImageChannels;
  std::vector<T> pixels(static_cast<size_t>(2 * count));
  for (T& value : pixels) value = from_float<T>(unit(random));
  for (int64_t n = 0; n < batch_; ++n) {
    // Images differ by where they begin.
    const auto first = static_cast<size_t>(n * 101 % count);
    write_device(image_ + n * count,
                 std::span<const T>(pixels).subspan(first, static_cast<size_t>(count)), stream_);
  }
}

// How batch-norm i runs: by two kernels each way, by one, by cuDNN's engine, or forward from sums
// that come with the convolution before it, which is timed with it.
template <typename T>
void NetworkOf<T>::choose_norm(size_t i) {
  if (deterministic_) return;
  Work& work = work_[i];
  const auto from = static_cast<size_t>(nodes_[i].input);
  Work& before = work_[from];
  EnginePlan* const library_forward = work.library_forward;
  EnginePlan* const library_backward = work.library_backward;
  const auto [forward_rows, backward_rows] =
      outputs_[i].vector ? rows_to_keep<float>(i) : rows_to_keep<T>(i);
  const auto forward_by = [&](bool with_sums, std::optional<int> kept, EnginePlan* library) {
    return [&, with_sums, kept, library] {
      before.with_sums = with_sums;
      work.kept_forward = kept;
      work.library_forward = library;
      if (with_sums) before.forward_with_sums->choose(forward_pointers(from, true), stream_);
      if (library != nullptr) library->choose(library_forward_pointers(i), stream_);
    };
  };
  std::vector<Engines::Way> forward{{"two kernels", forward_by(false, {}, nullptr)}};
  if (forward_rows) forward.push_back({"one kernel", forward_by(false, forward_rows, nullptr)});
  if (before.forward_with_sums != nullptr)
    forward.push_back({"sums", forward_by(true, {}, nullptr)});
  if (library_forward != nullptr)
    forward.push_back({kLibrary, forward_by(false, {}, library_forward)});
  const auto run_forward_way = [&] {
    if (before.forward != nullptr) run_convolution(from);
    run_batch_norm(i);
  };
  engines_.take_fastest(describe_norm("forward", i), forward, stream_, run_forward_way, [&] {
    Engines::Results left = statistics_left(i);
    if (!work.pooled) left.push_back(numbers_left(outputs_[i]));
    return left;
  });

  const auto backward_by = [&](std::optional<int> kept, EnginePlan* library) {
    return [&, kept, library] {
      work.kept_backward = kept;
      work.library_backward = library;
      if (library != nullptr) library->choose(library_backward_pointers(i), stream_);
    };
  };
  std::vector<Engines::Way> backward{{"two kernels", backward_by({}, nullptr)}};
  if (backward_rows) backward.push_back({"one kernel", backward_by(backward_rows, nullptr)});
  if (library_backward != nullptr)
    backward.push_back({kLibrary, backward_by({}, library_backward)});
  const auto run_backward_way = [&] { run_batch_norm_backward(i); };
  engines_.take_fastest(describe_norm("backward", i), backward, stream_, run_backward_way,
                        [&]() -> Engines::Results {
                          if (before.forward == nullptr)
                            return {};  // nothing makes x again that dx has replaced
                          run_forward_way();
                          // Any gradients with numbers of both signs.
                          for (const Gradient& dy : work.dy)
                            if (dy.values != nullptr)
                              copy_on_device(dy.values, input_of(i), input(i));
                          run_backward_way();
                          return gradients_left(i);
                        });
}

// Of batch-norm i forward and backward, where one kernel may do it. Blocks that wait for each
// other hold their places meanwhile, so that no two such kernels should run at once: those of the
// main lane follow each other.
template <typename T>
template <typename N>
std::pair<std::optional<int>, std::optional<int>> NetworkOf<T>::rows_to_keep(size_t i) const {
  const Node& node = nodes_[i];
  const Work& work = work_[i];
  if (work.lane != Lane::main) return {};
  const BatchNormScratch& scratch = memory_[0].scratch;
  std::optional<int> forward;
  if (!work.pooled) {
    forward = forward_rows_to_keep<N>(cooperative_, work.norm.rows, work.norm.channels, scratch);
  }
  return {forward, backward_rows_to_keep<N>(cooperative_, work.norm.rows, work.norm.channels,
                                            node.activation == Activation::relu, node.residual >= 0,
                                            scratch)};
}

// Whether convolution i applies the batch-norm before it, whose map then is never written: timed
// from the convolution before that one to the batch-norm behind i, to which the sums come with
// it, and with the weights' gradient.
template <typename T>
void NetworkOf<T>::choose_applied(size_t i) {
  const auto norm = static_cast<size_t>(nodes_[i].input);
  const auto first = static_cast<size_t>(nodes_[norm].input);
  const auto reader = std::find_if(nodes_.begin(), nodes_.end(), [&](const Node& node) {
    return node.input == static_cast<int>(i);
  });
  if (reader == nodes_.end() || reader->op != Op::batch_norm) return;
  const auto last = static_cast<size_t>(reader - nodes_.begin());
  if (work_[last].pooled) return;  // the max-pool does not take sums
  const bool first_sums = work_[first].with_sums, own_sums = work_[i].with_sums;
  const Work norm_apart = work_[norm], last_apart = work_[last];
  const auto applied = [&](bool is) {
    return [&, is] {
      work_[norm].applied = is;
      for (const auto& [at, apart] : {std::pair{norm, &norm_apart}, std::pair{last, &last_apart}}) {
        work_[at].kept_forward = is ? std::nullopt : apart->kept_forward;
        work_[at].library_forward = is ? nullptr : apart->library_forward;
      }
      work_[first].with_sums = is || first_sums;
      work_[i].with_sums = is || own_sums;
      // What the weights' gradient reads may not be overwritten beside it; the map that is not
      // written has room.
      void* dx = is ? outputs_[norm].values : input_of(norm);
      work_[norm].dx.values = dx;
      work_[first].dy[0].values = dx;
      if (!is) return;
      work_[first].forward_with_sums->choose(forward_pointers(first, true), stream_);
      work_[i].norm_forward->choose(reader_forward_pointers(i), stream_);
      work_[i].norm_weights->choose(reader_weight_pointers(i), stream_);
    };
  };
  engines_.take_fastest(
      work_[i].forward->describe() + " applies the " + describe_norm("forward", norm),
      {{"no", applied(false)}, {"yes", applied(true)}}, stream_,
      [&] {
        run_convolution(first);
        run_batch_norm(norm);
        run_convolution(i);
        run_batch_norm(last);
        run_weight_gradient(i);  // of the output itself, whose place its gradient has
      },
      [&] {
        Engines::Results left = statistics_left(last);
        left.push_back(numbers_left(outputs_[i]));
        left.push_back(numbers_left(static_cast<const T*>(weight_of(i).gradient),
                                    weight_of(i).layout.stored_count()));
        return left;
      });
}

// Whether the gradients of the batch-norm that convolution i reads come with its data gradient.
template <typename T>
void NetworkOf<T>::choose_summed(size_t i) {
  const auto norm = static_cast<size_t>(nodes_[i].input);
  const Work apart = work_[norm];
  const auto summed = [&](bool is) {
    return [&, is] {
      work_[norm].summed = is;
      work_[norm].kept_backward = is ? std::nullopt : apart.kept_backward;
      work_[norm].library_backward = is ? nullptr : apart.library_backward;
      if (is) work_[i].norm_data->choose(reader_data_pointers(i), stream_);
    };
  };
  engines_.take_fastest(
      work_[i].data->describe() + " sums the " + describe_norm("backward", norm),
      {{"no", summed(false)}, {"yes", summed(true)}}, stream_,
      [&] {
        run_data_gradient(i);
        run_batch_norm_backward(norm);
      },
      [&] {
        run_convolution(static_cast<size_t>(nodes_[norm].input));
        run_batch_norm(norm);
        run_convolution(i);
        run_data_gradient(i);
        run_batch_norm_backward(norm);
        return gradients_left(norm);
      });
}

// Of cuDNN's engines for batch-norms those that a layer has taken stay: a session that looks up
// what another has timed makes no others, and is to be described as that one.
template <typename T>
void NetworkOf<T>::drop_library() {
  engines_.keep([this](const EnginePlan& plan) {
    return std::any_of(work_.begin(), work_.end(), [&](const Work& work) {
      const auto plans = {work.forward,   work.forward_with_sums, work.data,
                          work.weights,   work.norm_forward,      work.norm_weights,
                          work.norm_data, work.library_forward,   work.library_backward};
      return std::find(plans.begin(), plans.end(), &plan) != plans.end();
    });
  });
}

// Whether the lanes run beside each other, which changes no bit: large maps may fill the GPU one
// by one, and then only take each other's place in its caches. And whether batch-norms that are
// faster as one kernel, ours or cuDNN's, stay so: all its blocks need a place at once, which
// other lanes may hold.
template <typename T>
void NetworkOf<T>::choose_lanes() {
  const auto lanes = [this](bool beside, bool blocks_wait) {
    return [=, this] {
      beside_ = beside;
      blocks_wait_ = blocks_wait;
    };
  };
  std::vector<Engines::Way> ways{{"beside", lanes(true, true)}};
  if (!deterministic_) ways.push_back({"in turn", lanes(false, true)});
  if (std::any_of(work_.begin(), work_.end(), [](const Work& work) {
        return work.kept_forward.has_value() || work.kept_backward.has_value() ||
               work.library_forward != nullptr || work.library_backward != nullptr;
      }))
    ways.push_back({"beside, two kernels", lanes(true, false)});
  engines_.take_fastest(
      "lanes of " + engines(), ways, stream_, [this] { run_passes(); },
      [] { return Engines::Results(); });  // the same work in another order
}

// What is timed.
template <typename T>
std::string NetworkOf<T>::describe_norm(const std::string& direction, size_t i) const {
  const Node& node = nodes_[i];
  const Work& before = work_[static_cast<size_t>(node.input)];
  return direction + " of batch-norm [" + std::to_string(outputs_[i].rows) + ", " +
         std::to_string(outputs_[i].channels) + "], " +
         kNumberNames[static_cast<int>(outputs_[i].vector ? NumberType::fp32 : number_type<T>())] +
         (node.activation == Activation::relu ? ", ReLU" : "") +
         (node.residual >= 0 ? ", residual" : "") +
         (outputs_[i].readers == 2 ? ", two gradients" : "") +
         (before.forward != nullptr ? " after " + before.forward->describe() : "");
}

template <typename T>
template <typename N>
std::vector<float> NetworkOf<T>::numbers_left(const N* values, int64_t count) const {
  // Some from all of it tell enough, to its very end.
  constexpr int64_t kPieces = 16, kPiece = 4096;
  const int64_t pieces = count <= kPieces * kPiece ? 1 : kPieces;
  std::vector<N> some(static_cast<size_t>(pieces == 1 ? count : kPiece));
  std::vector<float> numbers;
  for (int64_t i = 0; i < pieces; ++i) {
    read_device(values + (pieces == 1 ? 0 : i * (count - kPiece) / (pieces - 1)), some, stream_);
    for (const N x : some) numbers.push_back(to_float(x));
  }
  return numbers;
}

template <typename T>
std::vector<float> NetworkOf<T>::numbers_left(const Output& output) const {
  return output.vector ? numbers_left(static_cast<const float*>(output.values), output.count())
                       : numbers_left(static_cast<const T*>(output.values), output.count());
}

template <typename T>
Engines::Results NetworkOf<T>::statistics_left(size_t norm) const {
  const BatchNorm& of = work_[norm].norm;
  return {numbers_left(of.mean, of.channels), numbers_left(of.inverse_deviation, of.channels)};
}

template <typename T>
Engines::Results NetworkOf<T>::gradients_left(size_t norm) const {
  const Work& work = work_[norm];
  Engines::Results left{
      numbers_left(work.norm_gradient.beta, work.norm.channels),
      numbers_left(static_cast<const T*>(work.dx.values), outputs_[norm].count())};
  if (work.norm_gradient.gamma != nullptr)
    left.push_back(numbers_left(work.norm_gradient.gamma, work.norm.channels));
  return left;
}

template <typename T>
void NetworkOf<T>::copy_on_device(void* to, const void* from, const Output& of) const {
  const size_t bytes = static_cast<size_t>(of.count()) * (of.vector ? sizeof(float) : sizeof(T));
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_.get()),
        "the copy of a map");
}

}  // namespace hardmine::cuda
