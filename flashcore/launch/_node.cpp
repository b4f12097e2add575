/* The graph node of a call with gradients, as torch makes its own.

   A torch.autograd.Function spends most of a call's time on what any Function may ask for: a context in Python, marks on
   tensors, lists of what goes in and out. This node knows its call: it saves tensors, hangs itself on the output, and
   hands its gradient to the same Python function that the Function's backward is. To that function the node is the
   context: it has `saved_tensors` and `needs_input_grad`.

   What a Python context protects by the interpreter's lock is so protected here, not by the node's mutex: hooks of saved
   tensors and destructors of tensors take that lock, and a mutex held meanwhile could wait for it forever. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <type_traits>
#include <typeinfo>

namespace {

using namespace torch::autograd; // torch's own macros want it

using NodePointer = decltype(Edge::function); // a std::shared_ptr, or an intrusive one in later releases of torch

enum { MOST_GIVEN = 5, MOST_SAVED = MOST_GIVEN + 2, DIMS = 4 };

/* How an output and the log-sum-exp that only a node keeps lie in one allocation. _shim.c has the same. */
struct Together {
  int ndim, lse_ndim;
  int64_t shape[DIMS], strides[DIMS], lse_shape[DIMS], lse_strides[DIMS];
  int64_t lse_offset; // in fp32 numbers
};

class Lock {
 public:
  Lock() : state(PyGILState_Ensure()) {}
  ~Lock() { PyGILState_Release(state); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  PyGILState_STATE state;
};

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist(); // it leaves this thread
  throw error;
}

class Owned {
 public:
  explicit Owned(PyObject* object) : object(object) {
    if (!object) throw_python_error();
  }
  ~Owned() { Py_DECREF(object); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object; }

 private:
  PyObject* object;
};

PyObject* wrap(const at::Tensor& tensor) {
  return tensor.defined() ? THPVariable_Wrap(tensor) : Py_NewRef(Py_None);
}

struct Attention : Node {
  Attention(PyObject* backward, bool materializes) : backward(Py_NewRef(backward)), materializes(materializes) {}

  ~Attention() override {
    if (!Py_IsInitialized()) return;
    Lock lock;
    Py_DECREF(backward);
  }

  std::string name() const override { return "AttentionBackward"; }

  void save(const at::Tensor& tensor, bool is_output) { saved[n_saved++] = SavedVariable(tensor, is_output); }

  void save_nothing() { n_saved++; }

  PyObject* saved_tensors() {
    Owned tensors(PyTuple_New(n_saved));
    for (int i = 0; i < n_saved; i++) {
      PyObject* tensor = wrap(saved[i].unpack(getptr()));
      if (!tensor) throw_python_error();
      PyTuple_SET_ITEM(tensors.get(), i, tensor);
    }
    return Py_NewRef(tensors.get());
  }

  void release_variables() override {
    if (!Py_IsInitialized()) return;
    Lock lock;
    for (int i = 0; i < n_saved; i++) saved[i].reset_data();
  }

 protected:
  variable_list apply(variable_list&& gradients) override {
    if (materializes && !gradients[0].defined()) gradients[0] = input_metadata(0).zeros_like();
    Lock lock;
    Owned self(functionToPyObject(getptr()));
    Owned first(wrap(gradients[0])), second(wrap(gradients.size() > 1 ? gradients[1] : at::Tensor()));
    PyObject* arguments[] = {self.get(), first.get(), second.get()};
    Owned found(PyObject_Vectorcall(backward, arguments, 3, nullptr));
    TORCH_CHECK(
        PyTuple_Check(found.get()) && PyTuple_GET_SIZE(found.get()) == static_cast<Py_ssize_t>(num_outputs()),
        "attention's backward gave something else than one gradient for each input");
    variable_list results(num_outputs());
    for (size_t i = 0; i < results.size(); i++) {
      PyObject* gradient = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(i));
      if (gradient != Py_None && should_compute_output(i)) results[i] = THPVariable_Unpack(gradient);
    }
    return results;
  }

 private:
  PyObject* backward; // backward(context, gradient of the output, of lse), the gradients being None where there is none
  bool materializes;  // an undefined gradient of the output is passed as zeros
  int n_saved = 0;
  SavedVariable saved[MOST_SAVED]; // those that stay empty are None
};

template <class Pointer, class Made>
Pointer pointer_to(Made* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(node, [](auto* last) { deleteNode(last); }); // long chains without recursion
  else
    return Pointer::unsafe_steal_from_new(node);
}

/* Make the output of a flat tensor that holds both, and give the log-sum-exp: a tensor of its own, not a view, so that
   each is changed and noticed by itself. */
at::Tensor split(const at::Tensor& both, const Together& how) {
  auto lse = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(both.storage()), both.key_set(), caffe2::TypeMeta::Make<float>());
  const auto dims = static_cast<size_t>(how.ndim), lse_dims = static_cast<size_t>(how.lse_ndim);
  lse.unsafeGetTensorImpl()->set_sizes_and_strides({how.lse_shape, lse_dims}, {how.lse_strides, lse_dims}, how.lse_offset);
  both.unsafeGetTensorImpl()->set_sizes_and_strides({how.shape, dims}, {how.strides, dims});
  return lse;
}

/* Hang a node on `out`, and on `lse` if `gives_lse`, of a call with the tensors `given` (None = left out). It saves these,
   and if `keeps` also out and lse, which with `together` is in the memory of out. -1 with a Python error where that
   fails. */
int attach(
    PyObject* const* given, Py_ssize_t count, PyObject* out, PyObject* lse, const Together* together, PyObject* backward,
    int keeps, int gives_lse) noexcept {
  try {
    const at::Tensor kept_lse = together ? split(THPVariable_Unpack(out), *together)
        : lse ? THPVariable_Unpack(lse) : at::Tensor();
    TORCH_CHECK(count <= MOST_GIVEN, "a call of attention has at most ", int(MOST_GIVEN), " tensors");
    auto* node = new Attention(backward, !gives_lse);
    auto pointer = pointer_to<NodePointer>(node);
    node->next_edges().reserve(static_cast<size_t>(count));
    for (Py_ssize_t i = 0; i < count; i++) {
      if (given[i] == Py_None)
        node->add_next_edge(Edge());
      else
        node->add_next_edge(impl::gradient_edge(THPVariable_Unpack(given[i])));
    }
    // Outputs come first: one that is saved must know its node by then.
    set_history(THPVariable_Unpack(out), pointer);
    if (gives_lse) set_history(kept_lse, pointer);
    for (Py_ssize_t i = 0; i < count; i++) {
      if (given[i] == Py_None)
        node->save_nothing();
      else
        node->save(THPVariable_Unpack(given[i]), false);
    }
    if (keeps) {
      node->save(THPVariable_Unpack(out), true);
      node->save(kept_lse, gives_lse);
    }
    return 0;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return -1;
  }
}

/* -- what Python sees of a node: all that torch's own nodes have, and what a Function's context has ------------------ */

Attention* node_of(PyObject* self) {
  return static_cast<Attention*>(reinterpret_cast<THPCppFunction*>(self)->cdata.get());
}

PyObject* saved_tensors(PyObject* self, void*) {
  try {
    return node_of(self)->saved_tensors();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

PyObject* needs_input_grad(PyObject* self, void*) {
  Attention* node = node_of(self);
  PyObject* needs = PyTuple_New(node->num_outputs());
  for (uint32_t i = 0; needs && i < node->num_outputs(); i++)
    PyTuple_SET_ITEM(needs, i, PyBool_FromLong(node->should_compute_output(i)));
  return needs;
}

PyGetSetDef properties[] = {
    THP_FUNCTION_DEFAULT_PROPERTIES,
    {"saved_tensors", saved_tensors, nullptr, nullptr, nullptr},
    {"needs_input_grad", needs_input_grad, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyTypeObject type;

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_flashcore_node", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

} // namespace

/* The module: `attach` as a capsule for the shim, and the nodes' type. */
PyMODINIT_FUNC PyInit__flashcore_node() {
  _initFunctionPyTypeObject(type, "AttentionBackward", properties, nullptr);
  registerCppFunction(typeid(Attention), &type);
  PyObject* module = PyModule_Create(&definition);
  PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(&attach), "flashcore.node", nullptr);
  if (module && capsule && !PyModule_AddObjectRef(module, "attach", capsule)
      && !PyModule_AddObjectRef(module, "AttentionBackward", reinterpret_cast<PyObject*>(&type))) {
    Py_DECREF(capsule);
    return module;
  }
  Py_XDECREF(capsule);
  Py_XDECREF(module);
  return nullptr;
}
