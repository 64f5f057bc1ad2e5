// Includes the file KERNEL, whose vectors (floats.h) have the size of this target's registers, in a namespace of its own;
// CHOSEN(name) is a thing in it.
#if defined(__AVX512DQ__)
#define REGISTER_BYTES 64
#elif defined(__AVX2__)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif
namespace target {
#include "floats.h"
#include KERNEL
}  // namespace target
#define CHOSEN(name) (&target::name)
