// The choice of an instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace guardspace {

// The kernels in use and the name of their instruction set: the best that the CPU has, or the one that GUARDSPACE_ISA
// names. Throws std::invalid_argument if it names none of supported_isas().
const Kernels& kernels();
const char* isa();

std::vector<std::string> supported_isas();
bool amd();                             // whether AMD made the CPU
void use_isa(const std::string& name);  // for the whole process

}  // namespace guardspace
