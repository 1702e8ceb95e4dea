#include <torch/csrc/stable/library.h>

#include "cpu/simd.h"

namespace pyfast_xai {
namespace {

template <class Machine>
PYFAST_XAI_INLINE int64_t vector_bytes_on() {
  return Machine::kBytes;
}
PYFAST_XAI_ON_EACH_MACHINE(int64_t, vector_bytes, (), ())

// Returns the instruction set of the copy that the loader picked.
int64_t picked_vector_bytes() { return vector_bytes(); }

}  // namespace
}  // namespace pyfast_xai

STABLE_TORCH_LIBRARY_FRAGMENT(pyfast_xai, m) { m.def("vector_bytes() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(pyfast_xai, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&pyfast_xai::picked_vector_bytes));
}
