// The emulator's own tests: what it must compute, and every misuse that it must catch.
#include "test/simt/simt.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <numeric>

namespace {

void run(dim3 grid, dim3 block, const std::function<void()>& kernel, uint64_t seed = 1) {
  simt::launch(grid, block, 1024, kernel, seed);
}

float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0U, value, offset);
  return value;
}

std::string fault_of(const std::function<void()>& kernel, dim3 grid = 1,
                     simt::Blocks kind = simt::Blocks::independent) {
  try {
    simt::launch(grid, 64, 1024, kernel, 1, kind);
  } catch (const simt::Fault& fault) {
    return fault.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("a block-wide sum through shuffles, shared memory and barriers") {
  simt::Buffer<float> in(std::vector<float>(4 * 96), "in");
  std::iota(in.data(), in.data() + in.size(), 0.0F);
  simt::Buffer<float> out(4, "out");
  for (const uint64_t seed : {1, 2, 3}) {
    out.fill(-1);
    run(
        4, 96,
        [&] {
          auto* partial = static_cast<float*>(simt::Block::current->dynamic_shared());
          const float sum = warp_sum(in.data()[blockIdx.x * 96 + threadIdx.x]);
          if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
          __syncthreads();
          if (threadIdx.x == 0) out.data()[blockIdx.x] = partial[0] + partial[1] + partial[2];
        },
        seed);
    for (int b = 0; b < 4; ++b)
      CHECK(out[static_cast<size_t>(b)] == static_cast<float>(96 * 96 * b + 95 * 48));
  }
  out.check();
}

TEST_CASE("votes, shuffles by index, up and down, partial warps") {
  simt::Buffer<int> out(6 * 32, "out");
  run(1, 32, [&] {
    const int lane = static_cast<int>(threadIdx.x);
    int* row = out.data() + lane;
    row[0] = static_cast<int>(__ballot_sync(~0U, lane % 2));
    row[32] = __shfl_sync(~0U, lane, 5);
    row[64] = __shfl_up_sync(~0U, lane, 1);
    row[96] = __shfl_down_sync(~0U, lane, 2);
    row[128] = __all_sync(~0U, lane >= 0) + 10 * __any_sync(~0U, lane > 31);
    row[160] = __shfl_xor_sync(~0U, lane, 3);
  });
  for (int i = 0; i < 32; ++i) {
    const size_t at = static_cast<size_t>(i);
    CHECK(out[at] == static_cast<int>(0xAAAAAAAAU));
    CHECK(out[32 + at] == 5);
    CHECK(out[64 + at] == std::max(i - 1, 0));
    CHECK(out[96 + at] == (i + 2 < 32 ? i + 2 : i));
    CHECK(out[128 + at] == 1);
    CHECK(out[160 + at] == (i ^ 3));
  }
}

TEST_CASE("misuse is a fault") {
  simt::Buffer<float> data(100, "data");
  CHECK(fault_of([] {
          if (threadIdx.x < 40) __syncthreads();
        }).find("not every lane reaches a barrier") == 0);
  const auto two_barriers = [] {
    if (threadIdx.x < 40)
      __syncthreads();
    else
      __syncthreads();
  };
  CHECK(fault_of(two_barriers).find("different barriers") != std::string::npos);
  CHECK(fault_of([] {
          if (threadIdx.x % 32 < 16) __shfl_sync(~0U, 1, 0);
        }).find("has exited") != std::string::npos);
  CHECK(fault_of([] { __shfl_sync(1U, 1, 0); }).find("leaves out its caller") != std::string::npos);
  const auto two_shuffles = [] {
    if (threadIdx.x % 32 < 16)
      __shfl_sync(~0U, 1, 0);
    else
      __shfl_sync(~0U, 1, 0);
  };
  CHECK(fault_of(two_shuffles).find("different warp operations") != std::string::npos);
  CHECK(fault_of([] { __shfl_sync(threadIdx.x % 32 < 16 ? 0xFFFFU : ~0U, 1, 0); }) != "none");
  CHECK(fault_of([] {
          if (threadIdx.x % 32 < 16) __shfl_sync(0xFFFFU, 1, 20);
        }).find("takes no part") != std::string::npos);
  CHECK(fault_of([&] { data.data()[100 + threadIdx.x] = 1; }).find("outside every buffer") !=
        std::string::npos);
  volatile float sink = 0;
  CHECK(fault_of([&] { sink = data.data()[100 + threadIdx.x * 4]; }).find("outside every buffer") !=
        std::string::npos);
  data.data()[-1] = 3;
  CHECK_THROWS_AS(data.check(), simt::Fault);
  const auto dynamic = [] { return static_cast<float*>(simt::Block::current->dynamic_shared()); };
  CHECK(fault_of([&] { dynamic()[256 + threadIdx.x] = 1; }).find("outside every buffer") !=
        std::string::npos);
  CHECK(fault_of([&] { dynamic()[-1] = 1; }) ==
        "a write before the start of dynamic shared memory");
}

TEST_CASE("blocks of a cooperative launch wait for each other") {
  constexpr unsigned kBlocks = 5, kThreads = 96;
  simt::Buffer<unsigned> arrived(1, "arrived"), values(kBlocks * kThreads, "values"),
      out(kBlocks * kThreads, "out");
  for (const uint64_t seed : {1, 2, 3}) {
    arrived.fill(0);
    values.fill(0);
    simt::launch(
        kBlocks, kThreads, 4 * kThreads,
        [&] {
          // Shared memory is a block's own while others are at work.
          auto* shared = static_cast<unsigned*>(simt::Block::current->dynamic_shared());
          const unsigned self = blockIdx.x * kThreads + threadIdx.x;
          shared[threadIdx.x] = self;
          values.data()[self] = self + 1;
          __syncthreads();
          if (threadIdx.x == 0) {
            atomicAdd(arrived.data(), 1U);
            while (*static_cast<volatile unsigned*>(arrived.data()) != kBlocks) __nanosleep(1);
          }
          __syncthreads();
          unsigned sum = shared[(threadIdx.x + 1) % kThreads];
          for (unsigned b = 0; b < kBlocks; ++b) sum += values.data()[b * kThreads + threadIdx.x];
          out.data()[self] = sum;
        },
        seed, simt::Blocks::cooperative);
    size_t wrong = 0;
    for (unsigned i = 0; i < kBlocks * kThreads; ++i) {
      const unsigned thread = i % kThreads;
      const unsigned sum = kBlocks * (thread + 1) + kThreads * kBlocks * (kBlocks - 1) / 2;
      wrong += out[i] != sum + i - thread + (thread + 1) % kThreads;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("blocks that wait for ever are a fault") {
  simt::Buffer<unsigned> arrived(std::vector<unsigned>{0}, "arrived");
  const auto wait_for = [&](unsigned blocks) {
    if (threadIdx.x == 0) {
      atomicAdd(arrived.data(), 1U);
      while (*static_cast<volatile unsigned*>(arrived.data()) < blocks) __nanosleep(1);
    }
    __syncthreads();
  };
  CHECK(fault_of([&] { wait_for(2); }, 2, simt::Blocks::cooperative) == "none");
  arrived.fill(0);
  CHECK(fault_of([&] { wait_for(3); }, 2, simt::Blocks::cooperative) ==
        "blocks wait for each other for ever");
  arrived.fill(0);
  CHECK(fault_of([&] { wait_for(2); }, 2) ==
        "a block waits for another, but the launch is not cooperative");
  // A lane may wait for another of its block.
  arrived.fill(0);
  CHECK(fault_of([&] {
          if (threadIdx.x == 40) arrived.data()[0] = 1;
          while (*static_cast<volatile unsigned*>(arrived.data()) == 0) __nanosleep(1);
        }) == "none");
}

TEST_CASE("shared memory starts as NaN in every block") {
  simt::Buffer<int> out(3, "out");
  run(3, 32, [&] {
    auto* shared = static_cast<float*>(simt::Block::current->dynamic_shared());
    if (threadIdx.x == 0) {
      out.data()[blockIdx.x] = std::isnan(shared[7]);
      shared[7] = 1;
    }
  });
  CHECK(out.values() == std::vector<int>{1, 1, 1});
}

TEST_CASE("16-bit types round to nearest even and survive the round trip") {
  // Every half and bfloat16 that is no NaN converts to float and back to itself.
  for (unsigned bits = 0; bits < 65536; ++bits) {
    __half h;
    h.bits = static_cast<uint16_t>(bits);
    if ((bits & 0x7FFFU) <= 0x7C00U) REQUIRE(__float2half_rn(__half2float(h)).bits == bits);
    __nv_bfloat16 b;
    b.bits = static_cast<uint16_t>(bits);
    if ((bits & 0x7FFFU) <= 0x7F80U) REQUIRE(__float2bfloat16_rn(__bfloat162float(b)).bits == bits);
  }
  CHECK(__half2float(__float2half_rn(1.0F + 0x1p-11F)) == 1.0F);            // tie to even
  CHECK(__half2float(__float2half_rn(1.0F + 0x3p-11F)) == 1.0F + 0x1p-9F);  // tie to even, up
  CHECK(std::isinf(__half2float(__float2half_rn(65520.0F))));
  CHECK(__half2float(__float2half_rn(65519.0F)) == 65504.0F);
  CHECK(__half2float(__float2half_rn(0x1p-25F)) == 0.0F);
  CHECK(__half2float(__float2half_rn(0x1.8p-25F)) == 0x1p-24F);
  CHECK(__bfloat162float(__float2bfloat16_rn(1.0F + 0x1p-8F)) == 1.0F);
}
