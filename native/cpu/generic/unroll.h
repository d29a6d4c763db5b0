// What compilers are told to do, since arrays and pairs of vectors that are not in registers cost a multiple.
//
// PYTRAIN_UNROLL before a loop of constant length: unroll it whole, so that arrays indexed by it stay in registers.
#pragma once

#if defined(__clang__)
#define PYTRAIN_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PYTRAIN_UNROLL _Pragma("GCC unroll 32")
#else
#define PYTRAIN_UNROLL
#endif

// In the place of `inline`: always.
#if defined(__GNUC__)
#define PYTRAIN_INLINED __attribute__((always_inline)) inline
#else
#define PYTRAIN_INLINED inline
#endif
