"Processes that a test starts, and what becomes of those that they start."
import os, signal, subprocess, time
from contextlib import contextmanager
from pathlib import Path

def children(pid):
    "Processes started by `pid`, and by those."
    out = subprocess.run(['ps','-e','-o','pid=,ppid='], capture_output=True, text=True).stdout
    of = {}
    for line in out.splitlines():
        a,b = map(int, line.split())
        of.setdefault(b, []).append(a)
    found,queue = [],[pid]
    while queue:
        more = of.get(queue.pop(), [])
        found += more; queue += more
    return found

def alive(pid):
    "Whether a process runs: one that has ended and waits to be collected does not."
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]!='Z'
    except (FileNotFoundError, ProcessLookupError): return False

def broken():
    "What a process may be asked to do, without anything to import for it."
    raise OSError('no such thing')

def die_once(marker):
    "Kill the process that computes, the first time; its number, the second."
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()

def wait_until(happened, most=1800):
    "Until something has happened. The bound only ends a test that would hang: it is far above what any machine needs."
    stop = time.monotonic()+most
    while not happened():
        if time.monotonic()>stop: raise TimeoutError(f'nothing happened in {most} s')
        time.sleep(.02)

@contextmanager
def as_a_worker(workers):
    "As many threads as a worker has in a pool of so many: training then gives the same bits as there."
    import torch
    from ssl_wikichurches.data.files import thread_share
    n = torch.get_num_threads()
    torch.set_num_threads(thread_share(workers))
    try: yield
    finally: torch.set_num_threads(n)
