// What the bindings share: argument tuples are read and every tensor is held against what the op
// takes, before anything is launched; a Status becomes a Python exception.
//
// A tensor comes as None or as (address, type, sizes ..., strides ...), see `described` in
// fused_dni/backends/cuda/calls.py. What it must be like stands where it is read: a TypeError or
// ValueError names the argument, what was given and what is taken.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "../reader.hpp"
#include "barrier.hpp"
#include "matrix.hpp"
#include "status.hpp"

namespace fused_dni::cuda {

// ---- Errors of launches ---------------------------------------------------------------------------

// The module's CudaError, a RuntimeError with `name` (the error's, in CUDA) and `code`.
inline PyObject*& cuda_error() {
  static PyObject* type = nullptr;
  return type;
}
inline void bind_error(py::module_& m) {
  cuda_error() = PyErr_NewExceptionWithDoc("fused_dni.CudaError", "What CUDA reports of a launch.",
                                           PyExc_RuntimeError, nullptr);
  if (!cuda_error()) throw py::error_already_set();
  m.attr("CudaError") = py::handle(cuda_error());
}

// "linear_step (x [2, 3], weight [4, 3])": of an op's name and what it works on.
using Sizes = std::initializer_list<std::int64_t>;
inline std::string list(const std::int64_t* begin, const std::int64_t* end) {
  std::string text = "[";
  for (const std::int64_t* at = begin; at != end; ++at)
    text += (at == begin ? "" : ", ") + std::to_string(*at);
  return text + "]";
}
inline std::string describe(const char* op,
                            std::initializer_list<std::pair<const char*, Sizes>> tensors) {
  std::string text = op;
  const char* before = " (";
  for (const auto& [name, sizes] : tensors) {
    text += before + std::string(name) + " " + list(sizes.begin(), sizes.end());
    before = ", ";
  }
  return text + ")";
}

inline void check(const Status& status, const std::string& what) {
  if (status.ok()) return;
  const py::handle type(cuda_error());
  // Whatever is called behind a launch that gave up fails because of it.
  const std::string stalled = status.lost ? stalled_text() : "";
  const py::object error =
      type(what + ": " + status.name + ": " + (stalled.empty() ? status.text : stalled));
  error.attr("name") = status.name;
  error.attr("code") = status.code;
  PyErr_SetObject(type.ptr(), error.ptr());
  throw py::error_already_set();
}

// Runs a launcher, `Status op(const A&)`; other Python threads go on, but in the emulation, which
// is one machine for all of them.
template <class A>
void run(Status (*op)(const A&), const A& arguments, const std::string& what) {
  Status status;
  {
#if !defined(FUSED_DNI_EMULATED)
    const py::gil_scoped_release release;
#endif
    status = op(arguments);
  }
  check(status, what);
}

// ---- Tensors --------------------------------------------------------------------------------------

struct TypeInfo {
  const char* name;
  std::int64_t size;
};
inline constexpr TypeInfo kTypes[] = {{"float32", 4}, {"bfloat16", 2}, {"float16", 2},
                                      {"float64", 8}, {"int64", 8},    {"int32", 4},
                                      {"bool", 1},    {"uint8", 1}};
inline constexpr int kTypeCount = sizeof(kTypes) / sizeof(kTypes[0]);

template <class T>
constexpr Type type_of();
template <>
constexpr Type type_of<float>() {
  return kFloat32;
}
template <>
constexpr Type type_of<double>() {
  return kFloat64;
}
template <>
constexpr Type type_of<std::int64_t>() {
  return kInt64;
}
template <>
constexpr Type type_of<std::int32_t>() {
  return kInt32;
}
template <>
constexpr Type type_of<bool>() {
  return kBool;
}

enum Need { kRequired, kOptional, kAbsent };

// Of four dimensions at most; without an address if it was None.
struct Tensor {
  void* data = nullptr;
  Type type = kFloat32;
  std::int64_t stride = 0;  // of rows, if it is a matrix

  explicit operator bool() const { return data != nullptr; }
  template <class T>
  T* vector() const {
    return static_cast<T*>(data);
  }
  template <class T>
  Matrix<T> matrix() const {
    return {static_cast<T*>(data), stride};
  }
};

// With what the ops here take: tensors that are held against a type, sizes and strides.
class Reader : public fused_dni::Reader {
 public:
  using fused_dni::Reader::integer;
  using fused_dni::Reader::Reader;

  py::tuple tuple() {
    PyObject* item = next();
    if (!PyTuple_Check(item)) throw py::type_error("an argument tuple lacks a tuple");
    return py::reinterpret_borrow<py::tuple>(item);
  }
  // An integer in [least, most]: a kind, a size.
  std::int64_t integer(const char* name, std::int64_t least, std::int64_t most) {
    const std::int64_t value = integer();
    if (value < least || value > most)
      throw py::value_error(std::string(name) + ": got " + std::to_string(value) + ", takes " +
                            std::to_string(least) + " to " + std::to_string(most));
    return value;
  }

  // A tensor of these sizes and one of these types. Its elements are contiguous, or, of a matrix
  // that may be `strided`, those of each row.
  Tensor tensor(const char* name, std::initializer_list<Type> types, Sizes sizes,
                Need need = kRequired, bool strided = false) {
    PyObject* item = next();
    if (item == Py_None) {
      if (need == kRequired) throw py::type_error(std::string(name) + ": got None, takes a tensor");
      return {};
    }
    if (need == kAbsent) throw py::type_error(std::string(name) + ": got a tensor, takes None");
    const auto dims = static_cast<std::int64_t>(sizes.size());
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) < 2)
      throw py::type_error(std::string(name) + ": takes (address, type, sizes, strides) or None");
    Reader read(py::reinterpret_borrow<py::tuple>(item));
    Tensor made;
    made.data = read.pointer();
    const std::int64_t type = read.integer();
    made.type = static_cast<Type>(type);
    require_type(name, type, types);
    const std::int64_t given = (PyTuple_GET_SIZE(item) - 2) / 2;
    std::int64_t size[kMostDimensions], stride[kMostDimensions];
    if (given > kMostDimensions || given * 2 + 2 != PyTuple_GET_SIZE(item))
      throw py::type_error(std::string(name) + ": takes as many strides as sizes, up to " +
                           std::to_string(kMostDimensions));
    for (std::int64_t i = 0; i < given; ++i) size[i] = read.integer();
    for (std::int64_t i = 0; i < given; ++i) stride[i] = read.integer();
    bool same = given == dims;
    for (std::int64_t i = 0; same && i < dims; ++i) same = size[i] == sizes.begin()[i];
    if (!same)
      throw py::value_error(std::string(name) + ": got sizes " + list(size, size + given) +
                            ", takes " + list(sizes.begin(), sizes.end()));
    require_strides(name, size, stride, dims, strided);
    made.stride = dims == 2 ? size[0] == 1 ? size[1] : stride[0] : 0;
    const std::int64_t bytes = kTypes[type].size;
    if (!made.data || reinterpret_cast<std::uintptr_t>(made.data) % bytes != 0)
      throw py::value_error(std::string(name) + ": got address " +
                            std::to_string(reinterpret_cast<std::uintptr_t>(made.data)) +
                            ", takes a multiple of " + std::to_string(bytes) + " other than 0");
    return made;
  }

  // [rows, columns] whose rows may lie apart.
  template <class T>
  Matrix<T> matrix(const char* name, std::int64_t rows, std::int64_t columns,
                   Need need = kRequired) {
    return tensor(name, {type_of<T>()}, {rows, columns}, need, true).template matrix<T>();
  }
  // Contiguous, of any shape.
  template <class T>
  T* contiguous(const char* name, Sizes sizes, Need need = kRequired) {
    return tensor(name, {type_of<T>()}, sizes, need).template vector<T>();
  }
  template <class T>
  T* vector(const char* name, std::int64_t size, Need need = kRequired) {
    return contiguous<T>(name, {size}, need);
  }

  // The grid's barrier, of a launch that is called `what`.
  Barrier barrier(const std::string& what) {
    return barrier_of(vector<std::int32_t>("barrier", 1), what);
  }

 private:
  static constexpr int kMostDimensions = 4;

  static void require_type(const char* name, std::int64_t type, std::initializer_list<Type> types) {
    std::string allowed;
    for (const Type t : types) {
      if (type == t) return;
      allowed += (allowed.empty() ? "" : " or ") + std::string(kTypes[t].name);
    }
    const bool known = type >= 0 && type < kTypeCount;
    throw py::type_error(std::string(name) + ": got " +
                         (known ? kTypes[type].name : "type code " + std::to_string(type)) +
                         ", takes " + allowed);
  }
  static void require_strides(const char* name, const std::int64_t* size,
                              const std::int64_t* stride, std::int64_t dims, bool strided) {
    std::int64_t span = 1;  // of the dimensions behind
    for (std::int64_t i = dims - 1; i >= 0; span *= size[i--]) {
      const bool rows = strided && dims == 2 && i == 0;
      if (size[i] <= 1 || stride[i] == span || (rows && stride[i] > span)) continue;
      throw py::value_error(
          std::string(name) + ": got strides " + list(stride, stride + dims) + " for sizes " +
          list(size, size + dims) + ", takes " +
          (strided ? "rows that are contiguous and do not overlap" : "contiguous elements"));
    }
  }
};

}  // namespace fused_dni::cuda
