"""Write the COCO data set of an annotated folder, and print what it took; a process of its own.

python bench/annotation_export.py OUT PICTURES
"""

import json
import sys
import time
from pathlib import Path

from gesso_services.cli.annotated_sets import write_set


def _peak() -> int:
    """Bytes. What ``getrusage`` tells holds the peak of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def main() -> None:
    out, pictures = map(Path, sys.argv[1:])
    begun = time.perf_counter()
    target = write_set(out, pictures, "coco")
    said = {
        "seconds": time.perf_counter() - begun,
        "peak": _peak(),
        "annotations": len(json.loads(target.read_text())["annotations"]),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
