// The AVX-512 row kernels with AMX tiles (Sapphire Rapids and later): COMPILED, NEVER RUN.
//
// The same panels: 16 channels of a step are a tile register's row of 64 bytes, 256 apart.

#include "int8_engine.h"

namespace vitapack {
const Kernels* kernels_amx() { return nullptr; }
}  // namespace vitapack
