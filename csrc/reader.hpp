// How bindings read what Python hands over: the items of an argument tuple.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

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

 protected:
  PyObject* next() {
    if (at_ == size_) throw py::type_error("too few items in an argument tuple");
    return PyTuple_GET_ITEM(items_, at_++);
  }

 private:
  template <class T>
  static T checked(T value) {
    if (PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  PyObject* items_;
  Py_ssize_t size_, at_ = 0;
};

}  // namespace fused_dni
