// Failed checks are C++ exceptions with one sentence; the bindings turn them into Python's.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace pytrain {

// What every native check throws. The message names the argument or tensor and the values that disagree.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// The parts, written one after another.
template <class... Parts>
std::string message(Parts&&... parts) {
    std::ostringstream stream;
    (stream << ... << std::forward<Parts>(parts));
    return stream.str();
}

// Throws Error(message(parts...)) unless the condition holds. The message is only put together on failure.
template <class... Parts>
void check(bool condition, Parts&&... parts) {
    if (!condition) throw Error(message(std::forward<Parts>(parts)...));
}

}  // namespace pytrain
