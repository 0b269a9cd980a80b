// The module caps_kernels._cpp: loading it registers the ops of namespace caps_kernels_cpp with torch. Its own
// functions choose the instruction set, which is otherwise the best that the processor has.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <caps/op.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace caps {
namespace {

#define CAPS_NAME(isa) #isa,
constexpr const char* kNames[] = {CAPS_FOR_EACH_ISA(CAPS_NAME)};

bool supports(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool found[] = {v2, v3, v4};
  return found[isa];
#else
  return isa == 0;
#endif
}

int best_isa() {
  int best = 0;
  for (int isa = 0; isa < kIsaCount; ++isa) best = supports(isa) ? isa : best;
  return best;
}

std::atomic<int> chosen_isa{best_isa()};
std::atomic<int64_t> innermost_bytes{std::max(sysconf(_SC_LEVEL1_DCACHE_SIZE), 0L)};

// Of a larger cache no more is asked for: others use it too.
int64_t usable_outer_cache() {
  constexpr int64_t usual = int64_t{32} << 20;
  const int64_t known = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return known > 0 ? std::min(known, usual) : usual;
}

std::atomic<int64_t> outer_bytes{usable_outer_cache()};

constexpr int64_t kLargePage = int64_t{2} << 20;

// Memory in large pages as far as it fills them, if the system has any: fewer translations of addresses, and what lies
// together lies so in the caches too. It has a mapping of its own, because what an allocator hands out may lie in small
// pages already; an address sanitizer sees only its own allocator.
#if defined(MADV_HUGEPAGE) && !defined(__SANITIZE_ADDRESS__)
constexpr bool kMaps = true;

// Mappings end where a page does, of which the largest usual ones have 64 KiB.
int64_t whole_pages(int64_t bytes) { return (bytes + 65535) / 65536 * 65536; }

void* map_memory(int64_t asked) {
  const int64_t bytes = whole_pages(asked), mapped = bytes + kLargePage;
  void* memory = mmap(nullptr, size_t(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  char *begin = static_cast<char*>(memory), *aligned = begin + -reinterpret_cast<uintptr_t>(begin) % kLargePage;
  if (aligned > begin) munmap(begin, size_t(aligned - begin));
  if (aligned + bytes < begin + mapped) munmap(aligned + bytes, size_t(begin + mapped - aligned - bytes));
  madvise(aligned, size_t(bytes / kLargePage * kLargePage), MADV_HUGEPAGE);
  return aligned;
}

void unmap_memory(void* memory, int64_t bytes) { munmap(memory, size_t(whole_pages(bytes))); }
#else
constexpr bool kMaps = false;

void* map_memory(int64_t) { return nullptr; }
void unmap_memory(void*, int64_t) {}
#endif

// Grows to the largest size asked for, and gives memory beyond `kKept` back when `kPatience` requests in a row have
// asked for no more than that: a backward may need more than the forwards it takes turns with.
struct Buffer {
  static constexpr int64_t kKept = int64_t{64} << 20;
  static constexpr int kPatience = 16;
  void* data = nullptr;
  int64_t size = 0;
  int smaller = 0;  // requests in a row for no more than kKept

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  static bool mapped(int64_t bytes) { return kMaps && bytes >= kLargePage; }

  void release() {
    if (mapped(size)) unmap_memory(data, size);
    else std::free(data);
    data = nullptr;
    size = 0;
  }

  void* get(int64_t bytes) {
    smaller = bytes > kKept ? 0 : smaller < kPatience ? smaller + 1 : smaller;
    const bool too_large = size > kKept && smaller == kPatience;
    if (bytes > size || too_large) {
      release();
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      data = mapped(rounded) ? map_memory(rounded) : std::aligned_alloc(64, size_t(rounded));
      if (data == nullptr) throw std::bad_alloc();
      size = rounded;
    }
    return data;
  }
};

PyObject* isa_names(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (int isa = 0; names != nullptr && isa < kIsaCount; ++isa) {
    if (!supports(isa)) continue;
    PyObject* name = PyUnicode_FromString(kNames[isa]);
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* get_isa(PyObject*, PyObject*) { return PyUnicode_FromString(kNames[chosen_isa.load()]); }

PyObject* set_isa(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (std::strcmp(name, kNames[isa]) == 0 && supports(isa)) {
      chosen_isa = isa;
      Py_RETURN_NONE;
    }
  }
  return PyErr_Format(PyExc_ValueError, "this processor cannot run instruction set '%s'", name);
}

template <std::atomic<int64_t>& setting>
PyObject* get_bytes(PyObject*, PyObject*) {
  return PyLong_FromLongLong(setting.load());
}

template <std::atomic<int64_t>& setting>
PyObject* set_bytes(PyObject*, PyObject* args) {
  long long bytes = 0;
  if (!PyArg_ParseTuple(args, "L", &bytes)) return nullptr;
  setting = bytes;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa_names", isa_names, METH_NOARGS, "The instruction sets this processor can run, the best last."},
    {"get_isa", get_isa, METH_NOARGS, "The instruction set in use."},
    {"set_isa", set_isa, METH_VARARGS, "Use an instruction set of isa_names()."},
    {"get_innermost_cache", get_bytes<innermost_bytes>, METH_NOARGS, "Bytes of the innermost data cache, or 0."},
    {"set_innermost_cache", set_bytes<innermost_bytes>, METH_VARARGS, "Cut work for a cache of so many bytes."},
    {"get_outer_cache", get_bytes<outer_bytes>, METH_NOARGS, "Bytes of the cache that cores share, at most 32 MiB."},
    {"set_outer_cache", set_bytes<outer_bytes>, METH_VARARGS, "Choose regimes for a cache of so many bytes."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpp", "C++ kernels for the CPU.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

int64_t innermost_cache() { return innermost_bytes.load(std::memory_order_relaxed); }
int64_t outer_cache() { return outer_bytes.load(std::memory_order_relaxed); }

int current_isa() { return chosen_isa.load(std::memory_order_relaxed); }

void* scratch(Scratch slot, int64_t bytes) {
  thread_local Buffer buffers[2];
  return buffers[int(slot)].get(bytes);
}

}  // namespace caps

PyMODINIT_FUNC PyInit__cpp() { return PyModule_Create(&caps::module); }
