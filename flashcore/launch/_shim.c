/* A repeated call of attention() without Python in between.

   The pure-Python path spends its time on asking each tensor for its metadata and on building argument tuples. Here
   the metadata come through DLPack's exchange interface (torch >= 2.10), calls seen before are found by comparing
   bytes, and the parameters of the kernel are patched into a copy of a prepared block.

   A call is served only where nothing has to see it: exact tensor types, the thread's dispatch keys as they were when
   the entry was added, no forward-mode level, the context of the tensors' device. One that needs a gradient is launched
   and then given a graph node by _node.cpp, where that was built, or handed to an autograd.Function, whose forward finds
   the results here. Everything else returns None, and the caller goes the Python way. No header but Python's is needed,
   and libcuda is not linked: all foreign functions arrive as addresses.

   One file, though it is long: Triton's machinery builds an extension from one source. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* -- DLPack 1.x, as dlpack.h lays it out ------------------------------------------------------------------------ */

typedef struct { uint32_t major, minor; } DLVersion;
typedef struct { int32_t type, id; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct {
  DLVersion version;
  void *previous;
  void *allocator, *managed_from_py, *managed_to_py; /* not used here */
  int (*from_py)(void *tensor, DLTensor *out);       /* borrows: valid while the tensor lives unchanged */
  int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} DLExchange;
enum { DL_CUDA = 2 };

/* -- cuda.h ----------------------------------------------------------------------------------------------------- */

typedef struct { uint32_t id, padding; uint32_t value[16]; } LaunchAttribute;
typedef struct {
  uint32_t grid[3], block[3], shared;
  void *stream;
  LaunchAttribute *attributes;
  uint32_t n_attributes;
} LaunchConfig;
enum { TENSOR_MAP_BYTES = 128 };

/* -- torch's thread state: c10::impl::raw_local_dispatch_key_set, {included, excluded} ----------------------------- */

typedef struct { uint64_t included, excluded; } DispatchKeys;
extern __thread DispatchKeys thread_keys __asm__("_ZN3c104impl26raw_local_dispatch_key_setE");

/* -- entries ---------------------------------------------------------------------------------------------------- */

enum {
  OPTIONS = 11,    /* most options of a call, compared by identity first */
  GIVEN = 6,       /* q, k, v, out, and two more: mask and seqused_k, or cu_seqlens_q and cu_seqlens_k */
  OUT = 3,
  TENSORS = 7,     /* those and lse, which comes after out as in binding.TENSORS */
  DIMS = 4,
  MAX_PARAMETERS = 96,
  MAX_BLOCK = 4096, /* bytes of parameters that a kernel can have */
  MAX_ATTRIBUTES = 4,
  MAPS = 64,       /* TMA descriptors kept for one parameter, a power of two */
  SECOND = 256,    /* alignment of what comes second in an allocation: whole sectors of memory, and more */
  BUCKETS = 256,   /* a power of two */
  MAX_ENTRIES = 512,
};

typedef struct {
  int32_t ndim; /* -1 = the tensor was left out */
  DLDataType dtype;
  int64_t shape[DIMS], strides[DIMS];
} Look;

typedef struct {
  uintptr_t address;
  uint8_t map[TENSOR_MAP_BYTES];
} CachedMap;

typedef struct {
  int parameter;     /* its offset in the block, -1 = not passed */
  PyObject *encode;  /* NULL = passed as an address; else a function: address -> object with .address of a CUtensorMap */
  CachedMap *maps;
} Slot;

/* How an output and the log-sum-exp that only a node keeps lie in one allocation. _node.cpp has the same. */
typedef struct {
  int ndim, lse_ndim;
  int64_t shape[DIMS], strides[DIMS], lse_shape[DIMS], lse_strides[DIMS];
  int64_t lse_offset; /* in fp32 numbers */
} Together;

typedef struct Entry {
  struct Entry *next;
  unsigned bucket;
  int users, unlinked;      /* calls at work on it; freed by the last one when it is no longer in the table */
  int n_options;
  PyObject *options[OPTIONS];
  int has_lse;
  int aligned;              /* whether q, k, v and out start at multiples of 16 bytes */
  int extra_aligned;        /* whether the first of the two more does, -1 = it does not matter */
  Look looks[GIVEN];
  int64_t span[GIVEN];      /* bytes that a tensor reaches over */
  DLDevice device;
  DispatchKeys keys;
  void *context, *function;
  LaunchConfig config;
  LaunchAttribute attributes[MAX_ATTRIBUTES];
  Slot slots[TENSORS];
  int n_parameters, block_bytes;
  uint16_t offsets[MAX_PARAMETERS];
  uint8_t *block;
  PyObject *out_size, *out_stride, *out_dtype, *lse_size, *lse_stride, *lse_dtype;
  PyObject *apply;          /* apply(q, k, v, extra, extra) is the call with gradients; NULL = not known */
  PyObject *backward;       /* what its backward runs, for a node of _node.cpp */
  int keeps;                /* whether that reads the output and lse */
  Together together;
  PyObject *together_size, *together_stride; /* of the allocation, in numbers of the output's dtype; NULL = there is none */
  struct Entry *forward;    /* what that launches: this entry, or the same with lse, of which it counts as a user */
} Entry;

/* The results of a call on its way through apply to its forward. */
typedef struct Pending {
  struct Pending *outer;
  PyObject *const *given; /* the arguments of apply */
  PyObject *out, *lse;    /* given away by forward */
} Pending;

static Entry *buckets[BUCKETS];
static Entry *by_age[MAX_ENTRIES]; /* the entry that a new one replaces is at `oldest` */
static int oldest;
static __thread Pending *pending;

/* -- what `setup` is given ---------------------------------------------------------------------------------------- */

static const DLExchange *exchange;
static PyTypeObject *tensor_type, *parameter_type;
static PyObject *empty_strided, *forward_ad, *name_level, *name_requires_grad, *name_address, *name_save, *name_materialize;
static PyObject *saved_attribute; /* what save_for_backward sets, NULL = not known */
static _Bool (*grad_mode)(void);
static int (*get_context)(void **);
static int (*launch_kernel)(const LaunchConfig *, void *, void **, void **);

/* (tensors of the call, how many, out, lse or NULL, how both lie in out or NULL, backward, keeps, gives lse) -> 0, or -1
   with an error */
typedef int (*AttachNode)(PyObject *const *, Py_ssize_t, PyObject *, PyObject *, const Together *, PyObject *, int, int);
static AttachNode attach_node; /* what `use_node` was given, NULL = nothing */

/* -- looking at a call -------------------------------------------------------------------------------------------- */

static int view(PyObject *tensor, DLTensor *t) {
  if (Py_TYPE(tensor) != tensor_type && Py_TYPE(tensor) != parameter_type) return 0;
  if (exchange->from_py(tensor, t)) {
    PyErr_Clear();
    return 0;
  }
  return t->ndim <= DIMS;
}

/* The tensors of a call, ndim -1 for those left out; 0 where one is none that this file knows. */
static int view_all(PyObject *const *given, DLTensor *t) {
  for (int i = 0; i < GIVEN; i++)
    if (i >= OUT && given[i] == Py_None)
      t[i].ndim = -1;
    else if (!view(given[i], &t[i]))
      return 0;
  return t[0].ndim >= 3 && t[1].ndim >= 3;
}

static uintptr_t address_of(const DLTensor *t) { return (uintptr_t)t->data + t->byte_offset; }

static unsigned bucket_of(const DLTensor *t) {
  uint64_t h = (uint64_t)(t[OUT].ndim < 0);
  for (int i = 0; i < t[0].ndim; i++) h = (h ^ (uint64_t)t[0].shape[i]) * 0x9E3779B97F4A7C15u;
  for (int i = 0; i < 3; i++) h = (h ^ (uint64_t)t[1].shape[i]) * 0x9E3779B97F4A7C15u;
  return (unsigned)(h >> 32) & (BUCKETS - 1);
}

static int looks_like(const DLTensor *t, const Look *look, const Entry *e) {
  if (t->ndim != look->ndim) return 0;
  if (t->ndim < 0) return 1;
  int64_t differ = 0;
  for (int i = 0; i < t->ndim; i++) differ |= (t->shape[i] ^ look->shape[i]) | (t->strides[i] ^ look->strides[i]);
  return !differ && !memcmp(&t->dtype, &look->dtype, sizeof t->dtype)
      && !memcmp(&t->device, &e->device, sizeof e->device);
}

/* Options are mostly the very objects of the entry: defaults, True, False, interned strings. A scale or a window need
   not be. */
static int same_option(PyObject *a, PyObject *b) {
  if (a == b) return 1;
  if (PyFloat_CheckExact(a) && PyFloat_CheckExact(b)) return PyFloat_AS_DOUBLE(a) == PyFloat_AS_DOUBLE(b);
  if (PyLong_CheckExact(a) && PyLong_CheckExact(b)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  if (PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b)) return PyUnicode_Compare(a, b) == 0;
  if (PyTuple_CheckExact(a) && PyTuple_CheckExact(b)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  return 0;
}

static Entry *find(const DLTensor *t, PyObject *const *options, int n_options) {
  for (Entry *e = buckets[bucket_of(t)]; e; e = e->next) {
    if (memcmp(&e->keys, &thread_keys, sizeof e->keys)) continue;
    int same = e->n_options == n_options;
    for (int i = 0; same && i < GIVEN; i++) same = looks_like(&t[i], &e->looks[i], e);
    for (int i = 0; same && i < n_options; i++) same = same_option(options[i], e->options[i]);
    if (same) return e;
  }
  return NULL;
}

static int requires_grad(PyObject *tensor) {
  PyObject *flag = PyObject_GetAttr(tensor, name_requires_grad);
  if (!flag) PyErr_Clear();
  Py_XDECREF(flag);
  return flag != Py_False;
}

static int needs_gradient(PyObject *const *given) {
  if (grad_mode())
    for (int i = 0; i < GIVEN; i++)
      if (given[i] != Py_None && requires_grad(given[i])) return 1;
  return 0;
}

/* Forward mode and other devices are the Python path's business. */
static int ordinary(const Entry *e) {
  PyObject *level = PyObject_GetAttr(forward_ad, name_level);
  long depth = level ? PyLong_AsLong(level) : 0;
  Py_XDECREF(level);
  if (depth >= 0 || PyErr_Occurred()) {
    PyErr_Clear();
    return 0;
  }
  void *context = NULL;
  return !get_context(&context) && context == e->context;
}

static int addresses_fit(const Entry *e, const uintptr_t *a) {
  uintptr_t all = a[0] | a[1] | a[2] | a[OUT]; /* 0 = left out */
  if ((all % 16 == 0) != e->aligned) return 0;
  if (e->extra_aligned >= 0 && (a[OUT + 2] % 16 == 0) != e->extra_aligned) return 0;
  if (a[OUT]) /* an overlap is the Python path's to report */
    for (int i = 0; i < GIVEN; i++) {
      uintptr_t at = a[i < OUT ? i : i + 1];
      if (i != OUT && a[OUT] < at + (uintptr_t)e->span[i] && at < a[OUT] + (uintptr_t)e->span[OUT]) return 0;
    }
  return 1;
}

/* -- launching ---------------------------------------------------------------------------------------------------- */

static PyObject *allocate(PyObject *size, PyObject *stride, PyObject *dtype, uintptr_t *address) {
  PyObject *arguments[] = {size, stride, dtype};
  PyObject *tensor = PyObject_Vectorcall(empty_strided, arguments, 3, NULL);
  DLTensor t;
  if (!tensor) return NULL;
  if (exchange->from_py(tensor, &t)) {
    Py_DECREF(tensor);
    return NULL;
  }
  *address = address_of(&t);
  return tensor;
}

/* The descriptor of the tensor at an address. It holds address, shape, strides and box only, so it stays right
   whichever tensor is there. */
static const uint8_t *tensor_map(const Slot *slot, uintptr_t address) {
  CachedMap *cached = &slot->maps[(address >> 9) & (MAPS - 1)]; /* the allocator hands out multiples of 512 */
  if (cached->address != address) {
    PyObject *number = PyLong_FromUnsignedLongLong(address);
    PyObject *map = number ? PyObject_CallOneArg(slot->encode, number) : NULL;
    PyObject *where = map ? PyObject_GetAttr(map, name_address) : NULL;
    unsigned long long at = where ? PyLong_AsUnsignedLongLong(where) : 0;
    if (where && !PyErr_Occurred()) {
      memcpy(cached->map, (const void *)(uintptr_t)at, TENSOR_MAP_BYTES);
      cached->address = address;
    }
    Py_XDECREF(number);
    Py_XDECREF(map);
    Py_XDECREF(where);
    if (cached->address != address) return NULL;
  }
  return cached->map;
}

static int launch(Entry *e, const uintptr_t *addresses) {
  /* On the stack: other threads may launch the same entry while the interpreter's lock is released. */
  _Alignas(64) uint8_t block[MAX_BLOCK];
  void *parameters[MAX_PARAMETERS];
  LaunchConfig config = e->config;
  memcpy(block, e->block, (size_t)e->block_bytes);
  for (int i = 0; i < TENSORS; i++) {
    const Slot *slot = &e->slots[i];
    if (slot->parameter < 0) continue;
    if (!slot->encode) {
      memcpy(block + slot->parameter, &addresses[i], sizeof addresses[i]);
    } else {
      const uint8_t *map = tensor_map(slot, addresses[i]);
      if (!map) return -1;
      memcpy(block + slot->parameter, map, TENSOR_MAP_BYTES);
    }
  }
  for (int i = 0; i < e->n_parameters; i++) parameters[i] = block + e->offsets[i];
  config.attributes = e->attributes;
  if (e->device.type == DL_CUDA && exchange->current_stream(DL_CUDA, e->device.id, &config.stream)) return -1;
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = launch_kernel(&config, e->function, parameters, NULL);
  Py_END_ALLOW_THREADS;
  if (status) PyErr_Format(PyExc_RuntimeError, "launching attention: cuLaunchKernelEx gave CUresult %d", status);
  return status ? -1 : 0;
}

static void drop(Entry *e);

static void leave(Entry *e) {
  if (--e->users == 0 && e->unlinked) drop(e);
}

/* Launch `e` into *out, or a new tensor where that is NULL, and into a new *lse where the entry has one. Gives references
   to both, also where it fails. */
static int compute(Entry *e, uintptr_t *addresses, PyObject **out, PyObject **lse) {
  *out = *out ? Py_NewRef(*out) : allocate(e->out_size, e->out_stride, e->out_dtype, &addresses[OUT]);
  if (!*out) return -1;
  if (e->has_lse && !(*lse = allocate(e->lse_size, e->lse_stride, e->lse_dtype, &addresses[OUT + 1]))) return -1;
  return launch(e, addresses);
}

/* The same into one new tensor, in which a node then tells the two apart. */
static int compute_together(Entry *e, const Entry *plan, uintptr_t *addresses, PyObject **both) {
  *both = allocate(plan->together_size, plan->together_stride, e->out_dtype, &addresses[OUT]);
  if (!*both) return -1;
  addresses[OUT + 1] = addresses[OUT] + (uintptr_t)plan->together.lse_offset * sizeof(float);
  return launch(e, addresses);
}

static void read_addresses(const DLTensor *t, uintptr_t *addresses) {
  for (int i = 0; i < GIVEN; i++)
    if (t[i].ndim >= 0) addresses[i <= OUT ? i : i + 1] = address_of(&t[i]);
}

/* (out, lse), or out alone. */
static PyObject *pack(PyObject *out, PyObject *lse) { return lse ? PyTuple_Pack(2, out, lse) : Py_NewRef(out); }

/* A call with gradients: launched first, so that forward has nothing to look at again. */
static PyObject *differentiate(Entry *e, PyObject *const *a, uintptr_t *addresses) {
  if (a[OUT] != Py_None || !e->apply) Py_RETURN_NONE;
  PyObject *given[] = {a[0], a[1], a[2], a[OUT + 1], a[OUT + 2]}, *result = NULL;
  Py_ssize_t count = a[OUT + 1] == Py_None && a[OUT + 2] == Py_None ? 3 : 5;
  AttachNode attach = attach_node; /* it may be changed meanwhile */
  PyObject *next = Py_NewRef(attach ? e->backward : e->apply);
  Entry *launched = e->forward;
  Pending call = {pending, given, NULL, NULL};
  int together = attach && e->together_size;
  launched->users++;
  if (together ? compute_together(launched, e, addresses, &call.out)
               : compute(launched, addresses, &call.out, &call.lse)) {
    /* it said why */
  } else if (attach) {
    if (!attach(given, count, call.out, call.lse, together ? &e->together : NULL, next, e->keeps, e->has_lse))
      result = pack(call.out, e->has_lse ? call.lse : NULL);
  } else {
    pending = &call;
    result = PyObject_Vectorcall(next, given, (size_t)count, NULL);
    pending = call.outer;
  }
  leave(launched);
  Py_XDECREF(call.out);
  Py_XDECREF(call.lse);
  Py_DECREF(next);
  return result;
}

/* attend(q, k, v, out, extra, extra, *options) -> what attention() returns, or None where the Python path has to
   serve. */
static PyObject *attend(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  (void)module;
  if (n < GIVEN || n > GIVEN + OPTIONS) {
    PyErr_SetString(PyExc_TypeError, "attend: expected q, k, v, out, two more tensors and options");
    return NULL;
  }
  DLTensor t[GIVEN];
  uintptr_t addresses[TENSORS] = {0};
  if (!view_all(a, t)) Py_RETURN_NONE;
  read_addresses(t, addresses);
  Entry *e = find(t, a + GIVEN, (int)n - GIVEN);
  if (!e || !addresses_fit(e, addresses) || !ordinary(e)) Py_RETURN_NONE;

  PyObject *out, *lse = NULL, *result = NULL;
  e->users++; /* what follows may let other threads run */
  if (needs_gradient(a)) {
    result = differentiate(e, a, addresses);
  } else {
    out = a[OUT] == Py_None ? NULL : a[OUT];
    if (!compute(e, addresses, &out, &lse)) result = pack(out, lse);
    Py_XDECREF(out);
    Py_XDECREF(lse);
  }
  leave(e);
  return result;
}

/* -- the forward pass of an autograd.Function --------------------------------------------------------------------- */

static void leave_handle(PyObject *handle) { leave(PyCapsule_GetPointer(handle, "entry")); }

/* ctx.save_for_backward(*tensors), given ctx and the tensors; or what that does. */
static int save(PyObject *const *a, Py_ssize_t n) {
  PyObject *done = NULL;
  int failed = 1;
  if (!saved_attribute)
    failed = !(done = PyObject_VectorcallMethod(name_save, a, (size_t)n, NULL));
  else if ((done = PyTuple_New(n - 1))) {
    for (Py_ssize_t i = 1; i < n; i++) PyTuple_SET_ITEM(done, i - 1, Py_NewRef(a[i]));
    failed = PyObject_SetAttr(a[0], saved_attribute, done);
  }
  Py_XDECREF(done);
  return failed;
}

/* forward(ctx, q, k, v[, extra, extra]), made by forward_of. */
static PyObject *forward(PyObject *self, PyObject *const *a, Py_ssize_t n) {
  Pending *call = pending;
  if (!call || !call->out || (n != 4 && n != 6) || memcmp(a + 1, call->given, (size_t)(n - 1) * sizeof *a))
    return PyObject_Vectorcall(PyTuple_GET_ITEM(self, 0), a, (size_t)n, NULL);
  int keeps = PyTuple_GET_ITEM(self, 1) == Py_True, gives_lse = PyTuple_GET_ITEM(self, 2) == Py_True;
  PyObject *out = call->out, *lse = call->lse, *result = NULL;
  call->out = call->lse = NULL;
  PyObject *kept[8];
  memcpy(kept, a, (size_t)n * sizeof *a);
  kept[n] = out;
  kept[n + 1] = lse;
  int failed = save(kept, keeps ? n + 2 : n);
  if (!failed && gives_lse) {
    PyObject *off[] = {a[0], Py_False};
    PyObject *done = PyObject_VectorcallMethod(name_materialize, off, 2, NULL);
    failed = !done;
    Py_XDECREF(done);
  }
  if (!failed) result = pack(out, gives_lse ? lse : NULL);
  Py_DECREF(out);
  Py_XDECREF(lse);
  return result;
}

static PyMethodDef forward_definition = {"forward", (PyCFunction)(void *)forward, METH_FASTCALL, NULL};

/* forward_of(otherwise, keeps, gives_lse) -> forward of a Function. Called on the way from `attend` it saves the tensors
   that it is given and, where it keeps them, the output and lse, and gives the output, or (output, lse). From elsewhere
   it is otherwise(ctx, q, k, v[, extra, extra]). */
static PyObject *forward_of(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *otherwise, *keeps, *gives_lse;
  if (!PyArg_ParseTuple(args, "OO!O!", &otherwise, &PyBool_Type, &keeps, &PyBool_Type, &gives_lse)) return NULL;
  return PyCFunction_New(&forward_definition, args);
}

/* -- adding and removing entries ---------------------------------------------------------------------------------- */

static void drop(Entry *e) {
  for (int i = 0; i < OPTIONS; i++) Py_XDECREF(e->options[i]);
  for (int i = 0; i < TENSORS; i++) {
    Py_XDECREF(e->slots[i].encode);
    PyMem_Free(e->slots[i].maps);
  }
  PyObject *owned[] = {e->out_size, e->out_stride, e->out_dtype, e->lse_size,
                       e->lse_stride, e->lse_dtype, e->apply, e->backward, e->together_size, e->together_stride};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) Py_XDECREF(owned[i]);
  PyMem_Free(e->block);
  PyMem_Free(e);
}

/* No more gradients by this entry; other code may run. */
static void forget_apply(Entry *e) {
  Entry *launched = e->forward;
  e->forward = NULL;
  Py_CLEAR(e->apply);
  Py_CLEAR(e->backward);
  if (launched) leave(launched);
}

static void retire(int age) {
  Entry *e = by_age[age];
  by_age[age] = NULL;
  if (!e) return;
  Entry **at = &buckets[e->bucket];
  while (*at != e) at = &(*at)->next;
  *at = e->next;
  e->unlinked = 1;
  e->users++;
  forget_apply(e);
  leave(e);
}

static PyObject *forget(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  for (int i = 0; i < MAX_ENTRIES; i++) retire(i);
  Py_RETURN_NONE;
}

static int read_numbers(PyObject *sequence, int64_t *into, Py_ssize_t most, const char *what) {
  Py_ssize_t n = PySequence_Size(sequence);
  if (n > most) PyErr_Format(PyExc_ValueError, "%s: expected at most %zd numbers, got %zd", what, most, n);
  if (n < 0 || n > most) return -1;
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject *item = PySequence_GetItem(sequence, i);
    into[i] = item ? PyLong_AsLongLong(item) : 0;
    Py_XDECREF(item);
    if (PyErr_Occurred()) return -1;
  }
  return (int)n;
}

static int read_launch(Entry *e, PyObject *grid_block_shared, PyObject *attributes, PyObject *offsets) {
  int64_t numbers[MAX_PARAMETERS];
  if (read_numbers(grid_block_shared, numbers, 5, "launch") != 5) return -1;
  for (int i = 0; i < 3; i++) e->config.grid[i] = (uint32_t)numbers[i];
  e->config.block[0] = (uint32_t)numbers[3];
  e->config.block[1] = e->config.block[2] = 1;
  e->config.shared = (uint32_t)numbers[4];
  Py_buffer buffer;
  if (PyObject_GetBuffer(attributes, &buffer, PyBUF_SIMPLE)) return -1;
  int fits = buffer.len <= (Py_ssize_t)sizeof e->attributes;
  if (fits) memcpy(e->attributes, buffer.buf, (size_t)buffer.len);
  e->config.n_attributes = (uint32_t)(buffer.len / (Py_ssize_t)sizeof *e->attributes);
  PyBuffer_Release(&buffer);
  if (!fits) PyErr_SetString(PyExc_ValueError, "attributes: too many");
  if (!fits || (e->n_parameters = read_numbers(offsets, numbers, MAX_PARAMETERS, "offsets")) < 0) return -1;
  for (int i = 0; i < e->n_parameters; i++) e->offsets[i] = (uint16_t)numbers[i];
  return 0;
}

static int read_slots(Entry *e, PyObject *slots) {
  for (int i = 0; i < TENSORS; i++) {
    PyObject *slot = PySequence_GetItem(slots, i), *encode;
    if (!slot) return -1;
    int ok = PyArg_ParseTuple(slot, "iO", &e->slots[i].parameter, &encode);
    Py_DECREF(slot);
    if (!ok) return -1;
    if (e->slots[i].parameter >= e->block_bytes) {
      PyErr_SetString(PyExc_ValueError, "slots: a parameter lies outside of the block");
      return -1;
    }
    if (encode != Py_None) {
      e->slots[i].encode = Py_NewRef(encode);
      e->slots[i].maps = PyMem_Calloc(MAPS, sizeof *e->slots[i].maps);
      if (!e->slots[i].maps) {
        PyErr_NoMemory();
        return -1;
      }
    }
  }
  return 0;
}

static void look_at(Entry *e, int i, const DLTensor *t) {
  Look *look = &e->looks[i];
  look->ndim = t->ndim;
  if (t->ndim < 0) return;
  look->dtype = t->dtype;
  int64_t reach = 0;
  for (int d = 0; d < t->ndim; d++) {
    look->shape[d] = t->shape[d];
    look->strides[d] = t->strides[d];
    reach += (t->shape[d] - 1) * t->strides[d];
  }
  e->span[i] = (reach + 1) * ((t->dtype.bits + 7) / 8);
}

/* add(tensors, options, aligned, extra_aligned, outputs, context, function, (gx, gy, gz, threads, shared), attributes,
       block, offsets, slots) -> handle for set_apply, or None: serve calls that look like this one from now
   on. `tensors` is (q, k, v, out, extra, extra), None = left out; `outputs` is (size, stride, dtype, lse size or None,
   lse stride, lse dtype); `slots` has (offset in the block or -1, encoder or None) for q, k, v, out, lse, extra, extra. */
static PyObject *add(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *tensors, *options, *outputs, *launch_numbers, *attributes, *offsets, *slots;
  unsigned long long context, function;
  const char *block;
  Py_ssize_t block_bytes;
  int aligned, extra_aligned;
  if (!PyArg_ParseTuple(args, "O!O!piO!KKOOy#OO", &PyTuple_Type, &tensors, &PyTuple_Type, &options, &aligned,
                        &extra_aligned, &PyTuple_Type, &outputs, &context, &function, &launch_numbers, &attributes,
                        &block, &block_bytes, &offsets, &slots))
    return NULL;
  if (PyTuple_GET_SIZE(tensors) != GIVEN || PyTuple_GET_SIZE(options) > OPTIONS || PyTuple_GET_SIZE(outputs) != 6
      || block_bytes > MAX_BLOCK) {
    PyErr_SetString(PyExc_ValueError, "add: a tuple of the wrong length, or too many parameters");
    return NULL;
  }
  DLTensor t[GIVEN];
  if (!view_all(&PyTuple_GET_ITEM(tensors, 0), t)) Py_RETURN_NONE;
  Entry *e = PyMem_Calloc(1, sizeof *e);
  if (!e) return PyErr_NoMemory();
  e->aligned = aligned;
  e->extra_aligned = extra_aligned;
  e->keys = thread_keys;
  e->context = (void *)(uintptr_t)context;
  e->function = (void *)(uintptr_t)function;
  e->block_bytes = (int)block_bytes;
  e->n_options = (int)PyTuple_GET_SIZE(options);
  for (int i = 0; i < e->n_options; i++) e->options[i] = Py_NewRef(PyTuple_GET_ITEM(options, i));
  PyObject **kept[] = {&e->out_size, &e->out_stride, &e->out_dtype, &e->lse_size, &e->lse_stride, &e->lse_dtype};
  for (int i = 0; i < 6; i++) *kept[i] = Py_NewRef(PyTuple_GET_ITEM(outputs, i));
  e->has_lse = e->lse_size != Py_None;
  for (int i = 0; i < GIVEN; i++) look_at(e, i, &t[i]);
  e->device = t[0].device;
  e->block = PyMem_Malloc((size_t)block_bytes + 1);
  if (!e->block) {
    drop(e);
    return PyErr_NoMemory();
  }
  memcpy(e->block, block, (size_t)block_bytes);
  if (read_launch(e, launch_numbers, attributes, offsets) || read_slots(e, slots)) {
    drop(e);
    return NULL;
  }
  retire(oldest);
  by_age[oldest] = e;
  oldest = (oldest + 1) % MAX_ENTRIES;
  e->bucket = bucket_of(t);
  e->next = buckets[e->bucket];
  buckets[e->bucket] = e;
  PyObject *handle = PyCapsule_New(e, "entry", leave_handle);
  if (handle) e->users++;
  return handle;
}

/* Lay the output and lse of `launched` out for e, whose callers do not see that lse. */
static int lay_together(Entry *e, const Entry *launched) {
  Together *t = &e->together;
  int64_t size = launched->looks[0].dtype.bits / 8, out = 1, lse = 1;
  if ((t->ndim = read_numbers(launched->out_size, t->shape, DIMS, "output")) < 0
      || read_numbers(launched->out_stride, t->strides, DIMS, "output") < 0
      || (t->lse_ndim = read_numbers(launched->lse_size, t->lse_shape, DIMS, "lse")) < 0
      || read_numbers(launched->lse_stride, t->lse_strides, DIMS, "lse") < 0)
    return -1;
  for (int i = 0; i < t->ndim; i++) out *= t->shape[i]; /* both are contiguous */
  for (int i = 0; i < t->lse_ndim; i++) lse *= t->lse_shape[i];
  int64_t before = (out * size + SECOND - 1) / SECOND * SECOND;
  t->lse_offset = before / (int64_t)sizeof(float);
  PyObject *numbers = Py_BuildValue("(L)", (long long)((before + lse * (int64_t)sizeof(float)) / size));
  Py_XSETREF(e->together_stride, Py_BuildValue("(i)", 1));
  Py_XSETREF(e->together_size, numbers);
  return e->together_size && e->together_stride ? 0 : -1;
}

/* set_apply(handle, handle of what is launched, apply, backward, keeps): apply(q, k, v[, extra, extra]), whose forward is
   one of forward_of, serves the calls of this entry that need gradients; or a node that runs `backward`, and keeps output
   and lse for it if `keeps`. */
static PyObject *set_apply(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *handle, *launched, *apply, *backward;
  int keeps;
  if (!PyArg_ParseTuple(args, "OOOOp", &handle, &launched, &apply, &backward, &keeps)) return NULL;
  Entry *e = PyCapsule_GetPointer(handle, "entry");
  Entry *forward = e ? PyCapsule_GetPointer(launched, "entry") : NULL;
  if (!forward) return NULL;
  forget_apply(e);
  if (!e->unlinked) {
    forward->users++;
    e->forward = forward;
    e->apply = Py_NewRef(apply);
    e->backward = Py_NewRef(backward);
    e->keeps = keeps;
    if (keeps && !e->has_lse && forward->has_lse && lay_together(e, forward)) return NULL;
  }
  Py_RETURN_NONE;
}

/* use_node(capsule): let the function in it make the graph nodes, or, with None, the autograd.Functions again. */
static PyObject *use_node(PyObject *module, PyObject *capsule) {
  (void)module;
  void *function = capsule == Py_None ? NULL : PyCapsule_GetPointer(capsule, "flashcore.node");
  if (!function && PyErr_Occurred()) return NULL;
  memcpy(&attach_node, &function, sizeof function);
  Py_RETURN_NONE;
}

/* setup(exchange capsule, Tensor, Parameter, empty_strided, forward_ad module, the attribute that save_for_backward sets or
   None, grad mode, cuCtxGetCurrent, cuLaunchKernelEx), the last three as addresses. */
static PyObject *setup(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *capsule, *tensor, *parameter, *empty, *level, *saved;
  unsigned long long mode, context, kernel;
  if (!PyArg_ParseTuple(args, "OO!O!OOOKKK", &capsule, &PyType_Type, &tensor, &PyType_Type, &parameter, &empty, &level,
                        &saved, &mode, &context, &kernel))
    return NULL;
  const DLExchange *x = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!x) return NULL;
  if (x->version.major != 1 || !x->from_py || !x->current_stream) {
    PyErr_Format(PyExc_RuntimeError, "DLPack %u.%u: expected 1.x", x->version.major, x->version.minor);
    return NULL;
  }
  exchange = x;
  tensor_type = (PyTypeObject *)Py_NewRef(tensor);
  parameter_type = (PyTypeObject *)Py_NewRef(parameter);
  empty_strided = Py_NewRef(empty);
  forward_ad = Py_NewRef(level);
  saved_attribute = saved == Py_None ? NULL : Py_NewRef(saved);
  name_level = PyUnicode_InternFromString("_current_level");
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  name_address = PyUnicode_InternFromString("address");
  name_save = PyUnicode_InternFromString("save_for_backward");
  name_materialize = PyUnicode_InternFromString("set_materialize_grads");
  grad_mode = (_Bool(*)(void))(uintptr_t)mode;
  get_context = (int (*)(void **))(uintptr_t)context;
  launch_kernel = (int (*)(const LaunchConfig *, void *, void **, void **))(uintptr_t)kernel;
  if (!name_level || !name_requires_grad || !name_address || !name_save || !name_materialize) return NULL;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"attend", (PyCFunction)(void *)attend, METH_FASTCALL, NULL},
    {"add", add, METH_VARARGS, NULL},
    {"forward_of", forward_of, METH_VARARGS, NULL},
    {"set_apply", set_apply, METH_VARARGS, NULL},
    {"use_node", use_node, METH_O, NULL},
    {"forget", forget, METH_NOARGS, NULL},
    {"setup", setup, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_flashcore_shim", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__flashcore_shim(void) { return PyModule_Create(&definition); }
