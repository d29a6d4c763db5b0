// Memory, queues and plain data of the CPU device.
#include "cpu/cpu_device.h"

#include <cstring>

#include "core/philox.h"
#include "cpu/attention.h"
#include "cpu/matmul.h"
#include "cpu/pieces.h"
#include "cpu/rows.h"

namespace pytrain::cpu {

namespace {
constexpr std::int64_t kCopyBytes = std::int64_t{1} << 20;  // of one task: plain copies are bound by memory alone
}

CpuDevice::CpuDevice(const Kernels& kernels, int threads) : kernels_(kernels), workspace_(memory_, threads) {
    workspace_.reserve(rows_workspace(0));
    workspace_.reserve(matmul_workspace(kernels_));
}

void* CpuDevice::allocate(std::size_t bytes, MemoryKind kind) { return memory_.allocate(bytes, kind); }
void CpuDevice::release(void* pointer) { memory_.release(pointer); }
void* CpuDevice::allocate_pinned(std::size_t bytes) { return memory_.allocate(bytes, MemoryKind::staging); }
void CpuDevice::release_pinned(void* pointer) { memory_.release(pointer); }
std::size_t CpuDevice::bytes_in_use(MemoryKind kind) const { return memory_.bytes_in_use(kind); }
std::size_t CpuDevice::bytes_peak(MemoryKind kind) const { return memory_.bytes_peak(kind); }

void CpuDevice::reserve(std::int64_t, std::int64_t width, std::int64_t head_size) {
    workspace_.reserve(rows_workspace(width));
    workspace_.reserve(attention_workspace(kernels_, head_size));
}

// Operations are done when they return: there is nothing to wait for and nothing for a queue or an event to hold.
Queue* CpuDevice::compute_queue() { return nullptr; }
Queue* CpuDevice::communication_queue() { return nullptr; }
Event* CpuDevice::record(Queue*) { return nullptr; }
void CpuDevice::wait(Queue*, Event*) {}
bool CpuDevice::done(Event*) { return true; }
void CpuDevice::synchronize(Event*) {}
void CpuDevice::release(Event*) {}

void CpuDevice::copy(void* destination, const void* source, std::size_t bytes, Queue*) {
    for_pieces(workspace_, static_cast<std::int64_t>(bytes), kCopyBytes, [=](const Piece& piece) {
        std::memcpy(static_cast<char*>(destination) + piece.first, static_cast<const char*>(source) + piece.first,
                    static_cast<std::size_t>(piece.n));
    });
}

void CpuDevice::zero(void* destination, std::size_t bytes, Queue*) {
    for_pieces(workspace_, static_cast<std::int64_t>(bytes), kCopyBytes, [=](const Piece& piece) {
        std::memset(static_cast<char*>(destination) + piece.first, 0, static_cast<std::size_t>(piece.n));
    });
}

void CpuDevice::convert(Tensor destination, Tensor source, std::int64_t n, Queue*) {
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        const float* const row = read_row(kernels_, source, piece.first, piece.n, piece.scratch(0));
        kernels_.narrow[static_cast<int>(destination.dtype)](destination.at(piece.first).data, row, piece.n);
    });
}

void CpuDevice::add(Tensor destination, Tensor source, std::int64_t n, Queue*) {
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        float* const sum = update_row(kernels_, destination, piece.first, piece.n, piece.scratch(0));
        kernels_.add(sum, read_row(kernels_, source, piece.first, piece.n, piece.scratch(1)), piece.n);
        write_row(kernels_, destination, piece.first, piece.n, sum);
    });
}

void CpuDevice::fill_normal(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key,
                            std::int64_t first, float deviation, Queue*) {
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        float* const row = output_row(destination, piece.first, piece.scratch(0));
        std::array<double, 4> normals{};
        for (std::int64_t i = 0; i < piece.n; ++i) {
            const auto element = static_cast<std::uint64_t>(first + piece.first + i);
            if (i == 0 || element % 4 == 0) normals = philox_normals(seed, key, element / 4);
            row[i] = static_cast<float>(static_cast<double>(deviation) * normals[element % 4]);
        }
        write_row(kernels_, destination, piece.first, piece.n, row);
    });
}

void CpuDevice::fill(Tensor destination, std::int64_t n, float value, Queue*) {
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        float* const row = output_row(destination, piece.first, piece.scratch(0));
        std::fill(row, row + piece.n, value);
        write_row(kernels_, destination, piece.first, piece.n, row);
    });
}

void CpuDevice::matmul(const Matmul& product, Queue*) { cpu::matmul(kernels_, workspace_, product); }

void CpuDevice::attention_forward(const Attention& attention, Queue*) {
    cpu::attention_forward(kernels_, workspace_, attention);
}

void CpuDevice::attention_backward(const Attention& attention, Tensor dq, Tensor dk, Tensor dv, Tensor dout,
                                   float* delta, Queue*) {
    cpu::attention_backward(kernels_, workspace_, attention, dq, dk, dv, dout, delta);
}

}  // namespace pytrain::cpu
