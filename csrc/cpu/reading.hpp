// Arguments of the ops as Python hands them over: tuples in the order of ops.hpp's structs.
#pragma once

#include "../reader.hpp"
#include "ops.hpp"

namespace fused_dni {

inline LayerArguments read_layer(const py::tuple& items) {
  Reader read(items);
  LayerArguments a;
  a.rows = read.integer();
  a.in = read.integer();
  a.out = read.integer();
  a.threads = static_cast<int>(read.integer());
  a.normalization = static_cast<int>(read.integer());
  a.activation = static_cast<int>(read.integer());
  a.eps = read.real();
  a.momentum = read.real();
  a.training = read.flag();
  a.weight = read.memory("weight");
  a.bias = read.pointer();
  a.norm_weight = read.pointer();
  a.norm_bias = read.pointer();
  a.running_mean = read.pointer();
  a.running_var = read.pointer();
  read.finish();
  return a;
}

// Class indices are addresses too: they are looked at here, before anything is changed.
inline SynthesizerArguments read_synthesizer(const py::tuple& items, std::int64_t rows) {
  Reader read(items);
  SynthesizerArguments a;
  a.kind = static_cast<int>(read.integer());
  a.rank = read.integer();
  a.classes = read.integer();
  a.weight = read.memory("the synthesizer's weight");
  a.down = read.pointer();
  a.context_weight = read.pointer();
  a.bias = read.pointer();
  a.table = read.pointer<const void>();
  a.narrow = read.flag();
  a.ignored = read.integer();
  a.labels = read.pointer<const std::int64_t>();
  a.vectors = read.pointer<const void>();
  read.finish();
  a.counted = 0;
  for (std::int64_t n = 0; a.labels && n < rows; ++n) {
    if (a.table && a.labels[n] == a.ignored) continue;
    ++a.counted;
    if (a.labels[n] < 0 || a.labels[n] >= a.classes)
      throw py::index_error("class index " + std::to_string(a.labels[n]) + " (row " +
                            std::to_string(n) + ") is outside [0, " + std::to_string(a.classes) +
                            ")");
  }
  return a;
}

// The first row whose target is neither one of the classes nor `ignored`; `rows` if there is none.
// `counted` is how many rows before that are not ignored.
inline std::int64_t check_targets(const std::int64_t* target, std::int64_t rows,
                                  std::int64_t classes, std::int64_t ignored,
                                  std::int64_t& counted) {
  counted = 0;
  for (std::int64_t n = 0; n < rows; ++n) {
    if (target[n] == ignored) continue;
    if (target[n] < 0 || target[n] >= classes) return n;
    ++counted;
  }
  return rows;
}

inline RuleArguments read_rule(const py::tuple& items) {
  Reader read(items);
  RuleArguments a;
  a.kind = static_cast<int>(read.integer());
  a.nesterov = read.flag();
  a.hyper = read.memory<double>("the rule's state");
  for (void*& moment : a.first) moment = read.pointer();
  for (void*& moment : a.second) moment = read.pointer();
  for (bool& trainable : a.trainable) trainable = read.flag();
  read.finish();
  return a;
}

}  // namespace fused_dni
