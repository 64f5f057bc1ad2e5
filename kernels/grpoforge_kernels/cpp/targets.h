// Includes the file KERNEL once for each target, inside a namespace of the target's name; `chosen(a, b, c)` is the one of
// three things that this processor can run.
//
// GCC splits wide vectors by the target of the function they stand in before it makes the copies of `target_clones`; so
// code with vectors is compiled for a target from its first line on. (Its macros, __AVX2__ and so on, do not follow the
// pragma.)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GRPOFORGE_NO_CLONES)

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define REGISTER_BYTES 64
namespace v4 {
#include "floats.h"
#include KERNEL
}  // namespace v4
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#undef REGISTER_BYTES
#define REGISTER_BYTES 32
namespace v3 {
#include "floats.h"
#include KERNEL
}  // namespace v3
#pragma GCC pop_options
#undef REGISTER_BYTES
#define REGISTER_BYTES 16
namespace base {
#include "floats.h"
#include KERNEL
}  // namespace base

template <typename T>
static T chosen(T newest, T newer, T any) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        return newest;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? newer : any;
}
#define CHOSEN(name) chosen(&v4::name, &v3::name, &base::name)

#else

#if defined(__AVX512DQ__)
#define REGISTER_BYTES 64
#elif defined(__AVX2__)
#define REGISTER_BYTES 32
#else
#define REGISTER_BYTES 16
#endif
namespace base {
#include "floats.h"
#include KERNEL
}  // namespace base
#define CHOSEN(name) (&base::name)

#endif
