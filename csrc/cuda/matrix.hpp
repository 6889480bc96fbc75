// Matrices in a device's memory, as an op's arguments describe them.
#pragma once

#include <cstdint>

namespace fused_dni::cuda {

// Types of elements; fused_dni/backends/cuda/calls.py has the same table (a test compares).
enum Type : int { kFloat32, kBfloat16, kFloat16, kFloat64, kInt64, kInt32, kBool, kUint8 };

// Row-major: element (r, c) lies at data[r * stride + c]. Vectors are plain addresses.
template <class T>
struct Matrix {
  T* data = nullptr;
  std::int64_t stride = 0;
};

// A parameter with its moments, null where the rule keeps none; without a rule the gradient goes to
// `gradient`.
struct Slot {
  float* parameter = nullptr;
  float* first = nullptr;
  float* second = nullptr;
  float* gradient = nullptr;
};

}  // namespace fused_dni::cuda
