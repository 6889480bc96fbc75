// Bindings of the linear layer's and the synthesizer's ops.
//
// Arguments come as nested tuples, which fused_dni/backends/cuda/calls.py makes in the order in which
// they are read here. Every op takes room for its workspace as (address, bytes, barrier), or None,
// and then only says how many bytes it takes.
#include <climits>

#include "binding.hpp"
#include "linear.hpp"
#include "synthesizer.hpp"

namespace fused_dni::cuda {
namespace {

constexpr int kSgd = 0, kRules = 3, kHyper = 7, kStatistics = 5;
constexpr int kActivations = 9;

Type read_type(Reader& read, const char* name) {
  const std::int64_t type = read.integer();
  if (type == kFloat32 || type == kBfloat16 || type == kFloat16) return static_cast<Type>(type);
  throw py::type_error(std::string(name) + ": type code " + std::to_string(type) +
                       " is none of float32, bfloat16, float16");
}

int read_size(Reader& read, const char* name, std::int64_t least = 1) {
  return static_cast<int>(read.integer(name, least, INT_MAX));
}

// N, I, O, x's type, whether float32 products are IEEE's.
void read_sizes(const py::tuple& items, LinearArguments& a) {
  Reader read(items);
  a.rows = read_size(read, "rows");
  a.inputs = read_size(read, "inputs");
  a.outputs = read_size(read, "outputs");
  a.type = read_type(read, "x");
  a.ieee = read.flag();
  read.finish();
}

void read_config(const py::tuple& items, LinearArguments& a) {
  Reader read(items);
  a.normalization = static_cast<Normalization>(read.integer("normalization", 0, 2));
  a.statistics = read.flag();
  a.activation = static_cast<int>(read.integer("activation", 0, kActivations - 1));
  a.eps = static_cast<float>(read.real());
  a.momentum = static_cast<float>(read.real());
  read.finish();
}

void read_layer(const py::tuple& items, LinearArguments& a) {
  Reader read(items);
  const bool normalized = a.normalization != kNoNormalization;
  const bool batch = a.normalization == kBatchNormalization;
  const Need affine = normalized ? kOptional : kAbsent;
  // Evaluation reads them; training without them has nothing to move.
  const Need running = batch ? a.statistics ? kOptional : kRequired : kAbsent;
  a.weight.parameter = read.contiguous<float>("weight", {a.outputs, a.inputs});
  a.bias.parameter = read.vector<float>("bias", a.outputs, kOptional);
  a.norm_weight.parameter = read.vector<float>("norm_weight", a.outputs, affine);
  a.norm_bias.parameter = read.vector<float>("norm_bias", a.outputs, affine);
  a.running_mean = read.vector<float>("running_mean", a.outputs, running);
  a.running_var =
      read.vector<float>("running_var", a.outputs, a.running_mean ? kRequired : kAbsent);
  read.finish();
}

// The gradient at h.
template <class A>
void read_arriving(Reader& read, A& a) {
  const Tensor given = read.tensor("grad_h", {a.type, kFloat32}, {a.rows, a.outputs});
  a.grad_h = given.data;
  a.grad_wide = given.type == kFloat32;
}

void read_x(Reader& read, LinearArguments& a) {
  const Tensor x = read.tensor("x", {a.type}, {a.rows, a.inputs}, kRequired, true);
  a.x = {x.data, x.stride};
}

// What a backward needs beside x and h, where the layer has it.
void read_saved(Reader& read, LinearArguments& a, Need need) {
  const bool layer = a.normalization == kLayerNormalization;
  a.normalized =
      read.contiguous<float>("normalized", {a.rows, a.outputs}, keeps_input(a) ? need : kAbsent);
  a.rstd = read.vector<float>("rstd", layer ? a.rows : a.outputs,
                              a.normalization == kNoNormalization ? kAbsent : need);
}

// A slot of a rule, or of gradients, with what it is called in messages.
struct Named {
  const char* name;
  Slot* slot;
  std::int64_t rows, columns = 0;  // no columns: a vector; no rows: a number

  float* read(Reader& from, const char* what, Need need) const {
    const std::string full = std::string(what) + " of " + name;
    if (rows == 0) return from.contiguous<float>(full.c_str(), {}, need);
    if (columns == 0) return from.vector<float>(full.c_str(), rows, need);
    return from.contiguous<float>(full.c_str(), {rows, columns}, need);
  }
};
using Slots = Named[4];

// Calls f(slots).
template <class F>
void with_slots(LinearArguments& a, F&& f) {
  const Slots slots = {{"weight", &a.weight, a.outputs, a.inputs},
                       {"bias", &a.bias, a.outputs},
                       {"norm_weight", &a.norm_weight, a.outputs},
                       {"norm_bias", &a.norm_bias, a.outputs}};
  f(slots);
}
template <class F>
void with_slots(SynthesizerArguments& a, F&& f) {
  const Synthesizer& s = a.synthesizer;
  const std::int64_t columns[] = {a.outputs, s.rank, 0};  // by source
  const Slots slots = {{"synthesizer weight", &a.weight, a.outputs, columns[s.source]},
                       {"down", &a.down, s.rank, a.outputs},
                       {"context_weight", &a.context, s.table ? 0 : a.outputs, s.classes},
                       {"synthesizer bias", &a.bias, a.outputs}};
  f(slots);
}

// Kind, nesterov, hyper-parameters, moments, which slots may be written.
template <class A>
void read_rule(const py::tuple& items, A& a, const Slots& slots) {
  Reader read(items);
  a.rule = static_cast<int>(read.integer("rule", kSgd, kRules - 1));
  a.nesterov = read.flag();
  a.hyper = read.template vector<double>("hyper", kHyper);
  const py::tuple first = read.tuple(), second = read.tuple(), trainable = read.tuple();
  read.finish();
  Reader firsts(first), seconds(second), flags(trainable);
  for (int i = 0; i < 4; ++i) {
    const Named& of = slots[i];
    a.trainable[i] = flags.flag();
    if (a.trainable[i] && of.slot->parameter == nullptr)
      throw py::type_error(std::string(of.name) +
                           ": got None, takes a tensor, for it is trainable");
    const Need need = a.trainable[i] && a.rule != kSgd ? kRequired : kOptional;
    of.slot->first = of.read(firsts, "first moment", need);
    of.slot->second = of.read(seconds, "second moment", a.rule == kSgd ? kAbsent : need);
  }
  firsts.finish();
  seconds.finish();
  flags.finish();
}

// Gradients that are stored: of the slots that have one.
void read_gradients(Reader& read, bool (&trainable)[4], const Slots& slots) {
  for (int i = 0; i < 4; ++i) {
    const Named& of = slots[i];
    of.slot->gradient = of.read(read, "gradient", of.slot->parameter ? kOptional : kAbsent);
    trainable[i] = of.slot->gradient != nullptr;
  }
}

// Kind, R, K, table, the label ignored, parameters; and behind them in the same tuple nothing.
void read_synthesizer(const py::tuple& items, Synthesizer& s, std::int64_t outputs) {
  Reader read(items);
  s.source = static_cast<Source>(read.integer("synthesizer", kDense, kDiagonal));
  const bool low = s.source == kLowRank;
  s.rank = static_cast<int>(read.integer("rank", low ? 1 : 0, low ? INT_MAX : 0));
  s.classes = read_size(read, "classes", 0);
  const Need context = s.classes > 0 ? kRequired : kAbsent;
  const Tensor table = read.tensor("table", {kFloat32, kBfloat16}, {s.classes, outputs},
                                   s.classes > 0 ? kOptional : kAbsent);
  s.table = table.data;
  s.narrow = table.type == kBfloat16;
  s.ignored = read.integer();
  if (s.source == kDiagonal)
    s.weight = read.vector<float>("synthesizer weight", outputs);
  else
    s.weight = read.contiguous<float>("synthesizer weight", {outputs, low ? s.rank : outputs});
  s.down = read.contiguous<float>("down", {s.rank, outputs}, low ? kRequired : kAbsent);
  s.context_weight = s.table
                         ? read.contiguous<float>("context_weight", {})
                         : read.contiguous<float>("context_weight", {outputs, s.classes}, context);
  s.bias = read.vector<float>("synthesizer bias", outputs, kOptional);
  read.finish();
}

void read_context(Reader& read, Synthesizer& s, std::int64_t rows) {
  const Need either = s.table ? kRequired : s.classes > 0 ? kOptional : kAbsent;
  s.labels = read.vector<std::int64_t>("labels", rows, either);
  const Need other = s.classes > 0 && !s.labels ? kRequired : kAbsent;
  s.vectors = read.contiguous<float>("context", {rows, s.classes}, other);
}

void read_reduced(Reader& read, Synthesizer& s, std::int64_t rows, Need need) {
  const bool low = s.source == kLowRank;
  s.reduced = read.contiguous<float>("reduced", {rows, s.rank}, low ? need : kAbsent);
}

// The workspace is large enough and where kernels want it.
void* read_room(const py::object& room, std::size_t bytes, Barrier& barrier,
                const std::string& what) {
  Reader read(py::cast<py::tuple>(room));
  void* address = read.pointer();
  const std::int64_t given = read.integer();
  barrier = read.barrier(what);
  read.finish();
  if (bytes > 0 && (reinterpret_cast<std::uintptr_t>(address) % 16 != 0 || !address))
    throw py::value_error("workspace: takes an address that is a multiple of 16 other than 0");
  if (given < static_cast<std::int64_t>(bytes))
    throw py::value_error("workspace: got " + std::to_string(given) + " bytes, takes " +
                          std::to_string(bytes));
  return address;
}

std::size_t run_linear(const char* op, const LinearArguments& a, const py::object& room,
                       std::int64_t stream) {
  const std::size_t bytes = linear_workspace(a);
  if (room.is_none()) return bytes;
  const std::string what =
      describe(op, {{"x", {a.rows, a.inputs}}, {"weight", {a.outputs, a.inputs}}});
  LinearLaunch launch{a, nullptr, reinterpret_cast<void*>(stream)};
  launch.room = read_room(room, bytes, launch.arguments.barrier, what);
  run(linear, launch, what);
  return bytes;
}

std::size_t linear_forward(const py::tuple& items, const py::object& room, std::int64_t stream) {
  Reader read(items);
  LinearArguments a;
  read_sizes(read.tuple(), a);
  read_config(read.tuple(), a);
  read_layer(read.tuple(), a);
  read_x(read, a);
  a.forward = true;
  a.h = read.tensor("h", {a.type}, {a.rows, a.outputs}).data;
  read_saved(read, a, kOptional);
  read.finish();
  return run_linear("linear_forward", a, room, stream);
}

std::size_t linear_backward(const py::tuple& items, const py::object& room, std::int64_t stream) {
  Reader read(items);
  LinearArguments a;
  read_sizes(read.tuple(), a);
  read_config(read.tuple(), a);
  read_layer(read.tuple(), a);
  read_x(read, a);
  a.synthesizer.source = kGiven;
  read_arriving(read, a);
  a.h = read.tensor("h", {a.type}, {a.rows, a.outputs}).data;
  read_saved(read, a, kRequired);
  a.delta = read.contiguous<float>("delta", {a.rows, a.outputs});
  a.dx = read.tensor("dx", {a.type}, {a.rows, a.inputs}, kOptional).data;
  with_slots(a, [&](const Slots& slots) { read_gradients(read, a.trainable, slots); });
  read.finish();
  return run_linear("linear_backward", a, room, stream);
}

std::size_t linear_update(const py::tuple& items, const py::object& room, std::int64_t stream) {
  Reader read(items);
  LinearArguments a;
  read_sizes(read.tuple(), a);
  a.normalization = kLayerNormalization;  // the parameters of a normalisation may be there
  read_layer(read.tuple(), a);
  a.normalization = kNoNormalization;
  read_x(read, a);
  a.delta = read.contiguous<float>("delta", {a.rows, a.outputs});
  a.given_bias = read.vector<float>("gradient of bias", a.outputs, kOptional);
  a.given_norm_weight = read.vector<float>("gradient of norm_weight", a.outputs, kOptional);
  a.given_norm_bias = read.vector<float>("gradient of norm_bias", a.outputs, kOptional);
  const py::tuple rule = read.tuple();
  with_slots(a, [&](const Slots& slots) { read_rule(rule, a, slots); });
  read.finish();
  return run_linear("linear_update", a, room, stream);
}

std::size_t linear_step(const py::tuple& items, const py::object& room, std::int64_t stream) {
  Reader read(items);
  LinearArguments a;
  read_sizes(read.tuple(), a);
  read_config(read.tuple(), a);
  read_layer(read.tuple(), a);
  const py::tuple rule = read.tuple();
  with_slots(a, [&](const Slots& slots) { read_rule(rule, a, slots); });
  read_synthesizer(read.tuple(), a.synthesizer, a.outputs);
  read_x(read, a);
  read_context(read, a.synthesizer, a.rows);
  a.inverse_scale = static_cast<float>(1.0 / read.real());
  a.max_norm = static_cast<float>(read.real());
  a.interface = static_cast<Interface>(read.integer("interface", kOutput, kPreactivation));
  a.forward = true;
  a.h = read.tensor("h", {a.type}, {a.rows, a.outputs}).data;
  a.scaled = read.contiguous<float>("scaled", {a.rows, a.outputs}, kOptional);
  read_reduced(read, a.synthesizer, a.rows, kOptional);
  a.dx = read.tensor("dx", {a.type}, {a.rows, a.inputs}, kOptional).data;
  read_saved(read, a, a.interface == kPreactivation ? kOptional : kAbsent);
  read.finish();
  return run_linear("linear_step", a, room, stream);
}

// ---- The synthesizer ------------------------------------------------------------------------------

std::size_t run_synthesizer(const char* op, const SynthesizerArguments& a, const py::object& room,
                            std::int64_t stream) {
  const std::size_t bytes = synthesizer_workspace(a);
  if (room.is_none()) return bytes;
  const std::string what = describe(op, {{"h", {a.rows, a.outputs}}});
  SynthesizerLaunch launch{a, nullptr, reinterpret_cast<void*>(stream)};
  launch.room = read_room(room, bytes, launch.arguments.barrier, what);
  run(synthesizer, launch, what);
  return bytes;
}

// N, O, h's type, whether float32 products are IEEE's; the synthesizer, h, the context, M(h), h U^T.
void read_prediction(Reader& read, SynthesizerArguments& a) {
  Reader sizes(read.tuple());
  a.rows = read_size(sizes, "rows");
  a.outputs = read_size(sizes, "outputs");
  a.type = read_type(sizes, "h");
  a.ieee = sizes.flag();
  sizes.finish();
  read_synthesizer(read.tuple(), a.synthesizer, a.outputs);
  a.h = read.tensor("h", {a.type}, {a.rows, a.outputs}).data;
  read_context(read, a.synthesizer, a.rows);
  a.scaled = read.contiguous<float>("scaled", {a.rows, a.outputs});
  read_reduced(read, a.synthesizer, a.rows, kRequired);
}

void read_training(Reader& read, SynthesizerArguments& a) {
  a.training = true;
  read_arriving(read, a);
  a.target_scale = static_cast<float>(read.real());
  a.statistics = read.vector<double>("statistics", kStatistics);
  const Synthesizer& s = a.synthesizer;
  a.weight.parameter = const_cast<float*>(s.weight);
  a.down.parameter = const_cast<float*>(s.down);
  a.context.parameter = const_cast<float*>(s.context_weight);
  a.bias.parameter = const_cast<float*>(s.bias);
}

std::size_t synthesizer_predict(const py::tuple& items, const py::object& room,
                                std::int64_t stream) {
  Reader read(items);
  SynthesizerArguments a;
  read_prediction(read, a);
  read.finish();
  return run_synthesizer("synthesizer_predict", a, room, stream);
}

std::size_t synthesizer_gradients(const py::tuple& items, const py::object& room,
                                  std::int64_t stream) {
  Reader read(items);
  SynthesizerArguments a;
  read_prediction(read, a);
  read_training(read, a);
  with_slots(a, [&](const Slots& slots) { read_gradients(read, a.trainable, slots); });
  read.finish();
  return run_synthesizer("synthesizer_gradients", a, room, stream);
}

std::size_t synthesizer_update(const py::tuple& items, const py::object& room,
                               std::int64_t stream) {
  Reader read(items);
  SynthesizerArguments a;
  read_prediction(read, a);
  read_training(read, a);
  const py::tuple rule = read.tuple();
  with_slots(a, [&](const Slots& slots) { read_rule(rule, a, slots); });
  read.finish();
  return run_synthesizer("synthesizer_update", a, room, stream);
}

}  // namespace

void bind_linear(py::module_& m) {
  const py::arg items("items"), stream("stream");
  const py::arg room("room");
  m.def("linear_forward", &linear_forward, items, room, stream);
  m.def("linear_backward", &linear_backward, items, room, stream);
  m.def("linear_update", &linear_update, items, room, stream);
  m.def("linear_step", &linear_step, items, room, stream);
  m.def("synthesizer_predict", &synthesizer_predict, items, room, stream);
  m.def("synthesizer_gradients", &synthesizer_gradients, items, room, stream);
  m.def("synthesizer_update", &synthesizer_update, items, room, stream);
}

}  // namespace fused_dni::cuda
