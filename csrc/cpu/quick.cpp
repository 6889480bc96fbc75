// A linear layer's training step, from the module's call to its result, with no Python code in
// between. What that code would have looked at is looked at here: where anything is not as it was
// when the step was bound, the answer is None, nothing was done, and the module goes its usual way.
//
// Everything is read through Python's objects, so that no header of torch is needed.
#include "quick.hpp"

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "dispatch.hpp"
#include "reading.hpp"

namespace fused_dni {
namespace {

using Object = py::object;

// A new reference; null where Python raised.
Object taken(PyObject* made) { return py::reinterpret_steal<Object>(made); }

Object attribute(const Object& of, const Object& name) {
  return taken(PyObject_GetAttr(of.ptr(), name.ptr()));
}
Object asked(const Object& of, const Object& name) {
  return taken(PyObject_CallMethodNoArgs(of.ptr(), name.ptr()));
}

// Names that are looked up in every step, made once and kept for as long as Python runs.
struct Names {
  Object add = py::str("add_"), contiguous = py::str("is_contiguous"), cpu = py::str("is_cpu"),
         data_ptr = py::str("data_ptr"), dtype = py::str("dtype"), lessons = py::str("lessons"),
         lr = py::str("lr"), negative = py::str("is_neg"), new_empty = py::str("new_empty"),
         requires_grad = py::str("requires_grad"), shape = py::str("shape"), size = py::str("size"),
         version = py::str("_version"), written = py::str("_written"),
         zero = py::str("_is_zerotensor");
};
const Names& names() {
  static const Names* made = new Names;
  return *made;
}

// The very object, or an integer of the same value. (Other objects' == may do anything.)
bool same(PyObject* found, PyObject* wanted) {
  if (found == wanted) return found != nullptr;
  if (found == nullptr || !PyLong_CheckExact(found) || !PyLong_CheckExact(wanted)) return false;
  return PyObject_RichCompareBool(found, wanted, Py_EQ) == 1;
}

// ---- What has to be as it was --------------------------------------------------------------------

enum CheckKind : int {
  kItem,        // of[name] is wanted
  kItemsValue,  // of[name].more is wanted
  kAttribute,   // of.name is wanted
  kMethod,      // of.name() is wanted
  kState,       // of() is wanted
  kEmpty,       // of has no items
  kAbsent,      // of has no item of that name
};

struct Check {
  int kind;
  std::array<Object, 4> objects;  // of, name, more, wanted: as many as it takes

  bool holds() const {
    const auto& [of, name, more, wanted] = objects;
    switch (kind) {
      case kItem: return same(PyDict_GetItemWithError(of.ptr(), name.ptr()), wanted.ptr());
      case kItemsValue: {
        PyObject* value = PyDict_GetItemWithError(of.ptr(), name.ptr());
        return value && same(taken(PyObject_GetAttr(value, more.ptr())).ptr(), wanted.ptr());
      }
      case kAttribute: return same(attribute(of, name).ptr(), wanted.ptr());
      case kMethod: return same(asked(of, name).ptr(), wanted.ptr());
      case kState: return same(taken(PyObject_CallNoArgs(of.ptr())).ptr(), wanted.ptr());
      case kEmpty: return PyObject_Length(of.ptr()) == 0;
      case kAbsent: return PyDict_Contains(of.ptr(), name.ptr()) == 0;
    }
    return false;
  }
};

class Guard {
 public:
  Guard() = default;
  explicit Guard(const py::handle& rows) {
    for (const py::handle& each : rows) {
      const auto row = py::reinterpret_borrow<py::tuple>(each);
      checks_.push_back({row[0].cast<int>(), {row[1], row[2], row[3], row[4]}});
    }
  }

  bool holds() const { return broken() == checks_.size(); }
  // The first that does not hold; their number if all do.
  std::size_t broken() const {
    std::size_t i = 0;
    while (i < checks_.size() && checks_[i].holds()) ++i;
    if (i < checks_.size()) PyErr_Clear();  // whatever it was, the usual way says it better
    return i;
  }
  std::size_t size() const { return checks_.size(); }

  template <class Visit>
  void each(const Visit& visit) {
    for (Check& check : checks_)
      for (Object& object : check.objects) visit(object);
  }

 private:
  std::vector<Check> checks_;
};

// A rule as it was when the step was bound. Of its hyper-parameters the rate may change, which is
// written where the usual way would look for it.
class LiveRule {
 public:
  LiveRule(const py::tuple& arguments, Object group, Object state)
      : rule_(read_rule(arguments)), group_(std::move(group)), state_(std::move(state)) {}

  const RuleArguments& arguments() const { return rule_; }
  bool read(double& rate) const {
    PyObject* lr = PyDict_GetItemWithError(group_.ptr(), names().lr.ptr());
    if (lr == nullptr || !PyFloat_CheckExact(lr)) return false;
    rate = PyFloat_AS_DOUBLE(lr);
    return rate >= 0.0 && std::isfinite(rate);
  }
  void write(double rate) const {
    if (*rule_.hyper == rate) return;
    *rule_.hyper = rate;
    if (PyDict_SetItem(state_.ptr(), names().written.ptr(), py::tuple().ptr()) < 0)
      throw py::error_already_set();
  }

  template <class Visit>
  void each(const Visit& visit) {
    visit(group_);
    visit(state_);
  }

 private:
  RuleArguments rule_;
  Object group_, state_;
};

// ---- Tensors ---------------------------------------------------------------------------------------

struct Memory {
  std::int64_t rows = 0;
  void* at = nullptr;
};

// Whether t is a torch.Tensor in plain memory: [rows, columns] or, with columns 0, [rows].
bool plain(const Object& t, const Object& type, const Object& dtype, std::int64_t columns,
           Memory& memory) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(t.ptr())) != type.ptr() ||
      attribute(t, names().dtype).ptr() != dtype.ptr() ||
      attribute(t, names().cpu).ptr() != Py_True || asked(t, names().contiguous).ptr() != Py_True ||
      asked(t, names().negative).ptr() != Py_False || asked(t, names().zero).ptr() != Py_False)
    return false;
  const Object shape = attribute(t, names().shape);
  if (!shape || PyTuple_GET_SIZE(shape.ptr()) != (columns ? 2 : 1)) return false;
  memory.rows = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0));
  if (columns && PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 1)) != columns) return false;
  const Object address = asked(t, names().data_ptr);
  memory.at = address ? PyLong_AsVoidPtr(address.ptr()) : nullptr;
  return memory.at != nullptr && !PyErr_Occurred();
}

Object new_empty(const Object& like, std::int64_t rows, std::int64_t columns) {
  return like.attr(names().new_empty)(rows, columns);
}
void* address(const Object& t) {
  if (!t || t.is_none()) return nullptr;
  return PyLong_AsVoidPtr(Object(t.attr(names().data_ptr)()).ptr());
}

// ---- What all quick steps are ----------------------------------------------------------------------

// What one call of a layer is run with.
struct Batch {
  Memory x;
  int threads = 1;
  double rate = 0.0;
  bool requires_grad = false;  // of x
  bool asks = false;           // whether whoever made x wants a gradient for it
};

// Which of the checks of both does not hold; None if all do.
Object changed_of(const Guard& surroundings, const Guard& own) {
  std::size_t at = surroundings.broken();
  if (at == surroundings.size()) at += own.broken();
  if (at == surroundings.size() + own.size()) return py::none();
  return py::int_(at);
}

class Quick {
 public:
  explicit Quick(const py::dict& parts)
      : module_(parts["module"]),
        tensor_(parts["tensor"]),
        dtype_(parts["dtype"]),
        mark_(parts["mark"]),
        threads_(parts["threads"]),
        increment_(parts["increment"]),
        type_(parts["type"].cast<std::size_t>()),
        least_(parts["least"].cast<std::int64_t>()),
        layer_(read_layer(parts["layer"])),
        surroundings_(parts["surroundings"]),
        own_(parts["own"]),
        counter_(parts["counter"]),
        rule_(parts["rule"], parts["group"], parts["state"]) {}

  const LayerArguments& layer() const { return layer_; }
  std::size_t type() const { return type_; }
  bool is(const Object& module) const { return module.is(module_); }
  bool surrounded() const { return surroundings_.holds(); }
  Object changed() const { return changed_of(surroundings_, own_); }
  bool unchanged() const { return own_.holds(); }

  // Whether the input is one that this serves.
  bool takes(const Object& input, Batch& batch) const {
    if (!plain(input, tensor_, dtype_, layer_.in, batch.x)) return cleared();
    batch.requires_grad = attribute(input, names().requires_grad).ptr() == Py_True;
    batch.asks = batch.requires_grad && !marked(input);
    return counts(batch) || cleared();
  }
  // The same of what another layer has handed on.
  bool counts(Batch& batch) const {
    if (batch.x.rows < least_ || !rule_.read(batch.rate)) return false;
    const Object threads = taken(PyObject_CallNoArgs(threads_.ptr()));
    batch.threads = threads ? static_cast<int>(PyLong_AsLong(threads.ptr())) : 0;
    return batch.threads > 0;
  }

  Object result(const Object& like, std::int64_t rows) const {
    return new_empty(like, rows, layer_.out);
  }
  LayerArguments over(const Batch& batch) const {
    LayerArguments layer = layer_;
    layer.rows = batch.x.rows;
    layer.threads = batch.threads;
    return layer;
  }
  void count_batch() const {
    if (!counter_.is_none()) counter_.attr(names().add)(1);
  }
  void wrote(const Object& tensors) const { increment_(tensors); }
  void mark(const Object& h) const { py::setattr(h, mark_, h.attr(names().version)); }

  // For Python's collector: what is held leads back to the module that holds this.
  template <class Visit>
  void each(const Visit& visit) {
    surroundings_.each(visit);
    own_.each(visit);
    rule_.each(visit);
    for (Object* object : {&module_, &tensor_, &dtype_, &mark_, &threads_, &increment_, &counter_})
      visit(*object);
  }

  static bool cleared() {
    PyErr_Clear();
    return false;
  }

 protected:
  Object module_, tensor_, dtype_, mark_, threads_, increment_;
  std::size_t type_;  // 0 float, 1 double
  std::int64_t least_;
  LayerArguments layer_;
  Guard surroundings_, own_;
  Object counter_;
  LiveRule rule_;

 private:
  // Whether whoever made it wants no gradient for it in this step.
  bool marked(const Object& t) const {
    const Object mark = attribute(t, mark_);
    if (!mark) return cleared();
    return same(mark.ptr(), attribute(t, names().version).ptr());
  }
};

// ---- A step whose gradient is predicted ------------------------------------------------------------

// What is told of a call, and kept alive.
struct Told {
  Object labels;  // None for none
  const std::int64_t* at = nullptr;
};

// How a step is run: without a target, with one, or by nobody here.
enum class Way { kUntaught, kTaught, kUsual };

// What a step leaves; None where there is none.
struct Made {
  Object h, scaled, reduced, dx;
};

class QuickStep : public Quick {
 public:
  explicit QuickStep(const py::dict& parts)
      : Quick(parts),
        untaught_(parts["untaught"]),
        taught_(parts["taught"]),
        synthesizer_(read_synthesizer(parts["synthesizer"], 0)),
        label_(parts["label"]),
        context_(parts["context"]),
        unit_(parts["unit"]),
        written_(parts["written"]),
        learned_(parts["learned"]),
        last_(parts["last"]),
        max_norm_(parts["max_norm"].cast<double>()),
        preactivation_(parts["preactivation"].cast<bool>()),
        given_kappa_(!parts["kappa"].is_none()),
        kappa_(given_kappa_ ? parts["kappa"].cast<double>() : 0.0),
        statistics_(static_cast<double*>(address(parts["statistics"]))),
        earliest_(parts["earliest"].cast<std::int64_t>()),
        interval_(parts["interval"].cast<std::int64_t>()) {
    if (!parts["teacher"].is_none())
      teacher_.emplace(parts["teacher"], parts["teacher group"], parts["teacher state"]);
  }

  // Of a step without a target h. Of one with a target a tuple: h, what the lesson reads (M(h), and
  // of a low rank what is between; None for none), dx or None, the labels or None, the unit. Or None.
  Object call(const Object& module, const Object& input, const Object& context) const {
    Batch batch;
    Told told{context, nullptr};
    const Way way = is(module) && surrounded() ? this->way() : Way::kUsual;
    if (way == Way::kUsual || !takes(input, batch) || !tells(told, batch.x.rows) || !sized())
      return py::none();
    const bool target = way == Way::kTaught;
    if (!target && batch.requires_grad) return py::none();
    const Made made = room(input, batch.x.rows, target, batch.asks);
    run(batch, told, made);
    wrote(written_);
    count_batch();
    last_();
    if (target)
      return py::make_tuple(made.h, made.scaled, made.reduced, made.dx, told.labels, unit());
    mark(made.h);
    return made.h;
  }

  // The synthesizer's lesson; whether it was given.
  bool learn(const Object& h, const Object& scaled, const Object& reduced, const Object& labels,
             const Object& unit, const Object& arrived) const {
    Memory seen, gradient;
    Batch batch;
    Told told{labels, nullptr};
    if (preactivation_ || !unchanged() || !plain(h, tensor_, dtype_, layer_.out, seen) ||
        !plain(arrived, tensor_, dtype_, layer_.out, gradient) || seen.rows != gradient.rows)
      return cleared();
    batch.x.rows = gradient.rows;
    const Object now = attribute(unit_, names().size);
    const bool same_unit = now && PyObject_RichCompareBool(now.ptr(), unit.ptr(), Py_EQ) == 1;
    if (!same_unit || !counts(batch) || !tells(told, gradient.rows) || !teachable())
      return cleared();
    teach(batch, told, Made{h, scaled, reduced, {}}, gradient.at);
    wrote(learned_);
    return true;
  }

  // ---- The same in parts, for stacks ---------------------------------------------------------------

  Way way() const {
    if (!unchanged()) return Way::kUsual;
    if (untaught_.holds()) return Way::kUntaught;
    return taught_.holds() && !preactivation_ ? Way::kTaught : Way::kUsual;
  }
  // The labels, given or of the context.
  bool tells(Told& told, std::int64_t rows) const {
    if (label_.is_none()) return told.labels.is_none();
    if (told.labels.is_none()) {
      PyObject* value = nullptr;
      if (PyContextVar_Get(context_.ptr(), nullptr, &value) < 0) return cleared();
      told.labels = taken(value);
      if (!told.labels) return false;
    }
    Memory memory;
    if (!plain(told.labels, tensor_, label_, 0, memory) || memory.rows != rows) return cleared();
    told.at = static_cast<const std::int64_t*>(memory.at);
    for (std::int64_t n = 0; n < rows; ++n)
      if (told.at[n] < 0 || told.at[n] >= synthesizer_.classes) return false;
    return true;
  }
  bool sized() const {
    const Object unit = attribute(unit_, names().size);
    return (unit && PyFloat_CheckExact(unit.ptr())) || cleared();
  }
  // Whether the coming lesson is one in which the unit stays as it is.
  bool teachable() const {
    double rate = 0.0;
    if (!teacher_ || !teacher_->read(rate)) return false;
    if (given_kappa_) return true;
    const Object lessons = attribute(unit_, names().lessons);
    if (!lessons || !PyLong_CheckExact(lessons.ptr())) return cleared();
    const std::int64_t n = PyLong_AsLongLong(lessons.ptr()) + 1;
    if (n < earliest_) return n != 1;
    return (n & (n - 1)) != 0 && n % interval_ != 0;
  }
  Made room(const Object& like, std::int64_t rows, bool target, bool need_dx) const {
    const auto wanted = [&](bool there, std::int64_t columns) {
      return there ? new_empty(like, rows, columns) : Object(py::none());
    };
    return {result(like, rows), wanted(target, layer_.out),
            wanted(target && synthesizer_.down, synthesizer_.rank), wanted(need_dx, layer_.in)};
  }
  void run(const Batch& batch, const Told& told, const Made& made) const {
    LinearStep step{};
    step.layer = over(batch);
    step.synthesizer = told_by(told, batch.x.rows);
    step.rule = rule_.arguments();
    step.target_scale = scale(batch.x.rows);
    step.max_norm = max_norm_;
    step.preactivation = preactivation_;
    step.x = batch.x.at;
    step.h = address(made.h);
    step.scaled = address(made.scaled);
    step.reduced = address(made.reduced);
    step.grad_x = address(made.dx);
    rule_.write(batch.rate);
    py::gil_scoped_release release;
    kernels().linear_step[type_](step);
  }
  void teach(const Batch& batch, const Told& told, const Made& made, const void* arrived) const {
    SynthesizerTrain lesson{};
    lesson.synthesizer = told_by(told, batch.x.rows);
    lesson.rows = batch.x.rows;
    lesson.features = layer_.out;
    lesson.threads = batch.threads;
    lesson.target_scale = scale(batch.x.rows);
    lesson.h = address(made.h);
    lesson.scaled = address(made.scaled);
    lesson.reduced = address(made.reduced);
    lesson.grad_h = arrived;
    lesson.statistics = statistics_;
    lesson.update = true;
    lesson.rule = teacher_->arguments();
    double rate = 0.0;
    teacher_->read(rate);
    teacher_->write(rate);
    if (!given_kappa_) {
      const Object lessons = unit_.attr(names().lessons);
      py::setattr(unit_, names().lessons, py::int_(PyLong_AsLongLong(lessons.ptr()) + 1));
    }
    py::gil_scoped_release release;
    kernels().synthesizer_train[type_](lesson);
  }
  const Object& written() const { return written_; }
  const Object& learned() const { return learned_; }
  const Object& last() const { return last_; }
  Object unit() const { return unit_.attr(names().size); }

  template <class Visit>
  void each(const Visit& visit) {
    Quick::each(visit);
    untaught_.each(visit);
    taught_.each(visit);
    if (teacher_) teacher_->each(visit);
    for (Object* object : {&label_, &context_, &unit_, &written_, &learned_, &last_})
      visit(*object);
  }

 private:
  double scale(std::int64_t rows) const {
    const double kappa = given_kappa_ ? kappa_ : static_cast<double>(rows);
    return kappa / PyFloat_AsDouble(attribute(unit_, names().size).ptr());
  }
  SynthesizerArguments told_by(const Told& told, std::int64_t rows) const {
    SynthesizerArguments synthesizer = synthesizer_;
    synthesizer.labels = told.at;
    synthesizer.counted = told.at ? rows : 0;
    return synthesizer;
  }

  Guard untaught_, taught_;
  SynthesizerArguments synthesizer_;
  std::optional<LiveRule> teacher_;  // none before its first lesson
  Object label_, context_, unit_, written_, learned_, last_;
  double max_norm_;
  bool preactivation_, given_kappa_;
  double kappa_;
  double* statistics_;
  std::int64_t earliest_, interval_;
};

// ---- A step by the true gradient ---------------------------------------------------------------------

// What a forward leaves for the backward; None where that reads nothing.
struct Kept {
  Object h, normalized, rstd;
};
// What a backward makes: of x if it is wanted, at z, and of bias, scale and shift where there are any.
struct Gradients {
  Object x, delta, bias, scale, shift;
};

class QuickExact : public Quick {
 public:
  explicit QuickExact(const py::dict& parts)
      : Quick(parts),
        moved_(parts["moved"]),
        written_(parts["written"]),
        keeps_(parts["keeps"].cast<bool>()) {}

  // h, normalized and rstd or None, whether x wants a gradient; or None.
  Object forward(const Object& module, const Object& input, const Object& context) const {
    Batch batch;
    if (!is(module) || !context.is_none() || !surrounded() || !unchanged() || !takes(input, batch))
      return py::none();
    const Kept kept = run_forward(input, batch);
    if (PyObject_Length(moved_.ptr()) > 0) wrote(moved_);
    count_batch();
    return py::make_tuple(kept.h, kept.normalized, kept.rstd, batch.asks);
  }

  // dx or None, delta, and the gradients of bias, scale and shift or None; or None.
  Object backward(const Object& arrived, const Object& x, const Object& h, const Object& normalized,
                  const Object& rstd, bool need_dx) const {
    Batch batch;
    Memory gradient;
    if (!unchanged() || !arrives(arrived, batch, gradient)) {
      cleared();
      return py::none();
    }
    batch.x.at = address(x);
    const Gradients made =
        run_backward(arrived, gradient.at, batch, {h, normalized, rstd}, need_dx);
    return py::make_tuple(made.x, made.delta, made.bias, made.scale, made.shift);
  }

  // The update from x and the LinearGradients of fused_dni/ops/types.py; whether it was made.
  bool update(const Object& x, const py::tuple& made) const {
    Batch batch;
    const Gradients gradients{{}, made[0], made[3], made[4], made[5]};
    if (!updates(x, gradients, batch)) return cleared();
    run_update(batch, gradients);
    wrote(written_);
    return true;
  }

  // ---- The same in parts, for stacks ---------------------------------------------------------------

  bool arrives(const Object& arrived, Batch& batch, Memory& gradient) const {
    if (!plain(arrived, tensor_, dtype_, layer_.out, gradient)) return false;
    batch.x.rows = gradient.rows;
    return counts(batch);
  }
  bool updates(const Object& x, const Gradients& made, Batch& batch) const {
    Memory delta;
    return unchanged() && plain(x, tensor_, dtype_, layer_.in, batch.x) &&
           plain(made.delta, tensor_, dtype_, layer_.out, delta) && delta.rows == batch.x.rows &&
           counts(batch);
  }
  Kept run_forward(const Object& like, const Batch& batch) const {
    const std::int64_t rows = batch.x.rows;
    Kept kept{result(like, rows), py::none(), py::none()};
    if (keeps_) kept.normalized = result(like, rows);
    if (layer_.normalization)
      kept.rstd = like.attr(names().new_empty)(layer_.normalization == 1 ? layer_.out : rows);
    LinearForward a{};
    a.layer = over(batch);
    a.x = batch.x.at;
    a.h = address(kept.h);
    a.normalized = address(kept.normalized);
    a.rstd = address(kept.rstd);
    py::gil_scoped_release release;
    kernels().linear_forward[type_](a);
    return kept;
  }
  Gradients run_backward(const Object& like, const void* arrived, const Batch& batch,
                         const Kept& kept, bool need_dx) const {
    const auto vector = [&](const void* there) {
      return there ? Object(like.attr(names().new_empty)(layer_.out)) : Object(py::none());
    };
    const std::int64_t rows = batch.x.rows;
    Gradients made{py::none(), result(like, rows), vector(layer_.bias), vector(layer_.norm_weight),
                   vector(layer_.norm_bias)};
    if (need_dx) made.x = new_empty(like, rows, layer_.in);
    LinearBackward a{};
    a.layer = over(batch);
    a.grad_h = arrived;
    a.x = batch.x.at;
    a.h = address(kept.h);
    a.normalized = address(kept.normalized);
    a.rstd = address(kept.rstd);
    a.delta = address(made.delta);
    a.grad_x = address(made.x);
    a.grad_bias = address(made.bias);
    a.grad_norm_weight = address(made.scale);
    a.grad_norm_bias = address(made.shift);
    py::gil_scoped_release release;
    kernels().linear_backward[type_](a);
    return made;
  }
  void run_update(const Batch& batch, const Gradients& made) const {
    LinearUpdate a{};
    a.layer = over(batch);
    a.layer.normalization = a.layer.activation = 0;  // what made delta does not matter
    a.layer.training = false;
    a.rule = rule_.arguments();
    a.x = batch.x.at;
    a.delta = address(made.delta);
    a.grad_bias = address(made.bias);
    a.grad_norm_weight = address(made.scale);
    a.grad_norm_bias = address(made.shift);
    rule_.write(batch.rate);
    py::gil_scoped_release release;
    kernels().linear_update[type_](a);
  }
  const Object& moved() const { return moved_; }
  const Object& written() const { return written_; }

  template <class Visit>
  void each(const Visit& visit) {
    Quick::each(visit);
    visit(moved_);
    visit(written_);
  }

 private:
  Object moved_, written_;
  bool keeps_;  // what the normalisation or the activation saw
};

// ---- Stacks ------------------------------------------------------------------------------------------

// Layers one behind the other, each of which reads what the one below made.
template <class Step>
class Stack {
 public:
  Stack(Object module, const py::handle& surroundings, const py::handle& own, py::list steps)
      : module_(std::move(module)),
        surroundings_(surroundings),
        own_(own),
        steps_(std::move(steps)) {
    for (const py::handle& each : steps_) layers_.push_back(each.cast<const Step*>());
  }

  Object changed() const { return changed_of(surroundings_, own_); }

  template <class Visit>
  void each(const Visit& visit) {
    surroundings_.each(visit);
    own_.each(visit);
    visit(module_);
    visit(static_cast<Object&>(steps_));
  }

 protected:
  bool stands(const Object& module) const {
    return module.is(module_) && surroundings_.holds() && own_.holds();
  }
  // What `of` says of each layer, in one list.
  template <class Of>
  Object all(std::size_t count, const Of& of) const {
    py::list joined;
    for (std::size_t i = 0; i < count; ++i) joined += py::list(of(*layers_[i]));
    return std::move(joined);
  }
  void count_batches() const {
    for (const Step* layer : layers_) layer->count_batch();
  }

  Object module_;
  Guard surroundings_, own_;
  py::list steps_;
  std::vector<const Step*> layers_;
};

// In a step with a target each layer teaches the synthesizer below at once, by the gradient that it
// hands down.
class QuickStack : public Stack<QuickStep> {
 public:
  QuickStack(Object module, const py::handle& surroundings, const py::handle& own, py::list steps)
      : Stack(std::move(module), surroundings, own, std::move(steps)),
        written_(all(layers_.size(), [](const QuickStep& step) { return step.written(); })),
        learned_(all(layers_.size() - 1, [](const QuickStep& step) { return step.learned(); })) {}

  // As QuickStep's: h and what the lesson reads of the last layer, dx of the first.
  Object call(const Object& module, const Object& input, const Object& context) const {
    std::vector<Batch> batches;
    std::vector<Told> told;
    const Way way = ready(module, input, context, batches, told);
    if (way == Way::kUsual) return py::none();
    const bool target = way == Way::kTaught;
    const std::int64_t rows = batches[0].x.rows;
    Object dx = py::none();
    Made below;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const bool need_dx = target && (i > 0 || batches[0].asks);
      const Made made = layers_[i]->room(input, rows, target, need_dx);
      layers_[i]->run(batches[i], told[i], made);
      if (i + 1 < layers_.size()) batches[i + 1].x.at = address(made.h);
      if (i == 0)
        dx = made.dx;
      else if (target)
        layers_[i - 1]->teach(batches[i - 1], told[i - 1], below, address(made.dx));
      below = made;
    }
    const QuickStep& last = *layers_.back();
    last.wrote(written_);
    if (target) last.wrote(learned_);
    count_batches();
    last.last()();
    if (target)
      return py::make_tuple(below.h, below.scaled, below.reduced, dx, told.back().labels,
                            last.unit());
    last.mark(below.h);
    return below.h;
  }

  template <class Visit>
  void each(const Visit& visit) {
    Stack::each(visit);
    visit(written_);
    visit(learned_);
  }

 private:
  // All is looked at before anything is changed.
  Way ready(const Object& module, const Object& input, const Object& context,
            std::vector<Batch>& batches, std::vector<Told>& told) const {
    if (!stands(module)) return Way::kUsual;
    const Way way = layers_[0]->way();
    Batch batch;
    if (way == Way::kUsual || !layers_[0]->takes(input, batch)) return Way::kUsual;
    if (way == Way::kUntaught && batch.requires_grad) return Way::kUsual;
    for (const QuickStep* layer : layers_) {
      told.push_back({context, nullptr});
      if ((layer != layers_[0] && layer->way() != way) || !layer->counts(batch) ||
          !layer->tells(told.back(), batch.x.rows) || !layer->sized() ||
          (way == Way::kTaught && layer != layers_.back() && !layer->teachable())) {
        Quick::cleared();
        return Way::kUsual;
      }
      batches.push_back(batch);
    }
    return way;
  }

  Object written_, learned_;
};

class QuickExactStack : public Stack<QuickExact> {
 public:
  QuickExactStack(Object module, const py::handle& surroundings, const py::handle& own,
                  py::list steps)
      : Stack(std::move(module), surroundings, own, std::move(steps)),
        moved_(all(layers_.size(), [](const QuickExact& step) { return step.moved(); })),
        written_(all(layers_.size(), [](const QuickExact& step) { return step.written(); })) {}

  // A list of (h, normalized, rstd), a layer each, and whether the input wants a gradient; or None.
  Object forward(const Object& module, const Object& input, const Object& context) const {
    Batch batch;
    if (!context.is_none() || !stands(module) || !layers_[0]->takes(input, batch))
      return py::none();
    const bool asks = batch.asks;
    for (const QuickExact* layer : layers_)
      if (!layer->unchanged() || !layer->counts(batch)) {
        Quick::cleared();
        return py::none();
      }
    py::list made;
    for (const QuickExact* layer : layers_) {
      const Kept kept = layer->run_forward(input, batch);
      made.append(py::make_tuple(kept.h, kept.normalized, kept.rstd));
      batch.x.at = address(kept.h);
    }
    if (PyObject_Length(moved_.ptr()) > 0) layers_[0]->wrote(moved_);
    count_batches();
    return py::make_tuple(made, asks);
  }

  // dx or None, and a list of (x, delta, the gradients of bias, scale and shift), a layer each, of
  // what `forward` returned; or None.
  Object backward(const Object& arrived, const Object& input, const py::list& made,
                  bool need_dx) const {
    std::vector<Batch> batches(layers_.size());
    Memory gradient;
    if (!layers_.back()->arrives(arrived, batches.back(), gradient)) {
      Quick::cleared();
      return py::none();
    }
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      batches[i].x.rows = gradient.rows;
      if (!layers_[i]->unchanged() || !layers_[i]->counts(batches[i])) {
        Quick::cleared();
        return py::none();
      }
    }
    py::list contributions;
    Object above = arrived;
    for (std::size_t i = layers_.size(); i-- > 0;) {
      const py::tuple kept = made[i];
      Object x = input;
      if (i > 0) x = py::tuple(made[i - 1])[0];
      batches[i].x.at = address(x);
      const Gradients gradients = layers_[i]->run_backward(
          arrived, address(above), batches[i], {kept[0], kept[1], kept[2]}, i > 0 || need_dx);
      contributions.append(
          py::make_tuple(x, gradients.delta, gradients.bias, gradients.scale, gradients.shift));
      above = gradients.x;
    }
    contributions.attr("reverse")();
    return py::make_tuple(above, contributions);
  }

  // All updates, from the contributions that `backward` returned; whether they were made.
  bool update(const py::list& contributions) const {
    std::vector<Batch> batches(layers_.size());
    std::vector<Gradients> made;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const py::tuple each = contributions[i];
      made.push_back({{}, each[1], each[2], each[3], each[4]});
      if (!layers_[i]->updates(each[0], made[i], batches[i])) return Quick::cleared();
    }
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i]->run_update(batches[i], made[i]);
    layers_[0]->wrote(written_);
    return true;
  }

  template <class Visit>
  void each(const Visit& visit) {
    Stack::each(visit);
    visit(moved_);
    visit(written_);
  }

 private:
  Object moved_, written_;
};

// ---- Python's collector ------------------------------------------------------------------------------

// The holder that pybind11 keeps in an instance; null before its constructor has run.
template <class T>
T* held(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  auto holder = instance->get_value_and_holder();
  return holder.holder_constructed() ? py::cast<T*>(py::handle(self)) : nullptr;
}

template <class T>
int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  int stop = 0;
  if (T* step = held<T>(self))
    step->each([&](Object& object) {
      if (!stop && object) stop = visit(object.ptr(), arg);
    });
  return stop;
}

template <class T>
int clear(PyObject* self) {
  if (T* step = held<T>(self)) step->each([](Object& object) { object = Object(); });
  return 0;
}

template <class T>
py::class_<T> bind(py::module_& m, const char* name) {
  return py::class_<T>(m, name, py::custom_type_setup([](PyHeapTypeObject* heap) {
                         heap->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
                         heap->ht_type.tp_traverse = traverse<T>;
                         heap->ht_type.tp_clear = clear<T>;
                       }));
}

}  // namespace

void bind_quick(py::module_& m) {
  bind<QuickStep>(m, "QuickStep")
      .def(py::init<const py::dict&>())
      .def("__call__", &QuickStep::call)
      .def("changed", &QuickStep::changed)
      .def("learn", &QuickStep::learn);
  bind<QuickExact>(m, "QuickExact")
      .def(py::init<const py::dict&>())
      .def("changed", &QuickExact::changed)
      .def("forward", &QuickExact::forward)
      .def("backward", &QuickExact::backward)
      .def("update", &QuickExact::update);
  bind<QuickStack>(m, "QuickStack")
      .def(py::init<Object, const py::handle&, const py::handle&, py::list>())
      .def("__call__", &QuickStack::call)
      .def("changed", &QuickStack::changed);
  bind<QuickExactStack>(m, "QuickExactStack")
      .def(py::init<Object, const py::handle&, const py::handle&, py::list>())
      .def("changed", &QuickExactStack::changed)
      .def("forward", &QuickExactStack::forward)
      .def("backward", &QuickExactStack::backward)
      .def("update", &QuickExactStack::update);
  const char* kinds[] = {"ITEM", "ITEMS_VALUE", "ATTRIBUTE", "METHOD", "STATE", "EMPTY", "ABSENT"};
  for (int kind = 0; kind < 7; ++kind) m.attr(kinds[kind]) = kind;
}

}  // namespace fused_dni
