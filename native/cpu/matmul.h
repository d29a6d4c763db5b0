// Products of matrices on the CPU: packed panels, tiles of an instruction set, tasks cut by shape alone.
#pragma once
#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "device.h"

namespace pytrain::cpu {

// What any product needs, whatever its shape.
WorkspaceNeed matmul_workspace(const Kernels& kernels);

// See Matmul in device.h. a, b, c, bias, residual and activated may each have any storage type.
//
// An element of c is a sum over blocks of at most block_depth along k, each summed from zero in ascending order and
// added in ascending order; so it depends on its row of op(a), its column of op(b) and k alone: not on m, n, the
// threads, or where a task begins. A 16-bit c is summed in fp32 and rounded once. `activated` is computed from c as
// stored, so that computing it again from c gives the same bits. residual may not be c (that is `accumulate`),
// activated may. FLOPs: 2*m*n*k, which bind for all but skinny products; those (m a few rows) are bound by reading b
// once.
void matmul(const Kernels& kernels, Workspace& workspace, const Matmul& product);

}  // namespace pytrain::cpu
