"Tiers that used boxes: what is pooled, what is compared, and that they stay out of every other table."
import json, shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pandas as pd, pytest, statsmodels.api as sm
from hypothesis import given, settings, strategies as st
from scipy import stats
from ssl_wikichurches.cli import compose_study
from ssl_wikichurches.data.churches import church_id
from ssl_wikichurches.study.plan import Study, study_runs, tier_recipe
from ssl_wikichurches.study.runs import run_study
from ssl_wikichurches.stats.seeds import clustered_shift
from ssl_wikichurches.study.report import save_results, write_report
from ssl_wikichurches.study.analysis import analyse
from ssl_wikichurches.study.reader import OpenStudy, load_run, open_study, rescore
from ssl_wikichurches.study.supervision import supervised_runs, supervised_scores, supervised_table, supervision_contrasts
from ssl_wikichurches.study.tables import cost_table, study_table

RECIPES = {'full':dict(epochs=1, lr=1e-2, backbone_lr=1e-3), 'attn_supervised':dict(folds=3, ratio=.5), 'attn_supervised-prior':dict(boxes='prior')}

@pytest.fixture(scope='module')
def done(drawn, few_questions, tmp_path_factory):
    "A complete study with two models, two seeds and three folds. Not to be changed."
    study = Study('taught', data=str(drawn), models=('tiny-clip','tiny-siglip'), tiers=tuple(RECIPES), seeds=(0,1), size=64, val=.3, recipes=RECIPES)
    with ThreadPoolExecutor(1) as pool: return run_study(study, tmp_path_factory.mktemp('runs'), pool, device='cpu', progress=False)

@pytest.fixture
def root(done, tmp_path): return Path(shutil.copytree(done, tmp_path/done.name))

def value(folder, image, metric='iou@90'):
    d = pd.read_parquet(folder/'metrics.parquet').query("metric==@metric and head=='mean' and image==@image")
    return d.loc[d.block.idxmax(), 'value']

def facts(folder): return json.loads((folder/'run.json').read_text())

# ---- the test over folds

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(2, 6), size=st.integers(2, 9))
def test_equal_folds_are_a_t_test_of_their_means(seed, k, size):
    rng = np.random.default_rng(seed)
    a,b,fold = rng.normal(size=k*size),rng.normal(size=k*size),rng.permutation(np.repeat(np.arange(k), size))
    found,means = clustered_shift(a, b, fold),pd.Series(b-a).groupby(fold).mean()
    t = stats.ttest_1samp(means, 0)
    ci = t.confidence_interval(.95)
    np.testing.assert_allclose([found['t'],found['p'],found['low'],found['high']], [t.statistic,t.pvalue,ci.low,ci.high], rtol=1e-7)
    named = clustered_shift(a, b, np.array([f'fold {f}' for f in fold]))
    assert named==found and clustered_shift(b, a, fold)['t']==pytest.approx(-found['t'])

def test_unequal_folds_by_hand():
    rng = np.random.default_rng(1)
    d,fold = rng.normal(.2, 1, 23),np.r_[np.zeros(3),np.ones(9),np.full(11, 2)]
    found,m = clustered_shift(0*d, d, fold),d.mean()
    meat = sum((d[fold==f]-m).sum()**2 for f in range(3))
    se = np.sqrt(3/2*meat)/23
    assert found['se']==pytest.approx(se, rel=1e-9) and found['high']==pytest.approx(m+stats.t.ppf(.975, 2)*se, rel=1e-9)

def test_every_church_its_own_cluster_is_the_plain_t_test():
    d = np.random.default_rng(2).normal(.1, 1, 30)
    found = clustered_shift(0*d, d, np.arange(30))
    assert found['p']==pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-9)

def test_clusters_refuse():
    d = np.arange(6.)
    with pytest.raises(ValueError, match='at least 2'): clustered_shift(d, d*2, np.zeros(6))
    with pytest.raises(ValueError, match='length'): clustered_shift(d, d[:5], np.zeros(6))
    with pytest.raises(ValueError, match='finite'): clustered_shift(d, d*np.nan, np.arange(6))
    assert np.isnan(clustered_shift(d, d+1, [0,0,0,1,1,1])['p']) and clustered_shift(d, d, [0,0,0,1,1,1])['note']=='identical by construction'

# ---- the matrix

def test_a_study_has_a_run_for_each_fold(done):
    study = Study('x', models=('clip',), tiers=tuple(RECIPES), recipes=RECIPES)
    names = [r.name for r in study_runs(study, '')]
    assert names==['clip-frozen','clip-full-seed0',*(f'clip-{t}-seed0-fold{f}' for t in ('attn_supervised','attn_supervised-prior') for f in range(3))]
    assert tier_recipe(study, 'attn_supervised-prior').folds==3 and tier_recipe(study, 'attn_supervised-prior').backbone_lr==1e-3
    assert not open_study(done).missing

@pytest.mark.parametrize('change,why', [
    (dict(tiers=('attn_supervised',)), 'add full'), (dict(recipes={'attn_supervised':dict(epochs=3)}), 'differ in epochs'),
    (dict(recipes={'attn_supervised':dict(fold=2)}), 'all folds'), (dict(tiers=('full','linear-slow')), 'cannot be a variant'),
    (dict(recipes={'lora-r4':dict(rank=4)}), 'add it'), (dict(tiers=('full','attention')), 'unknown tier'), (dict(tiers=('full','lora-')), 'variant')])
def test_studies_that_could_not_say_what_boxes_do_are_refused(change, why):
    with pytest.raises(ValueError, match=why): Study('x', **dict(tiers=('full','attn_supervised'))|change)

def test_variants_on_a_command_line():
    study = compose_study(models='clip', tiers='full,lora,lora-r4,attn_supervised,attn_supervised-w0.3', recipe='lora.epochs=3,lora-r4.rank=4,full.epochs=2,attn_supervised-w0.3.weight=0.3,attn_supervised.kind=kl')
    assert tier_recipe(study, 'lora-r4').epochs==3 and tier_recipe(study, 'lora-r4').rank==4 and tier_recipe(study, 'lora').rank==8
    weak = tier_recipe(study, 'attn_supervised-w0.3')
    assert (weak.weight,weak.kind,weak.epochs)==(.3,'kl',2)

# ---- pooling

def test_each_image_is_measured_by_the_model_that_did_not_see_its_boxes(done):
    scores = supervised_scores(open_study(done))
    rng = np.random.default_rng(0)
    for r in scores.iloc[rng.choice(len(scores), 12, replace=False)].itertuples():
        folders = [done/f'{r.model}-{r.tier}-seed{r.seed}-fold{f}' for f in range(3)]
        out = [f for f,folder in enumerate(folders) if r.image in facts(folder)['held_out']]
        assert out==[r.fold] and r.after==value(folders[r.fold], r.image)
        assert r.in_fold==pytest.approx(np.mean([value(folders[f], r.image) for f in range(3) if f!=r.fold]), abs=1e-12)
        assert r.before==value(done/f'{r.model}-frozen', r.image)
    n = scores.image.nunique()
    assert len(scores)==2*2*2*n and not scores.duplicated(['model','tier','seed','image']).any()
    assert (scores.groupby(['model','tier','seed','church']).fold.nunique()==1).all()

def test_table_by_hand(done):
    table = supervised_table(open_study(done)).set_index(['model','tier'])
    s = supervised_scores(open_study(done)).query("model=='tiny-clip' and tier=='attn_supervised'")
    g = s.groupby(['church','image'])[['before','after','in_fold','fold']].mean().groupby('church').mean()
    row = table.loc['tiny-clip','attn_supervised']
    fit = sm.OLS(g.after-g.before, np.ones(len(g))).fit(cov_type='cluster', cov_kwds=dict(groups=g.fold.astype(int)), use_t=True)
    assert row['shift']==pytest.approx(fit.params.iloc[0]) and row.p==pytest.approx(fit.pvalues.iloc[0])
    assert row.in_fold==pytest.approx((g.in_fold-g.before).mean()) and row.in_low<row.in_fold<row.in_high
    right = []
    for seed in (0,1):
        for f in range(3):
            folder = done/f'tiny-clip-attn_supervised-seed{seed}-fold{f}'
            d = pd.read_csv(folder/'predictions.csv').query("part=='eval'")
            right.append(d[d.image.isin(facts(folder)['held_out'])].eval('label==predicted'))
    assert row.accuracy==pytest.approx(pd.concat(right).mean())
    full = table.loc['tiny-clip','full']
    main = study_table(open_study(done)).set_index(['model','tier']).loc['tiny-clip','full']
    assert full['shift']==pytest.approx(main['shift']) and full.accuracy==pytest.approx(main.accuracy) and full.weight==0
    assert row.accuracy_change==pytest.approx(row.accuracy-full.accuracy) # one photograph for each church
    assert table.p_holm.notna().equals(table.boxes=='own')

def test_contrasts_by_hand(done):
    table,found = supervised_table(open_study(done)).set_index(['model','tier']),supervision_contrasts(open_study(done)).set_index(['model','tier','minus'])
    for model in ('tiny-clip','tiny-siglip'):
        shift = table.loc[model]['shift']
        for minus in ('full','attn_supervised-prior'): assert found.loc[model,'attn_supervised',minus].difference==pytest.approx(shift['attn_supervised']-shift[minus])
        own = table.loc[model,'attn_supervised']
        assert found.loc[model,'attn_supervised, in fold','attn_supervised, out of fold'].difference==pytest.approx(own.in_fold-own['shift'])
    assert len(found)==6

def test_other_blocks_and_heads(done):
    a,b = supervised_scores(open_study(done), block=0).query("model=='tiny-clip'"),supervised_scores(open_study(done), head='1').query("model=='tiny-clip'")
    d = pd.read_parquet(done/f'tiny-clip-{a.tier.iloc[0]}-seed0-fold{a.fold.iloc[0]}/metrics.parquet').query("metric=='iou@90' and image==@a.image.iloc[0]")
    assert a.after.iloc[0]==d.query("block==0 and head=='mean'").value.item() and b.after.iloc[0]==d.query("block==3 and head=='1'").value.item()

# ---- apart from all others

def test_taught_runs_are_in_no_other_table(done):
    assert {*open_study(done).of_kind().tier}=={'frozen','full'} and {*open_study(done).of_kind('supervised').tier}=={'attn_supervised','attn_supervised-prior'}
    assert len(open_study(done).of_kind('all'))==2+4+24
    assert {*study_table(open_study(done)).tier}=={'full'} and {*cost_table(open_study(done)).tier}=={'full','attn_supervised','attn_supervised-prior'}

def test_an_incomplete_set_of_folds_waits_and_a_wrong_one_is_refused(root):
    folder = root/'tiny-clip-attn_supervised-seed1-fold2'
    told = facts(folder)
    (folder/'run.json').unlink()
    assert [*open_study(root).missing]==[folder.name] and len(supervised_runs(open_study(root)))==24-3
    assert supervised_table(open_study(root)).set_index(['model','tier']).seeds.loc['tiny-clip','attn_supervised']==1
    first = facts(root/'tiny-clip-attn_supervised-seed1-fold0')['held_out']
    (folder/'run.json').write_text(json.dumps(told|dict(held_out=first)))
    with pytest.raises(ValueError, match='expected each once'): supervised_runs(open_study(root))
    moved = told['held_out'][:-1]
    (folder/'run.json').write_text(json.dumps(told|dict(held_out=moved)))
    with pytest.raises(ValueError, match='expected each once'): supervised_runs(open_study(root))

def test_without_full_there_is_no_comparison_yet(root):
    for f in root.glob('*-full-*'): (f/'run.json').unlink()
    table,found = supervised_table(open_study(root)),supervision_contrasts(open_study(root))
    assert {*table.tier}=={'attn_supervised','attn_supervised-prior'} and table.accuracy_change.isna().all() and 'full' not in {*found.minus} and len(found)==4

def test_a_leak_between_folders_is_refused(root, monkeypatch):
    "Two photographs whose church is said to be one, in different folds."
    monkeypatch.setattr(OpenStudy, 'groups', lambda self, names: ['Q1' for n in names])
    with pytest.raises(ValueError, match='supervised and measured'): supervised_runs(open_study(root))

def test_report_and_result_files(root, tmp_path):
    analysis = analyse(open_study(root))
    text = write_report(analysis).read_text()
    assert 'Attention pulled into boxes' in text and text.count('attn_supervised-prior')>=2
    assert 'attn_supervised' not in text.split('<h2>Attention pulled into boxes</h2>')[0].split('<h2>Shift</h2>')[1]
    folder = save_results(analysis, tmp_path/'small')
    assert pd.read_csv(folder/'supervised.csv').tier.tolist()==supervised_table(open_study(root)).tier.tolist() and len(pd.read_csv(folder/'contrasts.csv'))==6

def test_scores_come_back_from_the_maps(root):
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps(study|dict(models=['tiny-clip'], seeds=[0]))) # of eight runs
    before = supervised_scores(open_study(root))
    for f in [*root.glob('*/metrics.parquet'), *root.glob('*/means.parquet')]: f.unlink()
    rescore(open_study(root), progress=False)
    pd.testing.assert_frame_equal(supervised_scores(open_study(root)), before)

def test_a_taught_model_comes_back(done):
    backbone,classifier = load_run(done/'tiny-clip-attn_supervised-prior-seed0-fold1')
    assert classifier.out_features==4 and not backbone.training

def test_a_study_without_boxes_has_none(drawn, tmp_path):
    study = Study('plain', data=str(drawn), models=('tiny-clip',), tiers=('linear',), size=64, val=.3, recipes=dict(linear=dict(epochs=1)))
    with ThreadPoolExecutor(1) as pool: root = run_study(study, tmp_path, pool, device='cpu', progress=False)
    assert supervised_table(open_study(root)).empty and supervision_contrasts(open_study(root)).empty and supervised_scores(open_study(root)).empty
