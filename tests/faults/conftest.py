"Hostile input wants Linux: children are forked, and their memory is read from /proc."
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from faults.harness import level

if not sys.platform.startswith('linux'): collect_ignore_glob = ['test_*.py']


@pytest.fixture
def ground():
    "An empty ground (see `faults.harness`) outside pytest's own temporary folder, whose name would tell the case."
    folder = Path(tempfile.mkdtemp(prefix='ground-'))
    yield level(folder)
    for top, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(top, name)): os.chmod(os.path.join(top, name), 0o700)
    shutil.rmtree(folder)
