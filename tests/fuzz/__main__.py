"""The longer run: python -m tests.fuzz [pytest's options]"""

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), "--hypothesis-profile=long", *sys.argv[1:]]))
