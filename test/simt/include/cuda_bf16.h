// Stand-in for the CUDA toolkit's header: bfloat16, rounded to nearest even.
#pragma once

#include "test/simt/simt.h"

struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value);
  operator float() const;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t f = simt::from_bits<uint32_t>(simt::to_bits(value));
  __nv_bfloat16 b;
  if ((f & 0x7FFFFFFFU) > 0x7F800000U) {
    b.bits = 0x7FFFU;
  } else {
    b.bits = static_cast<uint16_t>((f + 0x7FFFU + (f >> 16 & 1U)) >> 16);
  }
  return b;
}
inline float __bfloat162float(__nv_bfloat16 b) {
  return simt::from_bits<float>(static_cast<uint32_t>(b.bits) << 16);
}
inline __nv_bfloat16::__nv_bfloat16(float value) : bits(__float2bfloat16_rn(value).bits) {}
inline __nv_bfloat16::operator float() const {
  return __bfloat162float(*this);
}
