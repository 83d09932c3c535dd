// Ends the process after a test that loses the device: all after it would fail for that alone. run.mjs
// goes on with the next one in another process.
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cstdlib>
#include <iostream>

namespace {

struct LostDevice : doctest::IReporter {
  explicit LostDevice(const doctest::ContextOptions& /*options*/) {}
  void test_case_end(const doctest::CurrentTestCaseStats& /*stats*/) override {
    const cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess || error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver)
      return;  // the last: without any driver too
    std::cout << "the device is lost: " << cudaGetErrorString(error) << std::endl;
    std::_Exit(3);
  }
  void report_query(const doctest::QueryData& /*query*/) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats& /*stats*/) override {}
  void test_case_start(const doctest::TestCaseData& /*test*/) override {}
  void test_case_reenter(const doctest::TestCaseData& /*test*/) override {}
  void test_case_exception(const doctest::TestCaseException& /*exception*/) override {}
  void subcase_start(const doctest::SubcaseSignature& /*subcase*/) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData& /*assertion*/) override {}
  void log_message(const doctest::MessageData& /*message*/) override {}
  void test_case_skipped(const doctest::TestCaseData& /*test*/) override {}
};

}  // namespace

// Before the console's reporter, which prints how long the test took: that line counts ended tests.
DOCTEST_REGISTER_LISTENER("lost-device", 1, LostDevice);
