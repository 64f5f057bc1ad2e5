// The arithmetic of decoding, compiled for each target; a file of its own, so that it compiles beside its schedule.
#include "decode.h"

#define KERNEL "decode_kernels.h"
#include "targets.h"

const grpoforge::Arithmetic& grpoforge::decode_arithmetic() {
    static const Arithmetic* const best = CHOSEN(arithmetic);
    return *best;
}
