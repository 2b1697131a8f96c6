#!/usr/bin/env bash
# filelock 3.29.0 (2026): a forked child that drops the lock it inherited gives back its parent's lock.
#
# A process holds a FileLock and forks, as a DataLoader with workers does. The child deletes its copy of the object. The
# lock object's destructor then unlocks the file for both: a third process gets the lock while the parent still says
# that it holds it. From 3.30.0 on the child's copy does nothing. PyTorch asks for any filelock.
#
# Seen, Linux, Python 3.11:
#   filelock 3.29.0: before the fork refused, afterwards taken, the parent says True
#   filelock 3.30.0: before the fork refused, afterwards refused, the parent says True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/held.py" <<'PYTHON'
import importlib.metadata
import os
import subprocess
import sys
import tempfile

import filelock

path = os.path.join(tempfile.mkdtemp(dir=sys.argv[1]), "lock")
ATTEMPT = """
import sys, filelock
try:
    filelock.FileLock(sys.argv[1]).acquire(timeout=0)
    print("taken")
except filelock.Timeout:
    print("refused")
"""


def another_process():
    return subprocess.run([sys.executable, "-c", ATTEMPT, path], capture_output=True, text=True).stdout.strip()


lock = filelock.FileLock(path)
lock.acquire()
before = another_process()
child = os.fork()
if child == 0:
    del lock
    os._exit(0)
os.waitpid(child, 0)
version = importlib.metadata.version("filelock")
print(f"filelock {version}: before the fork {before}, afterwards {another_process()}, the parent says {lock.is_locked}")
PYTHON
said=""
for version in 3.29.0 3.30.0; do
    python3 -m pip install --quiet --disable-pip-version-check --target "$folder/$version" "filelock==$version"
    said+=$(PYTHONPATH="$folder/$version" python3 "$folder/held.py" "$folder")$'\n'
done
printf '%s' "$said"
expected="filelock 3.29.0: before the fork refused, afterwards taken, the parent says True
filelock 3.30.0: before the fork refused, afterwards refused, the parent says True
"
[ "$said" = "$expected" ] || { echo "filelock behaves otherwise now" >&2; exit 1; }
