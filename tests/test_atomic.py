"Files that are whole or absent, and workers that do not outlive the program that started them."
import os, signal, subprocess, sys, time
import pytest
from ssl_wikichurches.data import files
from ssl_wikichurches.data.files import available_cores, thread_share, worker_pool, write_file

def test_a_worker_is_another_process_and_starts_as_told(tmp_path):
    with worker_pool(1, os.chdir, tmp_path) as pool:
        assert pool.submit(os.getpid).result()!=os.getpid() and pool.submit(os.getcwd).result()==str(tmp_path)
    assert 1<=available_cores()<=os.cpu_count()

@pytest.mark.parametrize('limit,workers,threads', [('',1,8), ('',3,2), ('',9,1), ('1',1,1), ('3',2,3), ('6',2,4), ('0',2,4), ('2,1',2,4)])
def test_threads_of_a_worker(limit, workers, threads, monkeypatch):
    "Of eight cores; a limit that is none, or a list for nested regions, is left to those who set it."
    monkeypatch.setenv('OMP_NUM_THREADS', limit); monkeypatch.setattr(files, 'available_cores', lambda: 8)
    assert thread_share(workers)==threads

def test_workers_end_with_their_parent(tmp_path):
    (tmp_path/'go.py').write_text("import os, time\nfrom ssl_wikichurches.data.files import worker_pool\n"
        "if __name__=='__main__':\n    pool = worker_pool(1)\n    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, str(tmp_path/'go.py')], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL); parent.wait()
    for _ in range(100):
        try: os.kill(worker, 0)
        except ProcessLookupError: return
        if 'State:\tZ' in open(f'/proc/{worker}/status').read(): return # ended, and not collected yet
        time.sleep(.1)
    pytest.fail('the worker outlived its parent')

def test_what_fails_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path/'a').write_text('old')
    def save(path): path.write_text('half'); raise OSError('full')
    with pytest.raises(OSError, match='full'): write_file(tmp_path/'a', save)
    assert (tmp_path/'a').read_text()=='old'
