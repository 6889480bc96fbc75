// The linear layer's ops on a GPU: arguments and launchers. linear.cuh has the kernel.
#pragma once

#include <cstddef>

#include "barrier.hpp"
#include "matrix.hpp"
#include "status.hpp"
#include "synthesizer.hpp"

namespace fused_dni::cuda {

// In the order of fused_dni.ops.types.NORMALIZATIONS.
enum Normalization : int { kNoNormalization, kBatchNormalization, kLayerNormalization };
// Where a synthetic gradient arrives: at h, or at z (fused_dni.ops.types.INTERFACES).
enum Interface : int { kOutput, kPreactivation };

// Null where an op has no use for a tensor. What is of x's type is untyped here.
struct LinearArguments {
  int rows = 0, inputs = 0, outputs = 0;  // N, I, O
  Type type = kFloat32;                   // x's
  bool ieee = false;                      // float32 products in single precision, not TF32

  // The layer.
  Normalization normalization = kNoNormalization;
  bool statistics = false;  // batch normalisation by this batch's, not the running ones
  int activation = 0;
  float eps = 0.0f, momentum = 0.0f;
  Matrix<const void> x;  // [N, I]
  Slot weight, bias, norm_weight, norm_bias;
  float* running_mean = nullptr;  // [O]; moved if `statistics`
  float* running_var = nullptr;

  // Where the gradient at h comes from: a synthesizer, grad_h, or there is none.
  Synthesizer synthesizer;
  Interface interface = kOutput;  // of a synthesizer
  const void* grad_h = nullptr;   // [N, O], of x's type or
  bool grad_wide = false;         // float32
  float inverse_scale = 1.0f;     // 1 / kappa
  float max_norm = 0.0f;

  // The rule. Without one, gradients go to the slots' `gradient`.
  int rule = -1;
  bool nesterov = false;
  double* hyper = nullptr;
  bool trainable[4] = {};
  // Gradients that are given to an update, [O].
  const float* given_bias = nullptr;
  const float* given_norm_weight = nullptr;
  const float* given_norm_bias = nullptr;

  // Results.
  void* h = nullptr;            // [N, O]
  bool forward = false;         // h is made here
  float* normalized = nullptr;  // [N, O]
  float* rstd = nullptr;        // [O] or [N]
  float* scaled = nullptr;      // [N, O]: M(h)
  float* delta = nullptr;       // [N, O]: the gradient at z; read by an update
  void* dx = nullptr;           // [N, I]

  Barrier barrier;

  // Workspace: see divide in linear.cuh.
  double* step = nullptr;
  double* squares = nullptr;
  float* largest = nullptr;
  float* z = nullptr;  // [N, O]: for normalize to read
  float* moments = nullptr;
  float* batch = nullptr;
  float* gradient = nullptr;
  float* columns = nullptr;
  float* across = nullptr;
  float* shifts = nullptr;
  void* operand = nullptr;
};

// Whether a backward reads `normalized`: the derivative of the activation is not a function of h.
bool keeps_input(const LinearArguments& arguments);

// What `room` must have, in bytes.
std::size_t linear_workspace(const LinearArguments& arguments);

// One cooperative launch of all that the arguments ask for.
struct LinearLaunch {
  LinearArguments arguments;
  void* room;
  void* stream;
};
Status linear(const LinearLaunch& launch);

}  // namespace fused_dni::cuda
