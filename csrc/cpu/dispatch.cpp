// Chooses the instruction set, once: the best that the CPU has, or the one that GUARDSPACE_ISA names.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace guardspace {

// The build says which of them its compiler knows: GUARDSPACE_HAS_<isa>.
namespace baseline {
extern const Kernels kTable;
}
#if defined(GUARDSPACE_HAS_avx2)
namespace avx2 {
extern const Kernels kTable;
}
#endif
#if defined(GUARDSPACE_HAS_avx512)
namespace avx512 {
extern const Kernels kTable;
}
#endif
#if defined(GUARDSPACE_HAS_avx512_bf16)
namespace avx512_bf16 {
extern const Kernels kTable;
}
#endif

namespace {

struct Isa {
    const char* name;
    bool supported;
    const Kernels* kernels;
};

// Best first; the baseline is last and everywhere.
const std::vector<Isa>& all() {
    static const std::vector<Isa> isas = [] {
        [[maybe_unused]] bool avx2 = false, avx512 = false, avx512_bf16 = false;
#if defined(__x86_64__)
        __builtin_cpu_init();
        avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
        return std::vector<Isa>{
#if defined(GUARDSPACE_HAS_avx512_bf16)
            {"avx512_bf16", avx512_bf16, &avx512_bf16::kTable},
#endif
#if defined(GUARDSPACE_HAS_avx512)
            {"avx512", avx512, &avx512::kTable},
#endif
#if defined(GUARDSPACE_HAS_avx2)
            {"avx2", avx2, &avx2::kTable},
#endif
            {"baseline", true, &baseline::kTable},
        };
    }();
    return isas;
}

const Isa& find(const std::string& name) {
    std::string names;
    for (const Isa& isa : all()) {
        if (!isa.supported) continue;
        if (name == isa.name) return isa;
        names += (names.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument("GUARDSPACE_ISA must be one of " + names + " on this CPU, got " + name);
}

const Isa& initial() {
    const char* wanted = std::getenv("GUARDSPACE_ISA");
    if (wanted && *wanted) return find(wanted);
    for (const Isa& isa : all()) {
        if (isa.supported) return isa;
    }
    return all().back();
}

const Isa*& chosen() {
    static const Isa* isa = &initial();
    return isa;
}

struct Buffer {
    void* memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
};

}  // namespace

const Kernels& kernels() {
    return *chosen()->kernels;
}
const char* isa() {
    return chosen()->name;
}
void use_isa(const std::string& name) {
    chosen() = &find(name);
}

bool amd() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : all()) {
        if (isa.supported) names.push_back(isa.name);
    }
    return names;
}

void* workspace(size_t bytes) {
    static thread_local Buffer buffer;
#if defined(__SANITIZE_ADDRESS__)
    bool enough = false;  // of exactly the size asked for, so that one byte too far is seen
#else
    bool enough = buffer.size >= bytes;
#endif
    if (!enough) {
        std::free(buffer.memory);
        buffer = {};
        if (posix_memalign(&buffer.memory, 64, bytes ? bytes : 1)) {
            buffer.memory = nullptr;
            throw std::bad_alloc();
        }
        buffer.size = bytes;
    }
    return buffer.memory;
}

}  // namespace guardspace
