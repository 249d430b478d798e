// What tests ask the shim that the kernels are compiled with.
#include "cuda_shim.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void shim_set_schedule(int schedule) {
    shim::schedule = schedule;
}

EXPORT const char* shim_failure() {
    return shim::failure.c_str();
}

// The counters, in the order of their declaration, which begin at zero again.
EXPORT void shim_take_counters(int64_t* counters) {
    memcpy(counters, &shim::counters, sizeof shim::counters);
    shim::counters = {};
}

// Which entry of an operand, 'a', 'b' or 'd', a lane holds in an element.
EXPORT void shim_entry(char operand, bool tf32, int lane, int element, int* row, int* col) {
    const shim::Entry entry = operand == 'a'   ? shim::entry_of_a(tf32, lane, element)
                              : operand == 'b' ? shim::entry_of_b(tf32, lane, element)
                                               : shim::entry_of_d(lane, element);
    *row = entry.row;
    *col = entry.col;
}
