"Studies that are interrupted, changed, broken or spread over executors."
import json, logging, re, shutil, signal, subprocess, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, pyarrow.parquet as pq, pytest, torch
from safetensors.torch import load_file
from brief import BRIEF, brief, here
from processes import alive, as_a_worker, children, wait_until
from statsmodels.stats.multitest import multipletests
from ssl_wikichurches.finetune import full as full_module
from ssl_wikichurches.study import runs as runs_module
from ssl_wikichurches.cli import compose_study, read_recipes
from ssl_wikichurches.study.plan import DEMO, Run, RunsFailed, Study, load_study, one_line, study_runs
from ssl_wikichurches.study.runs import execute, evaluate_maps, run_study
from ssl_wikichurches.finetune.training import StyleModel, predict
from ssl_wikichurches.study.detail import example_images, examples
from ssl_wikichurches.study.report import load_examples, save_results, write_report
from ssl_wikichurches.attention.maps import load_maps
from ssl_wikichurches.study.analysis import analyse
from ssl_wikichurches.study.reader import load_run, open_study
from ssl_wikichurches.study.tables import robustness_table, study_table

@pytest.fixture
def done(finished): return finished

@pytest.fixture
def root(done, tmp_path): return Path(shutil.copytree(done, tmp_path/done.name))

# ---- what a study leaves behind

def test_files_of_a_run(done):
    assert {p.name for p in done.iterdir() if p.is_dir()}=={r.name for r in study_runs(open_study(done).study, '')}
    common = {'recipe.json','maps.safetensors','metrics.parquet','means.parquet','features.safetensors','run.json'}
    for p in done.glob('*/'):
        depth = {'received.parquet'} if p.name.startswith('tiny-siglip') else set()
        assert {f.name for f in p.iterdir()}-{'best.safetensors'}==common|depth|(set() if p.name.endswith('frozen') else {'history.csv','model.safetensors','predictions.csv'})
        facts = json.loads((p/'run.json').read_text())
        assert facts['n_measured']==12 and facts['versions']['torch'] and facts['processor']
    table = pd.read_parquet(done/'tiny-clip-lora-seed0'/'metrics.parquet')
    assert not table.duplicated(['image','block','head','metric']).any()
    assert table.groupby(['block','head','metric']).image.nunique().eq(12).all() and table.block.nunique()==4

def test_table_of_a_study(done):
    t = study_table(open_study(done))
    assert list(zip(t.model, t.tier))==[(m,k) for m in ('tiny-clip','tiny-siglip') for k in ('linear','lora','full')]
    linear = t.tier=='linear'
    assert (t.note[linear]=='identical by construction').all() and (t['shift'][linear]==0).all() and t.p[linear].isna().all()
    assert (t['shift'][~linear]!=0).all() and t.p_holm[~linear].notna().all() and (t.n==12).all() and t.accuracy.between(0,1).all()
    for metric,block,head in (('auroc',0,'mean'), ('coverage',-1,'3')): assert len(study_table(open_study(done), metric, block, head))==6
    with pytest.raises(ValueError, match="metric 'iuo'"): study_table(open_study(done), 'iuo')

def test_other_metrics_gain_towards_what_is_better(done):
    t = robustness_table(open_study(done), ('auroc','kl')).set_index(['model','tier','metric'])
    for metric,sign in dict(auroc=1, kl=-1).items():
        d = study_table(open_study(done), metric).query("tier!='linear'").set_index(['model','tier']).d_z
        for k,v in d.items(): assert t.gain[(*k,metric)]==pytest.approx(sign*v)

@pytest.mark.parametrize('tier', ['frozen','linear','lora','full'])
def test_a_run_is_rebuilt_to_the_last_bit(done, tier):
    folder = done/('tiny-siglip-frozen' if tier=='frozen' else f'tiny-siglip-{tier}-seed0')
    backbone,classifier = load_run(folder)
    data,_ = runs_module.prepare_run(Run(**json.loads((folder/'recipe.json').read_text())), done)
    (found,_),kept = evaluate_maps(backbone, data),load_maps(folder)
    assert found.images==kept.images and found.header==kept.header
    for k in ('maps','prefix','received','artifacts'): assert torch.equal(getattr(found, k).float(), getattr(kept, k))
    if tier=='frozen': assert classifier is None
    else:
        state = load_file(folder/'model.safetensors')
        assert torch.equal(classifier.weight, state['classifier.weight'])
        logits,t = predict(StyleModel(backbone, classifier), data.loader('eval'))
        assert json.loads((folder/'run.json').read_text())['scores']['eval']['accuracy']==pytest.approx((logits.argmax(1)==t).double().mean().item())

def test_metrics_can_be_computed_again_from_the_maps(done):
    from ssl_wikichurches.data.churches import ChurchDataset, church_id, eval_transform
    from ssl_wikichurches.data.download import load_churches
    from ssl_wikichurches.attention.scores import score_maps
    stored = load_maps(done/'tiny-clip-full-seed0')
    names,maps = stored.images,stored.maps
    items = ChurchDataset(load_churches(open_study(done).study.data), names, eval_transform(64))
    again = score_maps(maps, [i['boxes'] for i in items], names, 64, [church_id(n) for n in names]).sort_values('metric', kind='stable', ignore_index=True)
    pd.testing.assert_frame_equal(again, pd.read_parquet(done/'tiny-clip-full-seed0'/'metrics.parquet'), check_dtype=False, check_exact=True)

def test_a_metric_is_one_group_of_rows_and_means_stand_beside(done):
    "What each file holds is the same; only the reading differs."
    folder = done/'tiny-siglip-lora-seed0'
    table,file = pd.read_parquet(folder/'metrics.parquet'),pq.ParquetFile(folder/'metrics.parquet')
    groups = [file.read_row_group(i).column('metric').unique().to_pylist() for i in range(file.num_row_groups)]
    assert groups==[[m] for m in sorted(table.metric.unique())] and [*table.columns]==['image','block','head','metric','value','chance','ceiling']
    means = pd.read_parquet(folder/'means.parquet').set_index(['image','block'])
    assert [*dict.fromkeys(means.index.get_level_values('image'))]==list(load_maps(folder).images)
    for (metric,),d in table[table['head']=='mean'].groupby(['metric']):
        d = d.set_index(['image','block'])
        for column,name in (('value',metric), ('chance',f'{metric}|chance'), ('ceiling',f'{metric}|ceiling')):
            pd.testing.assert_series_equal(means[name].dropna(), d[column].reindex(means.index).dropna(), check_names=False, check_exact=True)
    assert len(means.columns)==3*table.metric.nunique()

def test_images_and_their_churches_stand_in_the_folder_of_the_study(done):
    images = pd.read_csv(done/'images.csv')
    split = json.loads((done/'split.json').read_text())
    assert images.image.tolist()==split['eval'] and images.church.tolist()==[n.partition('_')[0] for n in split['eval']]

# ---- interrupted and started again

def test_only_what_is_missing_runs(root, monkeypatch):
    before,started = study_table(open_study(root)), []
    monkeypatch.setattr(runs_module, 'execute', lambda run, *a: started.append(run.name) or execute(run, *a))
    here(open_study(root).study, root.parent)
    assert started==[]
    for name in ('tiny-clip-lora-seed0','tiny-siglip-full-seed0'): (root/name/'run.json').unlink()
    shutil.rmtree(root/'tiny-siglip-full-seed0'); (root/'tiny-clip-lora-seed0'/'.maps.safetensors.99999').write_bytes(b'half a fi')
    assert [*open_study(root).missing]==['tiny-clip-lora-seed0','tiny-siglip-full-seed0']
    here(open_study(root).study, root.parent)
    assert started==['tiny-clip-lora-seed0','tiny-siglip-full-seed0']
    pd.testing.assert_frame_equal(study_table(open_study(root)), before, check_exact=True)
    assert not list(root.glob('*/.*'))

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc, to see whether the workers have ended')
def test_kill_minus_nine_in_the_middle(drawn, tmp_path):
    """The process is killed while a training is under way and a run is whole; its workers end themselves, and the study of its folder, begun again,
    ends with the weights and the table of one that was not killed."""
    command = [str(Path(sys.executable).with_name('wikichurches_study')), '--name', 'killed', '--data', str(drawn), '--models', 'tiny-clip', '--tiers', 'linear,full', '--workers', '2',
               '--size', '64', '--val', '.3', '--recipe', 'linear.epochs=2,full.epochs=20', '--runs', str(tmp_path/'a')]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    root,other = tmp_path/'a'/'killed',tmp_path/'b'/'killed'
    full = root/'tiny-clip-full-seed0'
    wait_until(lambda: (full/'checkpoint.safetensors').is_file() and list(root.glob('*/run.json')) or process.poll() is not None)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL); process.wait()
    finished = {p:p.stat().st_mtime_ns for p in root.glob('*/run.json')}
    assert 1<=len(finished)<3 and len(workers)>=2 and (full/'checkpoint.safetensors').is_file()
    wait_until(lambda: not any(map(alive, workers)))
    with as_a_worker(2):
        for runs in ('a','b'): here(open_study(root).study, tmp_path/runs)
    assert not open_study(root).missing and all(p.stat().st_mtime_ns==t for p,t in finished.items())
    assert not (full/'checkpoint.safetensors').is_file() and len(pd.read_csv(full/'history.csv'))==20
    ours,theirs = (load_file(r/full.name/'model.safetensors') for r in (root, other))
    assert ours.keys()==theirs.keys() and all(torch.equal(v, theirs[k]) for k,v in ours.items())
    pd.testing.assert_frame_equal(study_table(open_study(root)), study_table(open_study(other)), check_exact=True)

def test_a_worker_that_dies_is_named_and_finished_runs_stay(drawn, tmp_path):
    study,full = brief(drawn, models=('tiny-clip',), tiers=('linear','full')),tmp_path/'brief'/'tiny-clip-full-seed0'
    def die_in(run, root, *args): # as a worker does that has begun
        if run.tier!='full': return execute(run, root, *args)
        (folder := Path(root)/run.name).mkdir()
        (folder/'recipe.json').write_text(json.dumps(asdict(run)))
        raise BrokenProcessPool('gone')
    class Dying(ThreadPoolExecutor):
        def submit(self, f, run, *args): return super().submit(die_in, run, *args)
    with Dying(1) as pool, pytest.raises(RunsFailed, match='fewer workers.*error.txt') as failure:
        run_study(study, tmp_path, pool, device='cpu', progress=False)
    assert isinstance(failure.value.__cause__, BrokenProcessPool)
    assert 'a worker process died' in (full/'error.txt').read_text()
    assert [str(p.parent.name) for p in full.parent.glob('*/error.txt')]==[full.name] # of runs that are whole there is nothing to say
    assert not (full/'run.json').exists() and len(list(full.parent.glob('*/run.json')))==2
    here(study, tmp_path)
    assert not list(full.parent.glob('*/error.txt'))

def test_one_failing_run_does_not_stop_the_others(drawn, tmp_path):
    study = brief(drawn, models=('tiny-clip','lost=some/folder that is not there'), tiers=('lora',))
    with pytest.raises(RunsFailed, match='2 of 4 runs failed.*lost-frozen: ValueError.*lost-frozen/error.txt'): here(study, tmp_path)
    assert [*open_study(tmp_path/'brief').missing]==['lost-frozen','lost-lora-seed0']
    assert set(study_table(open_study(tmp_path/'brief')).model)=={'tiny-clip'}
    assert 'lost-lora-seed0' in write_report(analyse(open_study(tmp_path/'brief'))).read_text()

def test_a_failing_run_leaves_its_trace_until_it_succeeds(drawn, tmp_path, monkeypatch):
    "Traceback, warnings and messages in error.txt; nothing of an attempt that succeeds; a folder of another run is left alone."
    study = brief(drawn, models=('tiny-clip',), tiers=('full',))
    folder,fit = tmp_path/'brief'/'tiny-clip-full-seed0',full_module.fit_full
    def no_memory(*args):
        warnings.warn('the memory is nearly full')
        logging.getLogger('some.library').error('step 3')
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nCompile with `TORCH_USE_CUDA_DSA`')
    monkeypatch.setattr(full_module, 'fit_full', no_memory)
    with pytest.raises(RunsFailed) as failure: here(study, tmp_path)
    said = str(failure.value)
    assert f'tiny-clip-full-seed0: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. (see {folder}/error.txt)' in said and '\n' not in said
    assert isinstance(failure.value.__cause__, torch.OutOfMemoryError)
    text = (folder/'error.txt').read_text()
    for part in ('tiny-clip-full-seed0 failed at 20', 'Traceback (most recent call last)', 'in no_memory', 'TORCH_USE_CUDA_DSA', 'UserWarning: the memory is nearly full',
                 'ERROR some.library: step 3', '"device": "cpu"', '"seed": 0', '"torch": '): assert part in text
    assert not (folder/'run.json').exists() and not list(tmp_path.glob('*/*frozen/error.txt'))
    assert not [h for h in logging.getLogger().handlers if isinstance(h, runs_module.RunLog)]
    before = (folder/'error.txt').read_bytes()
    with pytest.raises(ValueError, match='other data'): execute(replace(study_runs(study, 'key')[1], seed=0), tmp_path/'brief')
    assert (folder/'error.txt').read_bytes()==before
    monkeypatch.setattr(full_module, 'fit_full', fit)
    here(study, tmp_path)
    assert (folder/'run.json').is_file() and not (folder/'error.txt').exists()

def test_an_error_of_a_team_is_said_in_one_line():
    class Raised(Exception): pass
    assert one_line(Raised('\n\n-- Process 1 terminated:\nTraceback (most recent call last):\n  File "x"\nOSError: no disk\n'))=='Raised: OSError: no disk'
    assert one_line(RuntimeError(''))=='RuntimeError: ' and one_line(ValueError('a\nb'))=='ValueError: a'

# ---- a folder of something else

def test_another_recipe_is_refused_and_nothing_is_lost(root):
    before = {p:p.read_bytes() for p in root.rglob('*') if p.is_file()}
    study = open_study(root).study
    for other in (replace(study, recipes=BRIEF|dict(lora=dict(epochs=3))), replace(study, geometry='crop'), replace(study, size=96)):
        with pytest.raises(ValueError, match='another recipe'): here(other, root.parent)
    for other in (replace(study, split_seed=5), replace(study, val=.4)):
        with pytest.raises(ValueError, match='another split'): here(other, root.parent)
    assert {p:p.read_bytes() for p in root.rglob('*') if p.is_file()}==before

def test_changed_boxes_are_noticed(folder, tmp_path):
    study = brief(folder, models=('tiny-clip',), tiers=('linear',))
    here(study, tmp_path)
    d = json.loads((folder/'building_parts.json').read_text())
    next(iter(d['annotations'].values()))['bbox_groups'][0]['elements'][0]['left'] += .01
    (folder/'building_parts.json').write_text(json.dumps(d))
    with pytest.raises(ValueError, match='data_key'): here(study, tmp_path)

def test_a_probe_that_was_measured_otherwise_is_noticed(root):
    path = root/'tiny-clip-linear-seed0'/'metrics.parquet'
    d = pd.read_parquet(path)
    d.assign(value=d.value+1e-7).to_parquet(path); path.with_name('means.parquet').unlink() # which says the same
    with pytest.raises(ValueError, match='not measured alike'): study_table(open_study(root))

def test_a_checkpoint_of_another_model_is_refused(root):
    shutil.copy(root/'tiny-clip-full-seed0'/'model.safetensors', root/'tiny-siglip-full-seed0'/'model.safetensors')
    with pytest.raises(ValueError, match='not of tiny-siglip'): load_run(root/'tiny-siglip-full-seed0')
    with pytest.raises(FileNotFoundError, match='no complete run'): load_run(root)

def test_runs_that_the_study_does_not_name_are_left_out(root):
    shutil.copytree(root/'tiny-clip-lora-seed0', root/'tiny-clip-lora-seed7')
    before = study_table(open_study(root))
    assert len(open_study(root).of_kind())==8 and (before.seeds==1).all()
    (root/'study.json').write_text(json.dumps(asdict(replace(open_study(root).study, models=('tiny-clip',)))))
    after = study_table(open_study(root))
    tested = after[after.tier!='linear']
    assert set(after.model)=={'tiny-clip'} and np.allclose(tested.p_holm, multipletests(tested.p, method='holm')[1]) # a family of two

def test_truncated_photographs(folder, tmp_path):
    victims = sorted((folder/'images').iterdir())[:2]
    for v in victims: v.write_bytes(v.read_bytes()[:200])
    study = brief(folder, models=('tiny-clip',), tiers=('linear',))
    with pytest.raises(OSError, match=f'2 of 60.*{victims[0].name}'): here(study, tmp_path)
    assert not (tmp_path/'brief').exists()
    root = here(replace(study, on_error='skip'), tmp_path)
    split = json.loads((root/'split.json').read_text())
    assert not {v.name for v in victims}&{*split['train'], *split['val'], *split['eval']}

# ---- seeds, other executors, other geometries

def test_seeds_are_averaged_and_counted(drawn, tmp_path):
    study = brief(drawn, models=('tiny-clip',), tiers=('lora',), seeds=(0,3))
    root = here(study, tmp_path)
    t,scores = study_table(open_study(root)), open_study(root).scores()
    assert t.seeds.tolist()==[2] and t.n.tolist()==[12] and t['shift'].item()==pytest.approx((scores.after-scores.before).mean())
    assert not torch.equal(load_maps(root/'tiny-clip-lora-seed0').maps, load_maps(root/'tiny-clip-lora-seed3').maps)
    here(replace(study, seeds=(0,3,4)), tmp_path) # more seeds later
    assert study_table(open_study(root)).seeds.tolist()==[3]

def test_default_executor_equals_one_process(done, drawn, tmp_path):
    root = run_study(brief(drawn, models=('tiny-siglip',), tiers=('linear','full')), tmp_path, workers=1, device='cpu', progress=False)
    a,b = study_table(open_study(root)), study_table(open_study(done)).query("model=='tiny-siglip' and tier!='lora'").reset_index(drop=True)
    linear = a.tier=='linear'
    assert (a['shift'][linear]==0).all()
    pd.testing.assert_frame_equal(a[['model','tier','before']], b[['model','tier','before']], check_exact=True) # measured alike
    pd.testing.assert_frame_equal(a[['shift']], b[['shift']], atol=.02) # trained with another number of threads

@pytest.mark.parametrize('geometry', ['crop','letterbox'])
def test_geometries(drawn, tmp_path, geometry):
    root = here(brief(drawn, models=('tiny-clip',), tiers=('linear',), geometry=geometry), tmp_path)
    assert study_table(open_study(root))['shift'].item()==0 and geometry in write_report(analyse(open_study(root))).read_text()

# ---- studies as data

@pytest.mark.parametrize('bad,match', [
    (dict(tiers=('lorra',)), 'known are linear, lora, full'), (dict(models=()), 'at least one'), (dict(seeds=(0,0)), 'none twice'),
    (dict(models=('a/b',)), 'alias=source'), (dict(models=('x=a','x=b')), 'share a name'), (dict(name='../x'), 'names a folder'), (dict(name='.x'), 'names a folder'),
    (dict(geometry='stretch'), 'squash'), (dict(labels='all'), 'leaf'), (dict(on_error='ignore'), 'raise'), (dict(recipes=dict(lora=dict(rnk=1))), 'rnk'),
    (dict(recipes=dict(lor=dict(rank=1))), "unknown tier 'lor'"), (dict(seeds=('0',)), "seed '0'"), (dict(seeds=(-1,)), 'seed -1')])
def test_bad_studies(bad, match):
    with pytest.raises(ValueError, match=match): Study(**bad)

@pytest.mark.parametrize('text,match', [('modls = ["x"]', "unknown field 'modls'"), ('models = "tiny-clip"', 'models must be a list'), ('name = [', 'not valid TOML'),
                                        ('size = "96"', 'size must be int'), ('[recipes.lora]\nrank = "8"', 'rank of LoraRecipe must be int')])
def test_bad_study_files(text, match, tmp_path):
    (tmp_path/'s.toml').write_text(text)
    with pytest.raises(ValueError, match=match): load_study(tmp_path/'s.toml')
    with pytest.raises(FileNotFoundError, match='no study file'): load_study(tmp_path/'t.toml')

def test_flags_change_the_file(tmp_path):
    (tmp_path/'s.toml').write_text('name = "s"\nmodels = ["mae"]\ntiers = ["lora"]\n[recipes.lora]\nrank = 2\nlr = 1e-3\n')
    s = compose_study(tmp_path/'s.toml', 'lora.rank=4,full.clip=0', geometry='crop', seeds='1, 2')
    assert s==Study('s', models=('mae',), tiers=('lora',), seeds=(1,2), geometry='crop', recipes=dict(lora=dict(rank=4, lr=1e-3), full=dict(clip=0)))
    assert compose_study()==DEMO and compose_study(models='mae').recipes=={} and compose_study(tiers='lora').recipes==DEMO.recipes
    for bad in ('rank=2', 'lora.rank', 'lora'):
        with pytest.raises(ValueError, match='tier.field=value'): read_recipes(bad)

# ---- reports and result files

def test_report_stands_alone(done, tmp_path):
    html = write_report(analyse(open_study(done)), tmp_path/'r.html').read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', html) and html.count('<svg ')==10 and html.count('<img ')==2 and 'identical by construction' in html
    for word in ('tiny-siglip','12 held-out images of 12 churches','Holm','backbone_lr','torch '): assert word in html

def test_names_from_outside_cannot_break_the_page(folder, tmp_path):
    odd = tmp_path/'a<b>&c'
    shutil.move(folder, odd)
    html = write_report(analyse(open_study(here(brief(odd, models=('tiny-clip',), tiers=('linear',)), tmp_path)))).read_text()
    assert 'a&lt;b&gt;&amp;c' in html and 'a<b>' not in html

def test_result_files(done, tmp_path):
    folder = save_results(analyse(open_study(done)), tmp_path/'small')
    saved = pd.read_csv(folder/'table.csv')
    pd.testing.assert_frame_equal(saved[['model','tier','n','shift','p_holm']], study_table(open_study(done))[['model','tier','n','shift','p_holm']], rtol=1e-6)
    about = json.loads((folder/'study.json').read_text())
    assert about['study']['name']=='brief' and about['versions'][0]['torch'] and about['missing']==[] and 0<about['chance']<about['ceiling']<=1
    for a,b in zip(load_examples(folder, 'tiny-clip', 'full'), examples(open_study(done), 'tiny-clip', 'full')):
        assert a.image==b.image and a.before==b.before and torch.equal(a.maps, b.maps.half().float())
    assert (folder/'forest.png').read_bytes()[:4]==b'\x89PNG' and sum(p.stat().st_size for p in folder.iterdir())<200_000

def test_examples_are_chosen_by_rule():
    scores = pd.DataFrame(dict(image=list('abcdef'), before=0., after=[.1,-.2,.3,0,.2,.05]))
    assert example_images(scores)==['b','f','c'] and example_images(scores[:2])==['b','a'] and example_images(scores[:1])==['a']
