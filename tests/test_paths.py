"Lines of a study: ends that are the study's own, what has no line, what is missing, and seeds that are averaged within churches."
import json, shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from scipy import stats
from timm_models import timm_model
from ssl_wikichurches.study import runs as runs_module
from ssl_wikichurches.study import reader
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.cli import wikichurches_paths
from ssl_wikichurches.data.churches import church_id
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.study.plan import Run, Study, tier_recipe
from ssl_wikichurches.study.runs import run_study
from ssl_wikichurches.finetune.training import StyleModel, classifier_state
from ssl_wikichurches.finetune.lp_ft import probe_classifier
from ssl_wikichurches.study.paths import ALPHAS, Paths, _ends, _path, interpolate, mean_paths, no_line, own_start, path_bends, paths_plot, study_path, study_paths
from ssl_wikichurches.study.reader import load_run, open_study
from ssl_wikichurches.study.tables import study_table

FAST = dict(epochs=1, batch=12)
RECIPES = {'linear':dict(solver='logistic'), 'lora':dict(lr=1e-2, **FAST), 'lora-dora':dict(dora=True), 'full':dict(lr=1e-2, backbone_lr=1e-3, **FAST),
           'core_tuning':{}, 'coin':{}, 'block_expansion':dict(every=2, **FAST), 'attn_supervised':dict(folds=2, ratio=.5)}
TIERS = ('linear','lora','lora-dora','full','lp_ft','core_tuning','block_expansion','attn_supervised')

def run(study, folder):
    with ThreadPoolExecutor(1) as pool: return run_study(study, folder, pool, device='cpu', progress=False)

def small(drawn, name, **changes):
    return Study(name, **dict(data=str(drawn), models=('tiny-clip',), tiers=('linear','full'), size=64, val=.3)|changes)

def of(tiers): return {t:r for t,r in RECIPES.items() if t in tiers or '-' not in t}

@pytest.fixture(scope='module')
def done(drawn, few_questions, tmp_path_factory):
    "All kinds of tiers, one model. Not to be changed."
    return run(small(drawn, 'kinds', tiers=TIERS, recipes=of(TIERS)), tmp_path_factory.mktemp('runs'))

@pytest.fixture(scope='module')
def seeded(drawn, few_questions, tmp_path_factory):
    "Two models, two seeds, in another geometry. Not to be changed."
    tiers = ('linear','lora','full')
    return run(small(drawn, 'seeds', models=('tiny-clip','tiny-mae'), tiers=tiers, seeds=(0,3), geometry='letterbox', recipes=of(tiers)), tmp_path_factory.mktemp('runs'))

@pytest.fixture
def root(done, tmp_path): return Path(shutil.copytree(done, tmp_path/done.name))

def facts(folder): return json.loads((folder/'run.json').read_text())

# ---- the study at its ends

def check_ends(root, paths, q='iou@90'):
    "Image by image: what a line gives at its ends is what the runs stored."
    for (m,t,s),g in paths.images.groupby(['model','tier','seed']):
        iou = g.pivot(index='image', columns='alpha', values='iou')
        for alpha,name in ((0.,f'{m}-frozen'), (1.,f'{m}-{t}-seed{s}')):
            stored = open_study(root).values(name, q)
            assert np.array_equal(iou[alpha].loc[stored.index], stored), name
    end = paths.table[paths.table.alpha==1].groupby(['model','tier']).delta.mean()
    table = study_table(open_study(root), q).set_index(['model','tier'])['shift'][end.index]
    np.testing.assert_allclose(end, table, atol=1e-12)
    assert (table.abs()>0).all() and (paths.table[paths.table.alpha==0][['delta','low','high']]==0).all(axis=None)

def test_every_line_ends_where_the_study_does(done):
    paths = study_paths(open_study(done), alphas=(0.,.5,1.), progress=False)
    assert [*paths.table.tier.unique()]==['lora','lora-dora','full','lp_ft','core_tuning']
    check_ends(done, paths)
    for (t,a),g in paths.table.set_index(['tier','alpha']).iterrows():
        if a!=.5: assert g.balanced_accuracy==pytest.approx(facts(done/f"tiny-clip-{'linear' if a==0 else t}-seed0")['scores']['val']['balanced_accuracy'])
    between = paths.images.pivot(index=['tier','image'], columns='alpha', values='iou')
    assert ((between[.5]!=between[0.])&(between[.5]!=between[1.])).groupby('tier').any().all()

def test_other_parts_percentiles_and_geometries(seeded):
    paths = study_paths(open_study(seeded), part='eval', q=80, alphas=(0.,1.), progress=False)
    check_ends(seeded, paths, 'iou@80')
    end = paths.table[paths.table.alpha==1].groupby(['model','tier']).balanced_accuracy.mean()
    pd.testing.assert_series_equal(end, study_table(open_study(seeded)).set_index(['model','tier']).balanced_accuracy[end.index], check_exact=False)

def test_one_line_is_a_line_of_all(seeded):
    all_of_them = study_paths(open_study(seeded), tiers=('full',), seeds=(3,), alphas=(0.,.25,1.), progress=False)
    assert [*all_of_them.table.model]==['tiny-clip']*3+['tiny-mae']*3 and {*all_of_them.table.seed}=={3} and {*all_of_them.images.tier}=={'full'}
    one = study_path(open_study(seeded), 'tiny-mae', 'full', 3, (0.,.25,1.))
    assert one.equals(all_of_them.table.query("model=='tiny-mae'").set_index('alpha')[one.columns])
    assert not one.equals(study_path(open_study(seeded), 'tiny-mae', 'full', 0, (0.,.25,1.)))

def same(a, b): return list(a)==list(b) and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('tier', ('lora','lora-dora','full','lp_ft'))
def test_points_are_the_models_of_the_folders(done, tier):
    opened,folders = open_study(done),[done/n for n in _ends('tiny-clip', tier, 0)]
    a,b = (StyleModel(*load_run(f)).state_dict() for f in folders)
    for alpha,m in _path(opened, [f.name for f in folders], (0.,.3,1.))[1]:
        found,exact = m.state_dict(),interpolate(a, b, alpha)
        assert max((found[k].double()-exact[k].double()).abs().max().item() for k in exact)<2e-7
        if alpha!=.3: assert same(found, exact)
    assert not same(a, b)

def test_lora_goes_by_its_scale_and_dora_by_its_weights(done, monkeypatch):
    called = []
    for name in ('lora_path','straight_path'):
        monkeypatch.setattr(f'ssl_wikichurches.study.paths.{name}', lambda *args, name=name: called.append(name))
    for tier in ('lora','lora-dora','full'): _path(open_study(done), _ends('tiny-clip', tier, 0), ALPHAS)
    assert called==['lora_path','straight_path','straight_path']

def test_lp_ft_began_at_alpha_0(done):
    "The classifier of the linear run is the one that this tier starts from, and its backbone the frozen one."
    linear,_ = folders = [done/n for n in _ends('tiny-clip', 'lp_ft', 0)]
    run = Run(**json.loads((linear/'recipe.json').read_text()))
    data,backbone = runs_module.prepare_run(run, done)
    own = probe_classifier(backbone, data, tier_recipe(open_study(done).study, 'lp_ft'))
    (_,m), = _path(open_study(done), [f.name for f in folders], (0.,))[1]
    for k,v in classifier_state(own).items(): torch.testing.assert_close(m.state_dict()[k], v, rtol=1e-5, atol=1e-6)
    assert same(m.backbone.state_dict(), load_backbone('tiny-clip', size=64).state_dict())
    starts = study_paths(open_study(done), alphas=(0.,), progress=False).table.set_index('tier').own_start
    assert starts.to_dict()=={t:t=='lp_ft' for t in starts.index}

@pytest.mark.parametrize('probe,tuned,same', [({}, {}, True), (dict(solver='adamw'), {}, False), (dict(views=2), {}, False), (dict(class_weights='none'), {}, False),
                                              (dict(class_weights='none'), dict(class_weights='none'), True), (dict(seed=4), {}, True)])
def test_when_the_probe_is_its_own(done, probe, tuned, same):
    linear,end = map(open_study(done).recipe, _ends('tiny-clip', 'lp_ft', 0))
    changed = replace(linear, recipe=linear.recipe|probe),replace(end, recipe=end.recipe|tuned)
    assert own_start(*changed)==same
    assert own_start(changed[0], replace(changed[1], tier='lp_ft-slow'))==same and not own_start(changed[0], replace(changed[1], tier='full'))

# ---- what is refused

def test_tiers_without_a_line(done):
    for tier,why in (('block_expansion','adds blocks'), ('attn_supervised','used boxes'), ('linear','every line begins')):
        assert why in no_line(tier)
        with pytest.raises(ValueError, match=why): study_path(open_study(done), 'tiny-clip', tier)
        with pytest.raises(ValueError, match=why): study_paths(open_study(done), tiers=('full',tier), progress=False)
    with pytest.raises(ValueError, match='unknown tier'): no_line('frozen')

def test_what_is_not_of_the_study(done, tmp_path):
    for line,why in ((('tiny-mae','full',0), "model 'tiny-mae'.*has tiny-clip"), (('tiny-clip','coin',0), "tier 'coin'.*has linear, lora"), (('tiny-clip','full',1), 'seed 1.*has 0'), (('tiny-clip','frozen',0), "tier 'frozen'")):
        with pytest.raises(ValueError, match=why): study_path(open_study(done), *line)
    with pytest.raises(ValueError, match='seed 5'): study_paths(open_study(done), seeds=(0,5), progress=False)
    with pytest.raises(ValueError, match='accuracy of val, eval$'): study_path(open_study(done), 'tiny-clip', 'full', part='test')
    with pytest.raises(ValueError, match='accuracy of val, eval$'): study_path(open_study(done), 'tiny-clip', 'full', part='train')
    with pytest.raises(ValueError, match='begins at alpha 0.5'): study_path(open_study(done), 'tiny-clip', 'full', alphas=(.5,1.))
    with pytest.raises(FileNotFoundError, match='run the study first'): study_path(open_study(tmp_path), 'tiny-clip', 'full')

def test_a_study_that_still_runs(root):
    (root/'tiny-clip-full-seed0/run.json').unlink()
    with pytest.raises(FileNotFoundError, match='tiny-clip-full-seed0: not complete.*only what is missing runs'): study_path(open_study(root), 'tiny-clip', 'full')
    with pytest.raises(FileNotFoundError, match='tiny-clip-full-seed0'): study_paths(open_study(root), tiers=('lora','full'), progress=False)
    assert [*study_paths(open_study(root), alphas=(0.,1.), progress=False).table.tier.unique()]==['lora','lora-dora','lp_ft','core_tuning']
    (root/'tiny-clip-linear-seed0/run.json').unlink()
    with pytest.raises(FileNotFoundError, match='tiny-clip-linear-seed0: not complete'): study_path(open_study(root), 'tiny-clip', 'lora')
    with pytest.raises(FileNotFoundError, match='has no line'): study_paths(open_study(root), progress=False)

def test_a_study_without_probes(root):
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps(study|dict(tiers=[t for t in TIERS if t!='linear'])))
    for call in (lambda: study_path(open_study(root), 'tiny-clip', 'full'), lambda: study_paths(open_study(root), progress=False)):
        with pytest.raises(ValueError, match='add linear to its tiers'): call()

def test_nothing_but_lines_that_do_not_exist(root):
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps(study|dict(tiers=['linear','block_expansion'], recipes={})))
    with pytest.raises(FileNotFoundError, match='has no line'): study_paths(open_study(root), progress=False)

def test_boxes_that_are_gone_are_noticed(done, monkeypatch):
    churches = load_churches(open_study(done).study.data)
    image = open_study(done).values('tiny-clip-frozen').index[0]
    monkeypatch.setattr(reader, 'load_churches', lambda *args, **kwargs: replace(churches, boxes=churches.boxes[churches.boxes.image!=image]))
    with pytest.raises(ValueError, match='measured other images'): study_path(open_study(done), 'tiny-clip', 'full', alphas=(0.,))

def test_reading_changes_nothing_and_can_be_repeated(root):
    stamps = lambda: {p:(p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob('*')}
    before = stamps()
    one,again = (study_path(open_study(root), 'tiny-clip', 'lora', alphas=(0.,.5,1.)) for _ in range(2))
    assert one.equals(again) and stamps()==before

# ---- seeds

def test_seeds_are_averaged_within_churches(seeded):
    paths = study_paths(open_study(seeded), alphas=(0.,.5,1.), progress=False)
    mean = mean_paths(paths)
    assert len(paths.table)==2*2*2*3 and len(mean)==2*2*3 and {*mean.seeds}=={2} and [*mean.model.unique()]==['tiny-clip','tiny-mae'] and [*mean.tier[:4]]==['lora']*3+['full']
    n = paths.table.churches.iloc[0]
    assert {*mean.churches}=={n} # and not seeds times churches
    for r in mean.itertuples():
        g = paths.images.query('model==@r.model and tier==@r.tier').pivot(index='image', columns=['alpha','seed'], values='iou')
        d = (g[r.alpha]-g[0.]).mean(axis=1).groupby(church_id).mean()
        assert len(d)==n and r.delta==pytest.approx(d.mean(), abs=1e-12)
        if r.alpha: assert (r.low,r.high)==pytest.approx(stats.t.interval(.95, n-1, d.mean(), stats.sem(d)), abs=1e-12)
    by_seed = paths.table.groupby(['model','tier','alpha'], sort=False)[['accuracy','balanced_accuracy','macro_f1','iou','delta']].mean()
    np.testing.assert_allclose(mean[by_seed.columns], by_seed, atol=1e-12)
    end = mean[mean.alpha==1].set_index(['model','tier']).delta
    np.testing.assert_allclose(end, study_table(open_study(seeded)).set_index(['model','tier'])['shift'][end.index], atol=1e-12)

def lines(iou, seeds=1):
    "Lines of one tier from a function of (church, alpha, seed)."
    alphas,names = (0.,.25,.5,1.),[f'Q{i}_wd0.jpg' for i in range(5)]
    rows = [dict(model='m', tier='full', seed=s, alpha=a, image=n, church=church_id(n), iou=iou(i, a, s)) for s in range(seeds) for a in alphas for i,n in enumerate(names)]
    scores = [dict(model='m', tier='full', seed=s, alpha=a, own_start=bool(s), accuracy=.5, balanced_accuracy=.5, macro_f1=.5) for s in range(seeds) for a in alphas]
    return Paths(pd.DataFrame(scores), pd.DataFrame(rows))

def test_a_proportional_line_has_no_bend():
    found = path_bends(lines(lambda i, a, s: .2+.01*i+a*.02*(i-1)))
    assert [*found.alpha]==[.25,.5] and [*found.share]==pytest.approx([.25,.5]) and np.abs(found[['bend','bend_low','bend_high']]).to_numpy().max()<1e-15

def test_a_bent_line():
    found = path_bends(lines(lambda i, a, s: .2+a*a*.02*(i+1)))
    d = (.25-.5)*.02*np.arange(1, 6)
    r = found.set_index('alpha').loc[.5]
    assert r.share==pytest.approx(.25) and r.bend==pytest.approx(d.mean()) and (r.bend_low,r.bend_high)==pytest.approx(stats.t.interval(.95, 4, d.mean(), stats.sem(d)))

def test_no_way_has_no_share_and_half_a_way_no_bend():
    assert path_bends(lines(lambda i, a, s: .2)).share.isna().all()
    half = lines(lambda i, a, s: .2+a)
    with pytest.raises(ValueError, match='let them end at 1'): path_bends(Paths(*(d[d.alpha<1] for d in half)))
    ends = path_bends(Paths(*(d[d.alpha.isin([0.,1.])] for d in half)))
    assert ends.empty and 'bend' in ends

def test_a_mean_began_where_all_its_seeds_began(): assert not mean_paths(lines(lambda i, a, s: .2+i*a, 2)).own_start.any()

# ---- pictures and the command

def test_every_tier_is_drawn():
    mean = mean_paths(lines(lambda i, a, s: .2+.01*i*a))
    table = pd.concat([mean.assign(tier=t, model=m) for m in ('clip','mae') for t in ('lora','full','lp_ft','coin','core_tuning','lora-r4')])
    axs = paths_plot(table)
    assert axs.shape==(2,2) and [ax.get_title() for ax in axs[0]]==['clip','mae']
    for ax in axs[0]: assert [t.get_text() for t in ax.get_legend().get_texts()]==['lora','full','lp_ft','coin','core_tuning','lora-r4']
    assert axs[0,0].lines[0].get_marker()==axs[0,0].lines[5].get_marker()=='o' # a variant has the marker of its tier
    assert paths_plot(table[table.model=='clip']).shape==(2,1)

def test_the_command(seeded, done, tmp_path, capsys):
    wikichurches_paths(str(seeded), tiers='lora', out=tmp_path/'paths.csv', figure=tmp_path/'paths.png', device='cpu')
    said,table = capsys.readouterr().out,pd.read_csv(tmp_path/'paths.csv')
    assert [*table.tier.unique()]==['lora'] and len(table)==2*5 and {*table.seeds}=={2} and 'tiny-mae' in said
    mean = mean_paths(study_paths(open_study(seeded), tiers=('lora',), progress=False))
    pd.testing.assert_frame_equal(table, mean, check_exact=False, rtol=1e-7)
    assert (tmp_path/'paths.png').read_bytes()[:4]==b'\x89PNG'
    with pytest.raises(SystemExit, match='^wikichurches_paths: there is no line to block_expansion'): wikichurches_paths(str(done), tiers='lora,block_expansion', device='cpu')
    with pytest.raises(SystemExit, match='run the study first'): wikichurches_paths(str(tmp_path), device='cpu')

# ---- libraries

@pytest.mark.parametrize('architecture', ('vit_base_patch16_dinov3','vit_base_patch16_siglip_224'))
def test_models_of_timm(drawn, tmp_path, monkeypatch, architecture):
    def load(source, size=None): return timm_model(architecture)
    for module in (runs_module, reader): monkeypatch.setattr(module, 'load_backbone', load)
    tiers = ('linear','lora','full')
    root = run(small(drawn, 'timm', models=('mine=timm/toy',), tiers=tiers, recipes=of(tiers)), tmp_path)
    check_ends(root, study_paths(open_study(root), alphas=(0.,.5,1.), progress=False))
