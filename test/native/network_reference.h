// A network in plain loops over [n][channel][row][column], in double and written from the formulas
// alone: what every backend's network is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.h"
#include "core/random.h"

namespace hardmine::testing {

using Values = std::vector<double>;

inline std::vector<float> random_floats(size_t count, uint64_t stream, double mean,
                                        double deviation) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(mean + deviation * random_normal(7, stream, i));
  }
  return values;
}

inline std::vector<uint8_t> random_images(int64_t count, int64_t size, uint64_t stream) {
  std::vector<uint8_t> pixels(static_cast<size_t>(count * size * size * 3));
  for (size_t i = 0; i < pixels.size(); ++i) {
    pixels[i] = static_cast<uint8_t>(random_below(random_bits(3, stream, i), 256));
  }
  return pixels;
}

inline size_t count_of(const TensorInfo& tensor) {
  size_t count = 1;
  for (const int64_t side : tensor.shape) count *= static_cast<size_t>(side);
  return count;
}

// Every operation there is, in the shapes of a ResNet but small: stem, pool, a plain block, a block
// with a strided 1x1 beside it, average pool, linear and the batch-norm over the embedding. Channel
// counts that are no multiple of a vector, so that padding and tails are used.
inline std::vector<Node> small_network(int64_t size, int64_t first, int64_t second,
                                       int64_t embedding, bool embedding_norm) {
  std::vector<Node> nodes;
  const auto add = [&](Op op, const char* name, int input, int64_t out, int kernel, int stride,
                       int padding, Activation activation = Activation::none, int residual = -1) {
    Node node;
    node.op = op;
    node.name = name;
    node.input = input;
    node.residual = residual;
    node.in_channels = input < 0 ? 3 : nodes[static_cast<size_t>(input)].out_channels;
    node.out_channels = out;
    node.in_size = input < 0 ? size : nodes[static_cast<size_t>(input)].out_size;
    node.out_size =
        op == Op::global_average_pool ? 1 : (node.in_size + 2 * padding - kernel) / stride + 1;
    node.kernel = kernel;
    node.stride = stride;
    node.padding = padding;
    node.activation = activation;
    nodes.push_back(node);
    return static_cast<int>(nodes.size()) - 1;
  };
  const auto relu = Activation::relu;
  int x = add(Op::convolution, "conv1", -1, first, 7, 2, 3);
  x = add(Op::batch_norm, "bn1", x, first, 1, 1, 0, relu);
  x = add(Op::max_pool, "maxpool", x, first, 3, 2, 1);
  int y = add(Op::convolution, "a.conv1", x, first, 3, 1, 1);
  y = add(Op::batch_norm, "a.bn1", y, first, 1, 1, 0, relu);
  y = add(Op::convolution, "a.conv2", y, first, 3, 1, 1);
  x = add(Op::batch_norm, "a.bn2", y, first, 1, 1, 0, relu, x);
  y = add(Op::convolution, "b.conv1", x, second, 3, 2, 1);
  y = add(Op::batch_norm, "b.bn1", y, second, 1, 1, 0, relu);
  y = add(Op::convolution, "b.conv2", y, second, 3, 1, 1);
  int down = add(Op::convolution, "b.downsample.0", x, second, 1, 2, 0);
  down = add(Op::batch_norm, "b.downsample.1", down, second, 1, 1, 0);
  x = add(Op::batch_norm, "b.bn2", y, second, 1, 1, 0, relu, down);
  x = add(Op::global_average_pool, "avgpool", x, second, 1, 1, 0);
  x = add(Op::linear, "fc", x, embedding, 1, 1, 0);
  if (embedding_norm) {
    add(Op::batch_norm, "embedding_bn", x, embedding, 1, 1, 0);
    nodes.back().fixed_scale = true;
  }
  return nodes;
}

// The reference: values and gradients of every node and parameter in double.
class Reference {
 public:
  Reference(std::vector<Node> nodes, int64_t batch) : nodes_(std::move(nodes)), batch_(batch) {}

  std::map<std::string, Values> parameters;  // and running statistics
  std::map<std::string, Values> gradients;

  const Values& forward(const std::vector<uint8_t>& images, const std::vector<Augmentation>& how,
                        bool training) {
    const int64_t size = nodes_[0].in_size;
    image_.assign(static_cast<size_t>(batch_ * 3 * size * size), 0);
    for (int64_t n = 0; n < batch_; ++n) {
      const Augmentation augmentation = how.empty() ? Augmentation{} : how[static_cast<size_t>(n)];
      for (int64_t r = 0; r < size; ++r) {
        for (int64_t s = 0; s < size; ++s) {
          const int64_t from_r = r - augmentation.dy;
          const int64_t shifted = s - augmentation.dx;
          const bool inside = from_r >= 0 && from_r < size && shifted >= 0 && shifted < size;
          const int64_t from_s = augmentation.mirror != 0 ? size - 1 - shifted : shifted;
          for (int64_t c = 0; c < 3; ++c) {
            const double pixel =
                inside ? images[at(((n * size + from_r) * size + from_s) * 3 + c)] : 0.0;
            image_[at(((n * 3 + c) * size + r) * size + s)] = (pixel - 127.5) / 128;
          }
        }
      }
    }
    outputs_.assign(nodes_.size(), {});
    saved_.assign(nodes_.size(), {});
    for (size_t i = 0; i < nodes_.size(); ++i) forward_node(i, training);
    return outputs_.back();
  }

  void backward(const Values& grad) {
    grads_.assign(nodes_.size(), {});
    for (size_t i = 0; i < nodes_.size(); ++i) grads_[i].assign(outputs_[i].size(), 0);
    grads_.back() = grad;
    for (size_t i = nodes_.size(); i-- > 0;) backward_node(i);
  }

 private:
  struct Saved {
    Values mean, inverse;
    std::vector<int64_t> chosen;
  };

  static size_t at(int64_t index) { return static_cast<size_t>(index); }
  const Values& input_of(const Node& node) const {
    return node.input < 0 ? image_ : outputs_[at(node.input)];
  }

  void forward_node(size_t i, bool training) {
    const Node& node = nodes_[i];
    const Values& x = input_of(node);
    const int64_t in = node.in_size, out = node.out_size, k = node.kernel;
    Values& y = outputs_[i];
    y.assign(at(batch_ * node.out_channels * out * out), 0);
    if (node.op == Op::convolution) {
      const Values& w = parameters.at(node.name + ".weight");
      over_convolution(
          node, [&](int64_t xi, int64_t wi, int64_t yi) { y[at(yi)] += x[at(xi)] * w[at(wi)]; });
    } else if (node.op == Op::linear) {
      const Values& w = parameters.at(node.name + ".weight");
      const Values& b = parameters.at(node.name + ".bias");
      for (int64_t n = 0; n < batch_; ++n) {
        for (int64_t o = 0; o < node.out_channels; ++o) {
          double sum = b[at(o)];
          for (int64_t c = 0; c < node.in_channels; ++c) {
            sum += x[at(n * node.in_channels + c)] * w[at(o * node.in_channels + c)];
          }
          y[at(n * node.out_channels + o)] = sum;
        }
      }
    } else if (node.op == Op::batch_norm) {
      batch_norm(i, x, y, training);
    } else if (node.op == Op::max_pool) {
      saved_[i].chosen.assign(y.size(), 0);
      for (int64_t plane = 0; plane < batch_ * node.out_channels; ++plane) {
        for (int64_t r = 0; r < out; ++r) {
          for (int64_t s = 0; s < out; ++s) {
            double best = -std::numeric_limits<double>::infinity();
            int64_t chosen = -1;
            for (int64_t a = 0; a < k; ++a) {
              for (int64_t b = 0; b < k; ++b) {
                const int64_t p = r * node.stride - node.padding + a;
                const int64_t q = s * node.stride - node.padding + b;
                if (p < 0 || q < 0 || p >= in || q >= in) continue;
                const int64_t xi = (plane * in + p) * in + q;
                if (x[at(xi)] > best) best = x[at(chosen = xi)];
              }
            }
            y[at((plane * out + r) * out + s)] = best;
            saved_[i].chosen[at((plane * out + r) * out + s)] = chosen;
          }
        }
      }
    } else {
      for (int64_t plane = 0; plane < batch_ * node.out_channels; ++plane) {
        for (int64_t p = 0; p < in * in; ++p) y[at(plane)] += x[at(plane * in * in + p)];
        y[at(plane)] /= static_cast<double>(in * in);
      }
    }
  }

  void batch_norm(size_t i, const Values& x, Values& y, bool training) {
    const Node& node = nodes_[i];
    const int64_t pixels = node.out_size * node.out_size, channels = node.out_channels;
    const double count = static_cast<double>(batch_ * pixels);
    Saved& saved = saved_[i];
    saved.mean.assign(at(channels), 0);
    saved.inverse.assign(at(channels), 0);
    Values& running_mean = parameters.at(node.name + ".running_mean");
    Values& running_var = parameters.at(node.name + ".running_var");
    for (int64_t c = 0; c < channels; ++c) {
      double mean = running_mean[at(c)], variance = running_var[at(c)];
      if (training) {
        mean = variance = 0;
        over_channel(c, channels, pixels, [&](int64_t e) { mean += x[at(e)] / count; });
        over_channel(c, channels, pixels,
                     [&](int64_t e) { variance += (x[at(e)] - mean) * (x[at(e)] - mean) / count; });
        running_mean[at(c)] = 0.9 * running_mean[at(c)] + 0.1 * mean;
        running_var[at(c)] = 0.9 * running_var[at(c)] + 0.1 * variance * count / (count - 1);
      }
      saved.mean[at(c)] = mean;
      saved.inverse[at(c)] = 1 / std::sqrt(variance + 1e-5);
      const double gamma = gamma_of(node, c), beta = parameters.at(node.name + ".bias")[at(c)];
      over_channel(c, channels, pixels, [&](int64_t e) {
        double value = (x[at(e)] - mean) * saved.inverse[at(c)] * gamma + beta;
        if (node.residual >= 0) value += outputs_[at(node.residual)][at(e)];
        y[at(e)] = node.activation == Activation::relu ? std::max(value, 0.0) : value;
      });
    }
  }

  double gamma_of(const Node& node, int64_t c) const {
    return node.fixed_scale ? 1.0 : parameters.at(node.name + ".weight")[at(c)];
  }

  void backward_node(size_t i) {
    const Node& node = nodes_[i];
    const Values& x = input_of(node);
    Values g = grads_[i];
    Values none(x.size());
    Values& dx = node.input < 0 ? none : grads_[at(node.input)];
    const int64_t in = node.in_size, pixels = node.out_size * node.out_size;
    if (node.op == Op::convolution) {
      const Values& w = parameters.at(node.name + ".weight");
      Values& dw = gradients[node.name + ".weight"];
      dw.assign(w.size(), 0);
      over_convolution(node, [&](int64_t xi, int64_t wi, int64_t yi) {
        dw[at(wi)] += x[at(xi)] * g[at(yi)];
        dx[at(xi)] += w[at(wi)] * g[at(yi)];
      });
    } else if (node.op == Op::linear) {
      const Values& w = parameters.at(node.name + ".weight");
      Values &dw = gradients[node.name + ".weight"], &db = gradients[node.name + ".bias"];
      dw.assign(w.size(), 0);
      db.assign(at(node.out_channels), 0);
      for (int64_t n = 0; n < batch_; ++n) {
        for (int64_t o = 0; o < node.out_channels; ++o) {
          const double d = g[at(n * node.out_channels + o)];
          db[at(o)] += d;
          for (int64_t c = 0; c < node.in_channels; ++c) {
            dw[at(o * node.in_channels + c)] += d * x[at(n * node.in_channels + c)];
            dx[at(n * node.in_channels + c)] += d * w[at(o * node.in_channels + c)];
          }
        }
      }
    } else if (node.op == Op::batch_norm) {
      if (node.activation == Activation::relu) {
        for (size_t e = 0; e < g.size(); ++e) g[e] = outputs_[i][e] > 0 ? g[e] : 0;
      }
      if (node.residual >= 0) {
        for (size_t e = 0; e < g.size(); ++e) grads_[at(node.residual)][e] += g[e];
      }
      const int64_t channels = node.out_channels;
      const double count = static_cast<double>(batch_ * pixels);
      Values &dgamma = gradients[node.name + ".weight"], &dbeta = gradients[node.name + ".bias"];
      dgamma.assign(at(channels), 0);
      dbeta.assign(at(channels), 0);
      for (int64_t c = 0; c < channels; ++c) {
        const double mean = saved_[i].mean[at(c)], inverse = saved_[i].inverse[at(c)];
        over_channel(c, channels, pixels, [&](int64_t e) {
          dbeta[at(c)] += g[at(e)];
          dgamma[at(c)] += g[at(e)] * (x[at(e)] - mean) * inverse;
        });
        over_channel(c, channels, pixels, [&](int64_t e) {
          const double normal = (x[at(e)] - mean) * inverse;
          dx[at(e)] += gamma_of(node, c) * inverse *
                       (g[at(e)] - dbeta[at(c)] / count - normal * dgamma[at(c)] / count);
        });
      }
      if (node.fixed_scale) gradients.erase(node.name + ".weight");
    } else if (node.op == Op::max_pool) {
      for (size_t e = 0; e < g.size(); ++e) dx[at(saved_[i].chosen[e])] += g[e];
    } else {
      for (int64_t plane = 0; plane < batch_ * node.out_channels; ++plane) {
        for (int64_t p = 0; p < in * in; ++p) {
          dx[at(plane * in * in + p)] += g[at(plane)] / static_cast<double>(in * in);
        }
      }
    }
  }

  template <typename F>
  void over_channel(int64_t c, int64_t channels, int64_t pixels, F f) const {
    for (int64_t n = 0; n < batch_; ++n) {
      for (int64_t p = 0; p < pixels; ++p) f((n * channels + c) * pixels + p);
    }
  }

  template <typename F>
  void over_convolution(const Node& node, F f) const {
    const int64_t in = node.in_size, out = node.out_size, k = node.kernel;
    for (int64_t n = 0; n < batch_; ++n) {
      for (int64_t o = 0; o < node.out_channels; ++o) {
        for (int64_t c = 0; c < node.in_channels; ++c) {
          for (int64_t r = 0; r < out; ++r) {
            for (int64_t s = 0; s < out; ++s) {
              for (int64_t a = 0; a < k; ++a) {
                for (int64_t b = 0; b < k; ++b) {
                  const int64_t p = r * node.stride - node.padding + a;
                  const int64_t q = s * node.stride - node.padding + b;
                  if (p < 0 || q < 0 || p >= in || q >= in) continue;
                  f(((n * node.in_channels + c) * in + p) * in + q,
                    ((o * node.in_channels + c) * k + a) * k + b,
                    ((n * node.out_channels + o) * out + r) * out + s);
                }
              }
            }
          }
        }
      }
    }
  }

  std::vector<Node> nodes_;
  int64_t batch_;
  Values image_;
  std::vector<Values> outputs_, grads_;
  std::vector<Saved> saved_;
};

// || a - b || / || b ||
template <typename A, typename B>
double relative_error(const A& a, const B& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

}  // namespace hardmine::testing
