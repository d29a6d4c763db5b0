// Streams of the shim: what was queued runs when somebody waits for it.
#pragma once
#include <functional>

#include "shim/shim.h"

namespace pytrain::shim {

void enqueue(Stream* stream, std::function<void()> work);
bool take_failure();  // whether a launch failed since the last call
void set_devices(int count);

}  // namespace pytrain::shim
