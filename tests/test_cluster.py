"Studies on several machines: one writer for each run, engines by name, what is said of a folder, and what a start would do."
import json, os, shutil, signal, subprocess, sys, threading, warnings
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
import pandas as pd, pytest, torch
from processes import die_once, wait_until
from ssl_wikichurches import cli
from ssl_wikichurches.backbones.encoders import load_backbone, save_backbone
from ssl_wikichurches.data.files import LOCK, local_locks, one_writer, writer_of
from ssl_wikichurches.study import runs as runs_module
from ssl_wikichurches.study.cluster import Placed, SubmititExecutor, dask_executor, open_executor, shares, slurm_executor, slurm_options
from ssl_wikichurches.study.costs import cpu_joules, gpu_joules
from ssl_wikichurches.study.folders import error_line, versions, weights_mark
from ssl_wikichurches.study.plan import Cluster, RunsFailed, Study, load_study, read_study
from ssl_wikichurches.study.reader import load_run, open_study
from ssl_wikichurches.study.runs import run_study
from ssl_wikichurches.study.status import dry_run_text, exit_status, status_text, study_states

ROOT = Path(__file__).parent.parent

def frozen(folder, *models, **fields): return Study('s', data=str(folder), models=models or ('tiny-clip',), tiers=(), size=64, **fields)

def here(study, runs, pool=None):
    with ThreadPoolExecutor(1) as own: return run_study(study, runs, pool or own, device='cpu', progress=False)

@pytest.fixture(scope='module')
def done(drawn, tmp_path_factory): return here(frozen(drawn, 'tiny-clip', 'tiny-siglip'), tmp_path_factory.mktemp('runs'))

@pytest.fixture
def root(done, tmp_path): return Path(shutil.copytree(done, tmp_path/done.name))

# ---- one writer

HOLD = "import sys, time\nfrom ssl_wikichurches.data.files import one_writer\nwith one_writer(sys.argv[1]) as mine:\n    print(mine, flush=True)\n    time.sleep(600)"

def test_a_lock_does_not_outlive_its_process(tmp_path):
    other = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline()=='True\n' and writer_of(tmp_path)['pid']==other.pid
    with one_writer(tmp_path, wait=False) as mine: assert not mine
    other.send_signal(signal.SIGKILL); other.wait()
    assert writer_of(tmp_path)=={} and (tmp_path/LOCK).exists() # the file is left, and means nothing
    with one_writer(tmp_path) as mine: assert mine and writer_of(tmp_path)['pid']==os.getpid()

def test_who_waits_gets_it_when_it_is_given_back(tmp_path):
    got = []
    def want():
        with one_writer(tmp_path) as mine: got.append(mine)
    with one_writer(tmp_path):
        (t := threading.Thread(target=want)).start()
        assert not got
    t.join()
    assert got==[True]

MOUNTS = '/dev/a / ext4 rw 0 0\ns:/x /nfs nfs4 rw,local_lock=none 0 0\ns:/y /nfs/old nfs rw,nolock 0 0\ns:/z /mine nfs4 rw,local_lock=flock 0 0\nm@t:/a /lustre lustre rw,flock 0 0\nm@t:/b /lustre/local lustre rw,localflock 0 0\n'

@pytest.mark.parametrize('folder,why', [('/data',''), ('/nfs/a',''), ('/nfs/old/a','nolock'), ('/nfs/older',''), ('/mine','local_lock=flock'), ('/lustre/a',''), ('/lustre/local/a','without flock')])
def test_locks_that_do_not_reach_other_machines_are_known(folder, why): assert (why in local_locks(folder, MOUNTS)) and bool(why)==bool(local_locks(folder, MOUNTS))

def test_a_cluster_is_refused_where_locks_are_local(tmp_path, monkeypatch):
    from ssl_wikichurches.study import cluster
    monkeypatch.setattr(cluster, 'local_locks', lambda folder: 'NFS is mounted with nolock')
    with pytest.raises(ValueError, match='several machines could write the same run'):
        with open_executor(Study(cluster=dict(executor='slurm')), tmp_path): pass

def test_two_studies_started_at_once_compute_every_run_once(drawn, done, tmp_path, monkeypatch):
    counts,inner,together = [],runs_module._execute,threading.Barrier(2, timeout=600)
    def counted(run, *args):
        counts.append(run.name)
        if len(counts)<=2: together.wait() # both studies are at work, each on a run of its own
        inner(run, *args)
    monkeypatch.setattr(runs_module, '_execute', counted)
    with ThreadPoolExecutor(2) as both: roots = [*both.map(lambda _: here(frozen(drawn, 'tiny-clip', 'tiny-siglip'), tmp_path), range(2))]
    assert sorted(counts)==['tiny-clip-frozen','tiny-siglip-frozen'] and roots[0]==roots[1]
    assert not [*roots[0].glob('*/.*')]
    pd.testing.assert_frame_equal(open_study(roots[0]).levels(), open_study(done).levels(), check_exact=True)

def test_a_run_of_another_process_is_waited_for_and_taken_over_if_it_dies(drawn, tmp_path):
    study = frozen(drawn, 'tiny-clip', 'tiny-siglip')
    (folder := tmp_path/'s'/'tiny-clip-frozen').mkdir(parents=True)
    other = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(here, study, tmp_path)
        wait_until(lambda: (tmp_path/'s'/'tiny-siglip-frozen'/'run.json').is_file())
        assert not whole.done() and not (folder/'run.json').exists()
        other.kill(); other.wait()
        root = whole.result()
    assert open_study(root).missing==() and not [*root.glob('*/.*')]

# ---- what stops a study

def test_a_full_disk_is_said_and_the_study_goes_on_later(drawn, tmp_path, monkeypatch):
    study,kept = frozen(drawn, 'tiny-clip', 'tiny-siglip', 'tiny-mae'),runs_module.save_maps
    def full(path, stored):
        if 'siglip' in str(path): raise OSError(ENOSPC, os.strerror(ENOSPC), str(path))
        kept(path, stored)
    monkeypatch.setattr(runs_module, 'save_maps', full)
    with pytest.raises(RunsFailed, match='the disk is full: make room in .*and start the study again'): here(study, tmp_path)
    monkeypatch.setattr(runs_module, 'save_maps', kept)
    assert open_study(here(study, tmp_path)).missing==()

def test_a_lost_connection_is_said(drawn, tmp_path):
    class Lost(Executor):
        def submit(self, function, *args):
            (f := Future()).set_exception(CancelledError('lost'))
            return f
    with pytest.raises(RunsFailed, match='connection to those who compute was lost.*start the study again'): here(frozen(drawn), tmp_path, Lost())

# ---- of which data, weights and code

def test_weights_that_changed_under_the_same_name_are_noticed(drawn, tmp_path):
    backbone = load_backbone('tiny-clip')
    study = frozen(drawn, f"mine={save_backbone(backbone, tmp_path/'weights')}")
    root = here(study, tmp_path)
    facts = json.loads((root/'mine-frozen'/'run.json').read_text())
    assert facts['weights']==weights_mark(str(tmp_path/'weights')) and facts['weights'].startswith('sha256:')
    here(study, tmp_path)
    with torch.no_grad(): next(backbone.model.parameters()).add_(.01)
    save_backbone(backbone, tmp_path/'weights')
    with pytest.raises(ValueError, match='holds a run of other weights'): here(study, tmp_path)
    assert study_states(study, root).state.tolist()==['foreign']
    for f in ('recipe.json','run.json'): # as folders of before, which do not say
        d = json.loads((root/'mine-frozen'/f).read_text())
        (root/'mine-frozen'/f).write_text(json.dumps({k:v for k,v in d.items() if k!='weights'}))
    with pytest.warns(UserWarning, match='1 complete runs do not say of which weights'): here(study, tmp_path)
    assert load_run(root/'mine-frozen')[1] is None and open_study(root).recipe('mine-frozen').weights==''

def test_weights_that_change_while_a_study_runs_are_refused(drawn, tmp_path, monkeypatch):
    study = frozen(drawn, f"mine={save_backbone(load_backbone('tiny-clip'), tmp_path/'weights')}")
    marks = iter(('sha256:at the start','sha256:later'))
    monkeypatch.setattr(runs_module, 'weights_mark', lambda source: next(marks))
    with pytest.raises(RunsFailed, match='changed since the study was started: sha256:at the start then, sha256:later now'): here(study, tmp_path)

def test_folders_of_before_still_open_and_nothing_runs_again(root, monkeypatch):
    "Their recipes do not name weights, and their run.json has less."
    for f in root.glob('*/*.json'):
        d = json.loads(f.read_text())
        f.write_text(json.dumps({k:v for k,v in d.items() if k not in ('weights','peak_memory','device','joules','recipe')} if f.name=='run.json' else {k:v for k,v in d.items() if k!='weights'}))
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps({k:v for k,v in study.items() if k!='cluster'}))
    monkeypatch.setattr(runs_module, '_execute', lambda *a: pytest.fail('a run was computed again'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        here(read_study(root), root.parent)
    assert open_study(root).missing==() and len(open_study(root).levels())==24 and (study_states(read_study(root), root).state=='done').all()

def test_other_code_is_named(root):
    path = root/'tiny-clip-frozen'/'run.json'
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts|dict(versions=facts['versions']|dict(torch='2.0.0'))))
    with pytest.warns(UserWarning, match=r'1 complete runs are of other code \(torch 2.0.0\): tiny-clip-frozen'): here(read_study(root), root.parent)
    assert study_states(read_study(root), root).note.tolist()==['of other code: torch 2.0.0','']

def test_a_run_says_what_it_was_and_what_it_cost(done):
    facts = json.loads((done/'tiny-siglip-frozen'/'run.json').read_text())
    assert facts['seed']==0 and facts['recipe']=={} and len(facts['data_key'])==16 and facts['weights']==weights_mark('tiny-siglip') and facts['device']=='cpu'
    assert facts['peak_memory']>10**8 and facts['seconds']>0 and facts['versions']==versions()

class Counter:
    "NVIDIA's library, as far as it is asked."
    def __init__(self, broken=()): self.broken = broken
    def nvmlInit_v2(self): return 'init' in self.broken
    def nvmlDeviceGetHandleByUUID(self, uuid, handle): return uuid!=b'GPU-a'
    def nvmlDeviceGetTotalEnergyConsumption(self, handle, used): used._obj.value = 7500; return 'total' in self.broken

def test_energy_where_it_is_told(tmp_path):
    assert gpu_joules(['a','a'], Counter())==15. and gpu_joules(['b'], Counter()) is None and gpu_joules(['a'], Counter(('total',))) is None and gpu_joules(['a'], Counter(('init',))) is None
    assert cpu_joules(tmp_path) is None

# ---- engines

def test_what_a_cluster_asks_for():
    c = Cluster(executor='slurm', gpus=2, memory=16., hours=1.5, partition='gpu', slurm=dict(qos='high'))
    assert slurm_options(c, 'x')==dict(name='x', timeout_min=90, mem_gb=16., gpus_per_node=2, slurm_partition='gpu', slurm_additional_parameters=dict(qos='high'))
    assert shares(c)==2 and shares(c, 1)==1 and shares(Cluster(gpus=2))==1 and shares(Cluster(executor='dask', address='tcp://a:1', gpus=2))==2

@pytest.mark.parametrize('bad,match', [(dict(executor='pbs'),'expected one of local'), (dict(workers=-1),'at least 0'), (dict(address='tcp://a:1'),"executor is 'local'"), (dict(gpu=1),"unknown field 'gpu'"),
                                       (dict(memory='8'),'must be float'), (dict(slurm=3),'must be dict')])
def test_wrong_clusters(bad, match):
    with pytest.raises(ValueError, match=match): Study(cluster=bad)

def test_an_engine_that_is_not_installed_is_named(monkeypatch, tmp_path):
    for name,executor in (('distributed','dask'), ('submitit','slurm')):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"needs {name}.*ssl_wikichurches\[{executor}\]"):
            with open_executor(Study(cluster=dict(executor=executor)), tmp_path): pass

def test_jobs_of_a_queue_give_results_and_failures(tmp_path):
    with (pool := slurm_executor(Cluster(executor='slurm-local'), tmp_path, engine='local')).batch(): good,bad = pool.submit(abs, -3),pool.submit(int, 'x')
    assert good.result()==3
    with pytest.raises(Exception, match='invalid literal for int'): bad.result()

class FakeJob:
    def __init__(self): self.cancelled = False
    def done(self): return False
    def cancel(self): self.cancelled = True

def test_a_cancelled_future_cancels_its_job():
    job = FakeJob()
    class Engine:
        def submit(self, *a): return job
    SubmititExecutor(Engine(), poll=.01).submit(abs, 1).cancel()
    wait_until(lambda: job.cancelled)

class JobOfOnesOwn(FakeJob):
    over = False
    def done(self): return self.over
    def result(self): return 'done'

def test_an_engine_without_a_queue_has_so_many_jobs_at_a_time():
    begun = []
    class Engine:
        def submit(self, *a): begun.append(JobOfOnesOwn()); return begun[-1]
    pool = SubmititExecutor(Engine(), poll=.001, most=2)
    with pool.batch(): futures = [pool.submit(abs, k) for k in range(4)]
    wait_until(lambda: len(begun)==2)
    late = pool.submit(abs, 5) # not in the batch, and in the same line
    futures[3].cancel()
    for k in (0,1,2):
        assert len(begun)==2+k
        begun[k].over = True
        wait_until(lambda: len(begun)==min(4, 3+k))
    begun[3].over = True
    assert [f.result() for f in (*futures[:3],late)]==['done']*4 and len(begun)==4

def test_a_stopped_job_is_put_back_in_line():
    again = Placed(1).checkpoint(abs, -2)
    assert again.function(*again.args)==2

def test_a_dask_worker_that_is_killed_loses_nothing(tmp_path):
    with dask_executor(Cluster(executor='dask', workers=1, cpus=1)) as pool:
        assert pool.submit(die_once, str(tmp_path/'died')).result()!=os.getpid() and (tmp_path/'died').exists()

# ---- what is said before and while a study runs

def test_states_and_times(root, drawn):
    study = read_study(root)
    larger = replace(study, models=(*study.models,'tiny-mae','tiny-dinov2'))
    (root/'tiny-mae-frozen').mkdir()
    recipe = json.loads((root/'tiny-clip-frozen'/'recipe.json').read_text())
    (root/'tiny-mae-frozen'/'recipe.json').write_text(json.dumps(recipe|dict(model='tiny-mae', source='tiny-mae', weights='')))
    (root/'tiny-mae-frozen'/'error.txt').write_text('tiny-mae-frozen failed at 2026\n\nTraceback (most recent call last):\n  File "x"\nOSError: no disk\n\nWarnings and messages before it:\nnone\n')
    table = study_states(larger, root)
    assert table.state.tolist()==['done','done','failed','missing'] and table.note[2]=='OSError: no disk' and table.expected[3]==pytest.approx(table.seconds[:2].mean())
    assert status_text(table, 's').startswith('s: 2 of 4 runs done, 1 failed, 1 missing; about ') and exit_status(table)==1
    assert 'would start 2 runs here, in processes, 3 at a time' in dry_run_text(larger, table, 3)
    assert study_states(replace(study, geometry='crop'), root).state.tolist()==['foreign']*2
    assert exit_status(table[table.state=='done'])==0 and exit_status(table[table.state=='missing'])==3

def test_other_recipes_are_noticed_before_anything_starts(drawn, tmp_path):
    study = replace(frozen(drawn), tiers=('linear',), val=.3, recipes=dict(linear=dict(epochs=1)))
    root = here(study, tmp_path)
    states = study_states(replace(study, recipes=dict(linear=dict(epochs=2))), root)
    assert states.state.tolist()==['done','foreign'] and 'another recipe' in states.note[1]
    (root/'tiny-clip-linear-seed0'/'run.json').unlink()
    assert study_states(study, root).note[1]=='starts again'

@pytest.mark.parametrize('text,line', [('a run failed\n\nTraceback\n  File "x"\n    f()\nValueError: a\nb\n\nWarnings and messages before it:\nx: y','ValueError: a'), ('at noon a worker died\nmemory','at noon a worker died'), ('','')])
def test_the_line_of_an_error(text, line): assert error_line(text)==line

def test_commands(root, drawn, capsys, monkeypatch):
    study = read_study(root)
    (file := root.parent/'s.toml').write_text(f'name = "s"\ndata = "{drawn}"\nmodels = ["tiny-clip", "tiny-siglip"]\ntiers = []\nsize = 64\n[cluster]\nexecutor = "dask"\nworkers = 4\nmemory = 8\n')
    assert load_study(file).resources.memory==8.
    cli.wikichurches_study(str(file), runs=str(root.parent), dry_run=True)
    said = capsys.readouterr().out
    assert 's: 2 of 2 runs done' in said and 'would start 0 runs on dask, started here, 4 at a time, each with 8 GB' in said
    cli.wikichurches_status(str(root), watch=True)
    assert capsys.readouterr().out.startswith('s: 2 of 2 runs done')
    (root/'tiny-clip-frozen'/'run.json').unlink()
    with pytest.raises(SystemExit) as e: cli.wikichurches_status(str(root))
    assert e.value.code==3 and '1 stopped' in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: cli.wikichurches_study(str(file), runs=str(root.parent), size=96, dry_run=True)
    assert e.value.code==1 and 'would refuse: 2 folders' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['wikichurches_study', str(file), '--runs', str(root.parent), '--dry-run', '--executor=slurm'])
    cli.wikichurches_study()
    assert 'would start 1 runs on slurm' in capsys.readouterr().out

def test_checks_for_a_gpu_run_at_toy_size(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT/'benchmarks'/'gpu.py'), '--toy', '--only', 'capture,metrics,resume', '--out', str(tmp_path/'r.json')], capture_output=True, text=True)
    assert done.returncode==0, done.stdout+done.stderr
    rows = json.loads((tmp_path/'r.json').read_text())['rows']
    assert len(rows)==4 and all(ok for *_,ok in rows) and 0<=rows[0][1]<1e-5
