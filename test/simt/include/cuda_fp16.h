// Stand-in for the CUDA toolkit's header: IEEE half precision, rounded to nearest even.
#pragma once

#include "test/simt/simt.h"

struct __half {
  uint16_t bits = 0;
  __half() = default;
  __half(float value);
  operator float() const;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float value) {
  const uint32_t f = simt::from_bits<uint32_t>(simt::to_bits(value));
  const uint16_t sign = static_cast<uint16_t>(f >> 16 & 0x8000U);
  const uint32_t magnitude = f & 0x7FFFFFFFU;
  __half h;
  if (magnitude > 0x7F800000U) {
    h.bits = static_cast<uint16_t>(sign | 0x7FFFU);
  } else if (magnitude >= 0x477FF000U) {  // rounds to 65536 or more
    h.bits = static_cast<uint16_t>(sign | 0x7C00U);
  } else if (magnitude < 0x38800000U) {  // below 2^-14: a subnormal is a multiple of 2^-24
    // rint uses the current rounding mode, nearest even.
    h.bits = static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(
                                              std::ldexp(simt::from_bits<float>(magnitude), 24))));
  } else {
    const uint32_t rounded = magnitude + 0xFFFU + (magnitude >> 13 & 1U);
    h.bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
  }
  return h;
}
inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000U) << 16;
  const uint32_t exponent = h.bits >> 10 & 0x1FU, mantissa = h.bits & 0x3FFU;
  if (exponent == 0x1F) return simt::from_bits<float>(sign | 0x7F800000U | mantissa << 13);
  if (exponent == 0) {
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  return simt::from_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline __half::__half(float value) : bits(__float2half_rn(value).bits) {}
inline __half::operator float() const {
  return __half2float(*this);
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
