#include "shim/streams.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

namespace pytrain::shim {

// Held by whoever queues work or runs it: a progress thread waits for copies while kernels are waited for elsewhere.
// There is one machine, so that work of two streams takes turns. Work may wait for another stream's: hence recursive.
std::recursive_mutex& machine_mutex() {
    static std::recursive_mutex one;
    return one;
}
using Turn = std::lock_guard<std::recursive_mutex>;

// Work in order. `done` counts what ran since the beginning, `queued` what was ever queued.
struct Stream {
    std::deque<std::function<void()>> work;
    std::int64_t queued = 0, done = 0;

    void run_until(std::int64_t end) {
        const Turn turn(machine_mutex());
        while (done < end) {
            const std::function<void()> next = std::move(work.front());
            work.pop_front();
            ++done;
            next();
        }
    }
};

void enqueue(Stream* stream, std::function<void()> work) {
    const Turn turn(machine_mutex());
    stream->work.push_back(std::move(work));
    ++stream->queued;
}

namespace {
int devices = 1;
}

void set_devices(int count) { devices = count; }

}  // namespace pytrain::shim

using pytrain::shim::enqueue;

struct hipEventState {
    hipStream_t stream = nullptr;
    std::int64_t position = 0;
};

namespace {
hipError_t outcome() { return pytrain::shim::take_failure() ? hipErrorLaunch : hipSuccess; }

// Whole pages, filled with NaN: device memory is not zeroed by itself.
hipError_t allocate(void** pointer, std::size_t bytes) {
    const std::size_t pages = (bytes + 4095) / 4096 * 4096;
    *pointer = std::aligned_alloc(4096, pages);
    if (*pointer == nullptr) return hipErrorOutOfMemory;
    std::memset(*pointer, 0xff, pages);
    return hipSuccess;
}

hipError_t release(void* pointer) {
    std::free(pointer);
    return hipSuccess;
}
}  // namespace

const char* hipGetErrorString(hipError_t error) {
    switch (error) {
        case hipSuccess:
            return "success";
        case hipErrorOutOfMemory:
            return "out of memory";
        case hipErrorNoDevice:
            return "no ROCm-capable device is detected";
        case hipErrorNotReady:
            return "not ready";
        case hipErrorLaunch:
            return "not all threads reached a barrier or an exchange, LDS exceeds 64 KiB, or a 16-byte access is "
                   "misaligned";
    }
    return "unknown";
}
hipError_t hipGetLastError() { return hipSuccess; }
hipError_t hipGetDeviceCount(int* count) {
    *count = pytrain::shim::devices;
    return *count > 0 ? hipSuccess : hipErrorNoDevice;
}
hipError_t hipGetDeviceProperties(hipDeviceProp_t* properties, int) {
    std::snprintf(properties->name, sizeof properties->name, "shim");
    std::snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "shim");
    return hipSuccess;
}
hipError_t hipSetDevice(int) { return hipSuccess; }
hipError_t hipMallocManaged(void** pointer, std::size_t bytes, unsigned) { return allocate(pointer, bytes); }
hipError_t hipMemAdvise(const void*, std::size_t, hipMemoryAdvise, int) { return hipSuccess; }
hipError_t hipFree(void* pointer) { return release(pointer); }
hipError_t hipHostMalloc(void** pointer, std::size_t bytes, unsigned) { return allocate(pointer, bytes); }
hipError_t hipHostFree(void* pointer) { return release(pointer); }
hipError_t hipMemset(void* pointer, int value, std::size_t bytes) {
    std::memset(pointer, value, bytes);
    return hipSuccess;
}
hipError_t hipMemcpyAsync(void* to, const void* from, std::size_t bytes, hipMemcpyKind, hipStream_t stream) {
    enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return hipSuccess;
}
hipError_t hipMemsetAsync(void* pointer, int value, std::size_t bytes, hipStream_t stream) {
    enqueue(stream, [=] { std::memset(pointer, value, bytes); });
    return hipSuccess;
}
hipError_t hipStreamCreateWithFlags(hipStream_t* stream, unsigned) {
    *stream = new pytrain::shim::Stream;
    return hipSuccess;
}
hipError_t hipStreamSynchronize(hipStream_t stream) {
    stream->run_until(stream->queued);
    return outcome();
}
hipError_t hipStreamDestroy(hipStream_t stream) {
    delete stream;
    return hipSuccess;
}
hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned) {
    enqueue(stream, [other = event->stream, position = event->position] { other->run_until(position); });
    return hipSuccess;
}
hipError_t hipEventCreateWithFlags(hipEvent_t* event, unsigned) {
    *event = new hipEventState;
    return hipSuccess;
}
hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) {
    const pytrain::shim::Turn turn(pytrain::shim::machine_mutex());
    *event = {stream, stream->queued};
    return hipSuccess;
}
// Time passes while somebody looks: each look that finds work undone gets one piece of it done, for the next look.
hipError_t hipEventQuery(hipEvent_t event) {
    const pytrain::shim::Turn turn(pytrain::shim::machine_mutex());
    hipStream_t const stream = event->stream;
    if (stream->done >= event->position) return outcome();
    stream->run_until(stream->done + 1);
    return hipErrorNotReady;
}
hipError_t hipEventSynchronize(hipEvent_t event) {
    event->stream->run_until(event->position);
    return outcome();
}
hipError_t hipEventDestroy(hipEvent_t event) {
    delete event;
    return hipSuccess;
}
