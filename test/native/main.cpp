#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <iostream>

int main(int count, char** arguments) {
  // What a test that ends the process had found is not lost with it.
  std::cout << std::unitbuf;
  return doctest::Context(count, arguments).run();
}
