// Cache blocks of a product, for the instruction sets that meet very different caches.
//
// On x86 the sizes are constants of the microkernel: every core with AVX2 has caches of a like size. Arm cores with SVE
// range from 512 KiB of second-level cache (Graviton) over 1 and 2 MiB (Neoverse V1, V2) to 8 MiB for twelve cores
// (A64FX), and their vectors from 128 to 512 bits.
#pragma once
#include "cpu/features.h"
#include "cpu/kernels.h"

namespace pytrain::cpu {

// Sets block_rows, block_depth and block_columns from the tile and the caches:
//
// block_depth: a panel of each operand takes at most three quarters of the first-level cache, so that the one of a
// stays there while those of b pass through; a multiple of 64, from 128 (less would show the loading and storing of c)
// to 512. A64FX: (12 + 32) * 4 bytes a step, 48 KiB: 279, so 256.
// block_columns: a task's panels of b take at most a quarter of the core's share of the second level; block_rows: its
// panels of a half of that. Another quarter is for c and what comes next. From 2 and 4 tiles on, at most 16 and 12 of
// them, so that there are tasks for every core. A64FX: 8 MiB / 12 cores, 1 KiB a vector: 160 columns, 84 rows.
//
// Products of bf16 and chains of fp16 have as many words in a panel, each of two elements of k, by their own tiles.
// Of the three only block_depth touches the order of addition. Where the system does not say how large its caches are,
// the microkernel's own sizes stay.
void fit_blocks(Kernels* kernels, const Features& features);

}  // namespace pytrain::cpu
