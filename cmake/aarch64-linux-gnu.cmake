# Cross-building for 64-bit Arm Linux with the compilers of Debian's and Ubuntu's g++-aarch64-linux-gnu. The wheel:
#
#     SKBUILD_CMAKE_ARGS=-DCMAKE_TOOLCHAIN_FILE=$PWD/cmake/aarch64-linux-gnu.cmake \
#         _PYTHON_HOST_PLATFORM=linux-aarch64 pip wheel --no-deps .
#
# CPython's headers do not differ between 64-bit Linux architectures: those of the building machine serve, and the wheel
# is for its version of Python.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

if(Python_EXECUTABLE)
  set(interpreter ${Python_EXECUTABLE})
else()
  set(interpreter python3)
endif()
execute_process(COMMAND ${interpreter} -c "import sys, sysconfig; print(sysconfig.get_paths()['include'], '%d%d' % sys.version_info[:2])"
  OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE " " ";" found "${found}")
list(GET found 0 Python_INCLUDE_DIR)
list(GET found 1 version)
set(Python_SOABI "cpython-${version}-aarch64-linux-gnu")
set(PYTHON_MODULE_EXTENSION ".${Python_SOABI}.so")  # pybind11's name for it
