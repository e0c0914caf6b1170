"What the other scripts here say of memory."
import re
from pathlib import Path

def peak_megabytes():
    "Largest memory that this process has had, in MiB: VmHWM and not ru_maxrss, which starts from the memory of the process that started this one."
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
