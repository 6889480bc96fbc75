// Arguments of the ops as Python hands them over: tuples in the order of ops.hpp's structs.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "ops.hpp"

namespace fused_dni {

namespace py = pybind11;

// Reads the items of a tuple one after another; all of them must be read.
class Reader {
 public:
  explicit Reader(const py::tuple& items) : items_(items.ptr()), size_(PyTuple_GET_SIZE(items_)) {}

  std::int64_t integer() { return checked(PyLong_AsLongLong(next())); }
  double real() { return checked(PyFloat_AsDouble(next())); }
  bool flag() { return checked(PyObject_IsTrue(next())) != 0; }
  template <class T = void>
  T* pointer() {
    return static_cast<T*>(checked(PyLong_AsVoidPtr(next())));
  }
  // That of a tensor with elements: one that is no memory (fake, say) has address 0.
  template <class T = void>
  T* memory(const char* name, std::int64_t elements = 1) {
    T* found = pointer<T>();
    if (found == nullptr && elements != 0)
      throw py::value_error(std::string(name) + " is a tensor without memory");
    return found;
  }
  void finish() const {
    if (at_ != size_) throw py::type_error("too many items in an argument tuple");
  }

 private:
  PyObject* next() {
    if (at_ == size_) throw py::type_error("too few items in an argument tuple");
    return PyTuple_GET_ITEM(items_, at_++);
  }
  template <class T>
  static T checked(T value) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  PyObject* items_;
  Py_ssize_t size_, at_ = 0;
};

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
