// The Python module vitapack._C: what csrc/*.cpp compiles to. Each file binds its own functions.

#include <pybind11/pybind11.h>

void bind_emd(pybind11::module_& m);  // auction.cpp
void bind_int8(pybind11::module_& m);  // bind.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU parts of vitapack; the public functions are in vitapack.kernels.";
  bind_emd(m);
  bind_int8(m);
}
