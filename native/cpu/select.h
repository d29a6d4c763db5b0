// Which instruction set's kernels run: the best that was built and that this CPU has, or the one that PYTRAIN_ISA
// names.
#pragma once
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cpu/kernels.h"

namespace pytrain::cpu {

struct Isa {
    const char* name;
    const char* needs;         // what the CPU must have, in words
    void (*fill)(Kernels*);    // null where this build has left the instruction set out
    bool supported;            // by this CPU and its operating system
    bool fits_caches = false;  // its cache blocks are fitted to this machine (cpu/blocks.h)

    bool built() const { return fill != nullptr; }
    bool available() const { return built() && supported; }
};

// Every instruction set that pytrain knows for this architecture, best first; the last is scalar, always available.
std::vector<Isa> list_isas(const Features& features);

// The whole table of one instruction set. Throws Error where the name is unknown (it lists the right ones), the build
// lacks it or the CPU does.
Kernels kernels_of(const std::string& name);

// The table for this process. The first call chooses and later ones return the same; throws Error where PYTRAIN_ISA
// names none that can run.
const Kernels& chosen_kernels();

// The same table with products of fp16 matrices in chains of fp16 multiply-adds. Throws Error where it has none.
Kernels with_fp16_chains(Kernels kernels);

}  // namespace pytrain::cpu
