// Counter-based random numbers: value = f(seed, stream, index), so that any element can be drawn
// without the ones before it, by any thread, on any device.
#pragma once

#include <cmath>
#include <cstdint>

namespace hardmine {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that mixes well.
constexpr uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

// 64 random bits of element `index` of `stream` under `seed`.
constexpr uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
  return mix64(mix64(mix64(seed) ^ stream) ^ index);
}

// Uniform in [0, 1) with 53 random bits.
constexpr double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return static_cast<double>(random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

// Standard normal by Box and Muller's transform, two uniforms each.
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  const double u = 1.0 - random_uniform(seed, stream, 2 * index);  // in (0, 1]: the log is finite
  const double v = random_uniform(seed, stream, 2 * index + 1);
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
}

__extension__ using Uint128 = unsigned __int128;  // GCC's and nvcc's; not of ISO C++

// Uniform integer in [0, bound) by the multiply-shift of Lemire (2019); the bias, below
// bound / 2^64, is smaller than any run could see.
constexpr uint64_t random_below(uint64_t bits, uint64_t bound) {
  return static_cast<uint64_t>((static_cast<Uint128>(bits) * bound) >> 64);
}

// FNV-1a of a name: the stream of a named parameter.
constexpr uint64_t stream_of(const char* name) {
  uint64_t hash = 0xCBF29CE484222325ULL;
  for (; *name != '\0'; ++name) hash = (hash ^ static_cast<uint8_t>(*name)) * 0x100000001B3ULL;
  return hash;
}

}  // namespace hardmine
