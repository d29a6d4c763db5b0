# The HIP device of the native module (included by CMakeLists.txt), in one of four ways:
#   OFF    none: `device = "hip"` is refused in a sentence
#   ON     kernels compiled by hipcc for PYTRAIN_HIP_ARCHITECTURES
#   SHIM   the same kernel files compiled by the host compiler over tests/hip/shim, and the shim's controls as
#          _native.hip_shim: for tests only, never for a wheel. PYTRAIN_SHIM_LANES: lanes that run together, 64 as on
#          AMD GPUs, or 32 as on NVIDIA's
#   CUDA   the same kernel files compiled by nvcc for PYTRAIN_CUDA_ARCHITECTURES, over CUDA's run time: to try them on an
#          NVIDIA GPU
# PYTRAIN_ROCBLAS: runs may ask for rocBLAS's matrix products (`run.hip_products`). A SHIM build always has a stand-in.
option(PYTRAIN_ROCBLAS "Link rocBLAS, for runs that ask for its matrix products" OFF)
if(PYTRAIN_ROCBLAS AND (NOT PYTRAIN_HIP OR PYTRAIN_HIP STREQUAL "CUDA"))
  message(FATAL_ERROR "PYTRAIN_ROCBLAS=ON needs PYTRAIN_HIP=ON: it is the HIP device that rocBLAS multiplies for.")
endif()
set(rocblas_definition "")
if(PYTRAIN_ROCBLAS OR PYTRAIN_HIP STREQUAL "SHIM")
  set(rocblas_definition PYTRAIN_ROCBLAS)
endif()
set(PYTRAIN_HIP_ARCHITECTURES gfx90a CACHE STRING "GPUs that kernels are compiled for")
set(PYTRAIN_CUDA_ARCHITECTURES sm_90 CACHE STRING "GPUs that kernels are compiled for with PYTRAIN_HIP=CUDA")
set(PYTRAIN_SHIM_LANES 64 CACHE STRING "With PYTRAIN_HIP=SHIM, lanes that run together: 64 or 32")

file(GLOB hip_sources CONFIGURE_DEPENDS native/hip/*.cpp)
file(GLOB hip_kernels CONFIGURE_DEPENDS native/hip/kernels/*.hip)
file(GLOB hip_headers CONFIGURE_DEPENDS native/hip/*.h native/core/*.h native/device.h)

if(PYTRAIN_HIP STREQUAL "SHIM")
  file(GLOB shim_sources CONFIGURE_DEPENDS tests/hip/shim/*.cpp)
  list(APPEND shim_sources tests/hip/shim/rocblas/rocblas.cpp)
  target_sources(_native PRIVATE ${hip_sources} ${shim_sources} ${hip_kernels})
  # Sixteen floats are one value, longjmp crosses stacks on purpose, and registers hold bits of any type. The other sources
  # are compiled as ever, so that a compiler cache knows them.
  set_source_files_properties(${hip_sources} ${hip_kernels} ${shim_sources} PROPERTIES
    COMPILE_DEFINITIONS "PYTRAIN_HIP_SHIM;PYTRAIN_SHIM_LANES=${PYTRAIN_SHIM_LANES};${rocblas_definition}"
    INCLUDE_DIRECTORIES "${CMAKE_SOURCE_DIR}/tests/hip;${CMAKE_SOURCE_DIR}/tests/hip/shim")
  set_source_files_properties(${hip_sources} ${shim_sources} PROPERTIES
    COMPILE_OPTIONS "-Wno-psabi;-U_FORTIFY_SOURCE;-fno-strict-aliasing")
  set_source_files_properties(${hip_kernels} PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-xc++;-O2;-Wno-psabi;-U_FORTIFY_SOURCE;-fno-strict-aliasing")
  set_source_files_properties(native/bindings/module.cpp native/bindings/bind_hip.cpp PROPERTIES
    COMPILE_DEFINITIONS "PYTRAIN_HIP;PYTRAIN_HIP_SHIM;PYTRAIN_SHIM_LANES=${PYTRAIN_SHIM_LANES}"
    INCLUDE_DIRECTORIES ${CMAKE_SOURCE_DIR}/tests/hip
    COMPILE_OPTIONS -Wno-psabi)
elseif(PYTRAIN_HIP STREQUAL "CUDA")
  find_program(PYTRAIN_NVCC nvcc REQUIRED)
  file(REAL_PATH ${PYTRAIN_NVCC} nvcc)
  execute_process(COMMAND ${nvcc} -dryrun -x cu -E /dev/null OUTPUT_VARIABLE plan ERROR_VARIABLE plan)
  if(NOT plan MATCHES "_HERE_=([^\n]+)\n")
    message(FATAL_ERROR "PYTRAIN_HIP=CUDA: '${nvcc} -dryrun' does not say where it lies: ${plan}")
  endif()
  get_filename_component(toolkit ${CMAKE_MATCH_1}/.. ABSOLUTE)  # nvcc may be a script elsewhere
  find_path(PYTRAIN_CUDA_INCLUDE cuda_runtime.h HINTS ${toolkit} PATH_SUFFIXES include REQUIRED)
  find_library(PYTRAIN_CUDART cudart_static HINTS ${toolkit} PATH_SUFFIXES lib64 lib REQUIRED)
  set(hip_objects "")
  set(targets "")
  foreach(architecture IN LISTS PYTRAIN_CUDA_ARCHITECTURES)
    string(REPLACE sm_ compute_ virtual ${architecture})
    list(APPEND targets -gencode=arch=${virtual},code=${architecture})
  endforeach()
  set(strict "")
  if(PYTRAIN_WERROR)
    set(strict -Werror=all-warnings)
  endif()
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/cuda)
  foreach(kernel IN LISTS hip_kernels)
    get_filename_component(name ${kernel} NAME_WE)
    set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
    # What registers and spills there are is in ${name}.txt beside it.
    add_custom_command(OUTPUT ${object}
      COMMAND sh -c "\"$@\" >$0 2>&1 || { cat $0; exit 1; }" ${CMAKE_BINARY_DIR}/cuda/${name}.txt
        ${nvcc} -x cu -std=c++17 ${targets} -O3 --expt-relaxed-constexpr ${strict} -Xptxas=-v
        -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra -DPYTRAIN_HIP_CUDA -I${CMAKE_SOURCE_DIR}/native
        -c ${kernel} -o ${object}
      DEPENDS ${kernel} ${hip_headers} VERBATIM)
    list(APPEND hip_objects ${object})
  endforeach()
  target_sources(_native PRIVATE ${hip_sources} ${hip_objects})
  target_include_directories(_native SYSTEM PRIVATE ${PYTRAIN_CUDA_INCLUDE})
  set_source_files_properties(${hip_sources} native/bindings/bind_hip.cpp PROPERTIES
    COMPILE_DEFINITIONS "PYTRAIN_HIP;PYTRAIN_HIP_CUDA")
  target_link_libraries(_native PRIVATE ${PYTRAIN_CUDART} ${CMAKE_DL_LIBS} rt)
elseif(PYTRAIN_HIP)
  find_program(PYTRAIN_HIPCC hipcc REQUIRED)
  set(hip_objects "")
  set(offload "")
  foreach(architecture IN LISTS PYTRAIN_HIP_ARCHITECTURES)
    list(APPEND offload --offload-arch=${architecture})
  endforeach()
  foreach(kernel IN LISTS hip_kernels)
    get_filename_component(name ${kernel} NAME_WE)
    set(object ${CMAKE_BINARY_DIR}/hip/${name}.o)
    file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/hip)
    # HIP_PLATFORM: with nvcc on the path hipcc would otherwise turn into it.
    add_custom_command(OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E env HIP_PLATFORM=amd ${PYTRAIN_HIPCC} ${offload} -O3 -std=c++17 -fPIC -Wall -Wextra
        -I${CMAKE_SOURCE_DIR}/native -c -x hip ${kernel} -o ${object}
      DEPENDS ${kernel} ${hip_headers} VERBATIM)
    list(APPEND hip_objects ${object})
  endforeach()
  find_library(PYTRAIN_AMDHIP amdhip64 HINTS ENV ROCM_PATH PATH_SUFFIXES lib REQUIRED)
  find_path(PYTRAIN_HIP_INCLUDE hip/hip_runtime.h HINTS ENV ROCM_PATH PATH_SUFFIXES include REQUIRED)
  target_sources(_native PRIVATE ${hip_sources} ${hip_objects})
  target_include_directories(_native SYSTEM PRIVATE ${PYTRAIN_HIP_INCLUDE})
  set_source_files_properties(${hip_sources} native/bindings/bind_hip.cpp PROPERTIES
    COMPILE_DEFINITIONS "PYTRAIN_HIP;__HIP_PLATFORM_AMD__;${rocblas_definition}")
  target_link_libraries(_native PRIVATE ${PYTRAIN_AMDHIP})
  if(PYTRAIN_ROCBLAS)
    find_library(PYTRAIN_ROCBLAS_LIBRARY rocblas HINTS ENV ROCM_PATH PATH_SUFFIXES lib REQUIRED)
    find_path(PYTRAIN_ROCBLAS_INCLUDE rocblas/rocblas.h HINTS ENV ROCM_PATH PATH_SUFFIXES include REQUIRED)
    target_include_directories(_native SYSTEM PRIVATE ${PYTRAIN_ROCBLAS_INCLUDE})
    target_link_libraries(_native PRIVATE ${PYTRAIN_ROCBLAS_LIBRARY})
  endif()
endif()
