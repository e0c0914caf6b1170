"Controls of a study: that one thing is changed and nothing else, that they stay out of every other table, and what the verdict says of planted shifts."
import json, shutil
from collections import Counter
from dataclasses import replace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.finetune.controls import LIGHT, corrected_v, other_questions, other_task, random_labels, randomly_initialized, read_countries
from ssl_wikichurches.data.churches import church_id, read_churches
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.finetune.tiers import CONTROLS, tier_method
from ssl_wikichurches.study.plan import Study, tier_recipe
from ssl_wikichurches.study.runs import evaluate_maps, run_study, store_scores
from ssl_wikichurches.finetune.training import TrainData, make_recipe
from ssl_wikichurches.finetune.full import FullRecipe, fit_full
from ssl_wikichurches.attention.maps import load_maps, save_maps
from ssl_wikichurches.study.report import save_results, write_report
from ssl_wikichurches.study.analysis import analyse
from ssl_wikichurches.study.reader import load_run, open_study, rescore
from ssl_wikichurches.study.specificity import control_contrasts, control_table, readable_result, verdict_sentence, verdict_table
from ssl_wikichurches.stats.planted import box_shares
from ssl_wikichurches.stats.seeds import seed_variance
from ssl_wikichurches.study.tables import study_table
from ssl_wikichurches.data.splits import load_split, make_split
from timm_models import timm_model

TIERS = ('full','block_expansion','random_labels','other_task','random_init','random_labels-block_expansion')
RECIPES = dict(full=dict(epochs=1, lr=1e-2, backbone_lr=1e-3), block_expansion=dict(epochs=1, every=2, lr=1e-2))

@pytest.fixture(scope='module')
def done(drawn, few_questions, tmp_path_factory):
    "A complete study with all controls and two seeds. Not to be changed."
    study = Study('controlled', data=str(drawn), models=('tiny-clip',), tiers=TIERS, seeds=(0,1), size=64, val=.3, recipes=RECIPES)
    with ThreadPoolExecutor(1) as pool: return run_study(study, tmp_path_factory.mktemp('runs'), pool, device='cpu', progress=False)

@pytest.fixture
def root(done, tmp_path): return Path(shutil.copytree(done, tmp_path/done.name))

@pytest.fixture
def small(drawn):
    churches = read_churches(drawn)
    return TrainData(churches, make_split(churches, val=.3), 64)

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---- what is changed

@pytest.mark.parametrize('seed', range(4))
def test_labels_are_dealt_among_churches_and_within_parts(data, seed):
    dealt = random_labels(data, seed)
    for part in ('train','val'):
        names = list(getattr(data.split, part)); owner = [church_id(n) for n in names]
        old,new = (d.labels[names].groupby(owner).agg(['nunique','first']) for d in (data, dealt))
        assert Counter(old['first'])==Counter(new['first']) and new['nunique'].max()==1
        assert (old['first']!=new['first']).mean()>.5
    for part in ('eval','test'):
        names = list(getattr(data.split, part))
        assert dealt.labels[names].equals(data.labels[names])
    assert dealt.split==data.split and dealt.names==data.names and dealt.labels.index.equals(data.labels.index)
    assert dealt.labels.equals(random_labels(data, seed).labels) and not dealt.labels.equals(random_labels(data, seed+1).labels)

def test_labels_of_a_church_with_several_photographs_stay_together(tmp_path):
    from ssl_wikichurches.data.synthetic import make_churches
    churches = read_churches(make_churches(tmp_path/'several', n=60, n_annotated=6, size=64, seed=3, several=.6))
    data = TrainData(churches, make_split(churches, val=.3), 64)
    owner = pd.Series([church_id(n) for n in data.split.train], list(data.split.train))
    assert owner.duplicated().any()
    assert random_labels(data).labels[owner.index].groupby(owner).nunique().max()==1

def test_countries_are_those_of_the_file(small):
    records = json.loads((small.churches.root/'churches.json').read_text())
    asked = other_task(small)
    assert {*asked.names}=={r['country']['name'] for r in records.values()}
    for n,k in asked.labels.items(): assert records[church_id(n)]['country']['name']==asked.names[k]
    assert {*asked.labels.index}=={n for p in small.split.parts.values() for n in p}
    assert other_task(small, 5).labels.equals(asked.labels)

def stand(root, land):
    "Let every church stand in `land(id, record)`."
    path = root/'churches.json'
    path.write_text(json.dumps({c:r|dict(country=dict(id=None, name=land(c, r))) for c,r in json.loads(path.read_text()).items()}))
    churches = read_churches(root)
    return TrainData(churches, make_split(churches, val=.3), 64)

def asked_by(data): return [*other_questions(data).query('asked').index]

def test_a_country_that_is_style_is_not_asked(folder):
    data = stand(folder, lambda c, r: f"land of {(r['styles'] or ['none'])[0]}")
    table = other_questions(data)
    assert table.v['country']==pytest.approx(1) and table.v['light']<.3 and asked_by(data)==['light']
    assert other_task(data).names==LIGHT
    with pytest.warns(UserWarning, match='goes with style .*1.00'): asked = other_task(data, question='country')
    train = list(data.split.train)
    assert pd.crosstab(asked.labels[train], data.labels[train]).gt(0).sum(axis=1).eq(1).all() # one style in each
    with pytest.raises(ValueError, match="'weather' cannot be asked"): other_task(data, question='weather')

def test_a_country_that_says_nothing_is_asked(folder, recwarn):
    data = stand(folder, lambda c, r: 'A')
    owner = pd.Series(data.churches.groups(data.split.train), list(data.split.train))
    style = data.labels[owner.index].groupby(owner).first()
    place = style.groupby(style).cumcount() # every other church of a style
    data = stand(folder, lambda c, r: 'AB'[place.get(c, 0)%2])
    assert other_questions(data).v['country']==0 and asked_by(data)==['country'] and {*other_task(data).names}=={'A','B'}
    assert not [w for w in recwarn if 'goes with style' in str(w.message)]

def test_corrected_v_against_its_formula():
    from scipy.stats import chi2_contingency
    rng = np.random.default_rng(0)
    for r,k,n in ((2,2,20), (4,3,50), (4,4,1000), (3,9,40)):
        a,b = pd.Series(np.r_[range(r), rng.integers(0, r, n-r)]),pd.Series(np.r_[range(k), rng.integers(0, k, n-k)])
        phi2 = chi2_contingency(pd.crosstab(a, b), correction=False)[0]/n
        want = (max(0, phi2-(r-1)*(k-1)/(n-1))/(min(r-(r-1)**2/(n-1), k-(k-1)**2/(n-1))-1))**.5
        assert corrected_v(a, b)==pytest.approx(want, abs=1e-12) and corrected_v(b, a)==pytest.approx(want, abs=1e-12)
        assert corrected_v(a, a)==pytest.approx(1)
    assert np.isnan(corrected_v(a, a*0)) and np.isnan(corrected_v(pd.Series(range(4)), pd.Series(range(4))))

def test_a_church_answers_once(tmp_path):
    from ssl_wikichurches.data.synthetic import make_churches
    churches = read_churches(make_churches(tmp_path/'several', n=60, n_annotated=6, size=64, seed=3, several=.6))
    data = TrainData(churches, make_split(churches, val=.3), 64)
    table = other_questions(data)
    assert set(table.churches)=={len({church_id(n) for n in data.split.train})} and table.churches.iloc[0]<len(data.split.train)
    first = list(pd.Series(list(data.split.train)).groupby([church_id(n) for n in data.split.train]).first())
    once = replace(data, split=replace(data.split, train=tuple(first)))
    assert table.v['country']==other_questions(once).v['country'] # of photographs alone it would be another

def without_countries(root):
    path = root/'churches.json'
    path.write_text(json.dumps({c:r|dict(country=dict(id=None, name=None)) for c,r in json.loads(path.read_text()).items()}))

def test_light_is_asked_where_there_are_no_countries(folder):
    without_countries(folder)
    churches = read_churches(folder)
    assert read_countries(churches).empty
    data = TrainData(churches, make_split(churches, val=.3), 64)
    asked,train = other_task(data),list(data.split.train)
    assert asked.names==LIGHT
    from PIL import Image
    gray = pd.Series({n:np.asarray(Image.open(churches.path(n)).convert('L'), float).mean() for n in train})
    assert gray.groupby(asked.labels[train]).mean().is_monotonic_increasing
    assert np.corrcoef(gray.rank(), asked.labels[train])[0,1]>.9

def test_quarters_of_light_begin_at_their_edges(folder):
    without_countries(folder)
    split = make_split(read_churches(folder), val=.3)
    gray = {n:10*i for i,n in enumerate(split.train[:5])}
    from PIL import Image
    for p in (folder/'images').iterdir(): Image.new('RGB', (64,64), 3*(gray.get(p.name, 0),)).save(p)
    asked = other_task(TrainData(read_churches(folder), replace(split, train=split.train[:5]), 64))
    assert asked.labels[list(split.train[:5])].tolist()==[0,1,2,3,3] # quartiles 10, 20 and 30

def test_nothing_to_ask(folder):
    without_countries(folder)
    from PIL import Image
    for p in (folder/'images').iterdir(): Image.new('RGB', (64,64), (90,90,90)).save(p)
    churches = read_churches(folder)
    with pytest.raises(ValueError, match='Leave other_task out'): other_task(TrainData(churches, make_split(churches, val=.3), 64))

def test_weights_of_fewer_classes(small):
    asked = other_task(small)
    y = asked.labels[list(small.split.train)].to_numpy()
    w = asked.weight(FullRecipe()).double().numpy()
    np.testing.assert_allclose(w*np.bincount(y), len(y)/3, rtol=1e-6)
    assert len(w)==3 and w[y].mean()==pytest.approx(1, rel=1e-6) and (asked.weight(FullRecipe(class_weights='none'))==1).all()

def test_a_control_changes_one_thing(small):
    clip = load_backbone('tiny-clip', size=64)
    for name,c in CONTROLS.items():
        data,backbone = c.apply(small, clip, 3)
        assert (data is small)==c.own_start and (backbone is clip)!=c.own_start, name

# ---- names and recipes

def test_names_and_recipes():
    study = Study(tiers=('full','lora-r4','random_labels','random_labels-lora-r4'), recipes={'full':dict(epochs=3), 'lora':dict(epochs=2), 'lora-r4':dict(rank=4)})
    assert tier_recipe(study, 'random_labels')==tier_recipe(study, 'full') and tier_recipe(study, 'random_labels-lora-r4')==tier_recipe(study, 'lora-r4')
    m = tier_method('random_labels-lora-r4')
    assert (m.control,m.of,m.fit)==('random_labels','lora-r4',tier_method('lora').fit)
    for wrong,why in (('random_labels-', 'unknown tier'), ('random_labels-linear','no control'), ('random_init-attn_supervised-w3','no control'), ('random_init-block_expansion','read again'), ('other_task-nothing','unknown tier')):
        with pytest.raises(ValueError, match=why): tier_method(wrong)
    with pytest.raises(ValueError, match='add full'): Study(tiers=('lora','other_task'))
    with pytest.raises(ValueError, match='would be none'): Study(tiers=('full','other_task'), recipes=dict(other_task=dict(epochs=2)))

# ---- in a study

def test_trains_as_what_it_controls(done, drawn):
    split = load_split(done/'split.json')
    data = TrainData(load_churches(str(drawn)), split, 64)
    for name,control in CONTROLS.items():
        mine,backbone = control.apply(data, load_backbone('tiny-clip', size=64), 1)
        want = fit_full(backbone, mine, make_recipe(FullRecipe, **RECIPES['full']), 1)
        restored,classifier = load_run(done/f'tiny-clip-{name}-seed1')
        assert same({f'backbone.{k}':v for k,v in restored.state_dict().items()}, {k:v for k,v in want.state.items() if k.startswith('backbone.')}), name
        assert torch.equal(classifier.weight, want.classifier.weight)

def test_an_untrained_network_has_its_own_start(done, drawn):
    data = TrainData(load_churches(str(drawn)), load_split(done/'split.json'), 64)
    want,_ = evaluate_maps(randomly_initialized(load_backbone('tiny-clip', size=64), 1), data)
    assert torch.equal(load_maps(done/'tiny-clip-random_init-seed1'/'start.safetensors').maps, want.maps)
    scores = open_study(done).scores(kind='control')
    level = scores.groupby(['tier','seed']).before.mean().unstack()
    frozen = open_study(done).scores().before.mean()
    assert level.loc['random_init'].nunique()==2 and np.allclose(level.drop('random_init'), frozen) and not np.isclose(level.loc['random_init'], frozen).any()

def test_classes_of_a_control_are_named(done):
    said = pd.read_csv(done/'tiny-clip-other_task-seed0'/'predictions.csv')
    lands = json.loads((done/'tiny-clip-other_task-seed0'/'run.json').read_text())['classes']
    assert [c for c in said if c.startswith('p_')]==[f'p_{l.lower()}' for l in lands] and said.label.max()<len(lands)
    history = pd.read_csv(done/'tiny-clip-other_task-seed0'/'history.csv')
    assert {c for c in history if c.startswith('val_recall_')}<={f'val_recall_{l.lower()}' for l in lands}
    assert 'p_romanesque' in pd.read_csv(done/'tiny-clip-random_labels-seed0'/'predictions.csv')

def test_controls_are_in_no_other_table(root):
    with_controls = study_table(open_study(root))
    assert [*with_controls.tier]==['full','block_expansion']
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps(study|dict(tiers=['full','block_expansion'])))
    pd.testing.assert_frame_equal(study_table(open_study(root)), with_controls)
    assert control_table(open_study(root)).empty and control_contrasts(open_study(root)).empty and open_study(root).scores(kind='control').empty
    assert {*verdict_table(open_study(root)).verdict}<={'no control','layout only','equivalent to none','not shown'} and verdict_table(open_study(root)).beyond.eq('').all()
    assert not (save_results(analyse(open_study(root)), root/'small')/'controls.csv').exists()

def test_a_study_of_probes_alone(drawn, tmp_path):
    study = Study('probes', data=str(drawn), models=('tiny-clip',), tiers=('linear',), size=64, val=.3, recipes=dict(linear=dict(epochs=1)))
    with ThreadPoolExecutor(1) as pool: root = run_study(study, tmp_path, pool, device='cpu', progress=False)
    assert verdict_table(open_study(root)).empty and control_contrasts(open_study(root)).empty
    assert [*readable_result(study_table(open_study(root)), verdict_table(open_study(root))).verdict]==['']

def planted(root, tier, by, metrics=None):
    "Raise the scores of a tier's runs, by a little more for one church than for the next."
    for folder in root.glob(f'tiny-clip-{tier}-seed*'):
        d = pd.read_parquet(folder/'metrics.parquet')
        order = {n:i for i,n in enumerate(sorted(d.image.unique()))}
        moved = d.metric.isin(metrics or d.metric.unique())
        d['value'] = d.value+moved*by*(1+.1*d.image.map(order)/len(order))
        d.to_parquet(folder/'metrics.parquet', index=False); (folder/'means.parquet').unlink(missing_ok=True) # which says the same

def verdict_of(root, tier='full'): return verdict_table(open_study(root)).set_index('tier').loc[tier]

def sentence_of(root, tier='full'): return next(verdict_sentence(r, .01) for r in verdict_table(open_study(root)).itertuples() if r.tier==tier)

def test_the_verdict_on_planted_shifts(root):
    planted(root, 'full', 3.)
    row = verdict_of(root)
    assert row.verdict=='towards' and row.beyond=='random_labels, other_task, random_init' and row.not_beyond=='' and row.missing=='' and row.p_joint<.001 and row.over=='churches and seeds'
    assert 'towards' in [*readable_result(study_table(open_study(root)), verdict_table(open_study(root))).verdict]
    sentence = sentence_of(root)
    assert 'full of tiny-clip moved attention towards the boxed parts' in sentence and f'{row["shift"]:+.4f}' in sentence and 'random_init' in sentence
    planted(root, 'other_task', 3.)
    row = verdict_of(root)
    assert (row.verdict, row.beyond, row.not_beyond)==('no more than any training','random_labels, random_init','other_task') and row.p_joint>.05

def laid(root, tier, change):
    "The maps of a tier's runs, changed: a function of maps (n, L, H, g, g) and of the share of each patch that is inside a box (n, 1, 1, g, g); scored again."
    opened = open_study(root)
    seen = opened.photographs('tiny-clip')
    for folder in root.glob(f'tiny-clip-{tier}-seed*'):
        m = load_maps(folder/'maps.safetensors')
        inside = box_shares(seen.boxes, seen.size, m.maps.shape[-1])[:,None,None]
        changed = replace(m, maps=change(m.maps.double(), inside).half(), **{k:getattr(m, k).clone() for k in ('prefix','received','artifacts')}) # not of the file that is written over
        save_maps(folder/'maps.safetensors', changed)
        store_scores(folder, changed, seen.boxes, seen.groups)

def test_a_loss_is_a_finding_where_it_is_not_one_of_layout(root):
    laid(root, 'full', lambda maps, inside: maps*(1-inside)+1e-4)
    laid(root, 'random_init', lambda maps, inside: maps*(1+inside)) # which begins where there is little to lose
    row = verdict_of(root)
    assert row.verdict=='away' and row.beyond=='random_labels, other_task, random_init' and row.p_joint<.01 and row.inside_shift<0 and row.inside_p<.01
    assert 'away from the boxed parts' in sentence_of(root) and f'iou@90 without border and artifacts {row.inside_shift:+.4f}' in sentence_of(root)
    assert verdict_table(open_study(root)).query("tier!='full'").inside_p.isna().all()

def test_to_leave_for_the_border_is_layout(root):
    ring = torch.ones(8, 8, dtype=torch.double); ring[1:-1,1:-1] = 0
    laid(root, 'full', lambda maps, inside: maps+ring*(.5+inside.mean((-2,-1), keepdim=True)))
    row = verdict_of(root)
    assert row.verdict=='layout only' and row['shift']<0 and row.p_holm<.05 and not row.inside_p<.05 and 'a change of layout' in sentence_of(root)

def test_a_shift_of_one_metric_is_layout(root):
    planted(root, 'full', .3, ['iou@90'])
    row = verdict_of(root)
    assert row.verdict=='layout only' and row.p_holm<.001 and row['shift']>.2 and abs(row.layout_shift)<.2

def test_a_planted_shift_of_one_model_is_no_more_than_that(root):
    planted(root, 'full', 3.)
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps(study|dict(seeds=[0])))
    row = verdict_of(root)
    assert row.verdict=='one model' and row.over=='one model' and row.p_joint<.01 and 'Of other seeds nothing is known' in sentence_of(root)

def test_no_shift_is_called_none_only_within_the_margin(root):
    for k,f in enumerate(sorted(root.glob('tiny-clip-full-seed*/metrics.parquet'))): # the frozen scores, and noise
        d = pd.read_parquet(root/'tiny-clip-frozen'/'metrics.parquet')
        d.assign(value=d.value+np.random.default_rng(k).normal(0, 1e-3, len(d))).to_parquet(f, index=False); (f.parent/'means.parquet').unlink(missing_ok=True)
    study = json.loads((root/'study.json').read_text())
    def word(margin):
        (root/'study.json').write_text(json.dumps(study|dict(analysis=dict(margin=margin))))
        return verdict_of(root).verdict
    assert verdict_of(root).p_holm>.05 and word(.05)=='equivalent to none' and word(1e-6)=='not shown'

def test_contrasts_against_an_analysis_of_variance(done):
    both = pd.concat([open_study(done).scores(), open_study(done).scores(kind='control')])
    shift = both.assign(d=both.after-both.before).groupby(['tier','seed','church']).d.mean().unstack('seed')
    found = control_contrasts(open_study(done))
    for r in found.itertuples():
        d = shift.loc[r.tier]-shift.loc[r.minus]
        v = seed_variance(d).set_index('source').loc['both']
        assert r.difference==pytest.approx(d.to_numpy().mean(), abs=1e-12) and (r.low,r.high)==pytest.approx((v.low,v.high)) and r.n==len(d) and r.seeds==2 and r.over=='churches and seeds'
    assert [*found[found.tier=='block_expansion'].minus]==['random_labels-block_expansion','other_task','random_init']

def test_rescored_with_their_start(root):
    study = json.loads((root/'study.json').read_text())
    (root/'study.json').write_text(json.dumps(study|dict(tiers=['full','random_init'], seeds=[0], recipes={})))
    before = open_study(root).scores(kind='control')
    for name in ('start.parquet','metrics.parquet'):
        f = root/'tiny-clip-random_init-seed0'/name
        d = pd.read_parquet(f); d['value'] = 0.; d.to_parquet(f, index=False)
        for means in f.parent.glob('*means.parquet'): means.unlink()
    assert not open_study(root).scores(kind='control').equals(before)
    assert 'tiny-clip-random_init-seed0' in rescore(open_study(root), progress=False) and open_study(root).scores(kind='control').equals(before)

def test_report_and_result_files(root):
    analysis = analyse(open_study(root))
    html = write_report(analysis).read_text()
    assert 'Is it the task?' in html and 'random_labels-block_expansion' in html and 'What may be said' in html
    saved = save_results(analysis, root/'small')
    assert len(pd.read_csv(saved/'controls.csv'))==4 and [*pd.read_csv(saved/'verdicts.csv').tier]==['full','block_expansion']
    table = control_table(open_study(root)).set_index('tier')
    assert table.loc['random_labels-block_expansion','of']=='block_expansion' and table.loc['other_task','classes'].count(' Land')==3

def test_kinds_of_runs(done):
    assert len(open_study(done).of_kind('all'))==1+2*len(TIERS) and len(open_study(done).of_kind())==1+2*2 and len(open_study(done).of_kind('control'))==2*4
    with pytest.raises(ValueError, match='expected one of'): open_study(done).of_kind('controls')

@pytest.mark.parametrize('control', list(CONTROLS))
def test_timm(control, small):
    source = timm_model('vit_tiny_patch16_224')
    mine,backbone = CONTROLS[control].apply(small, source, 3)
    start = {k:v.clone() for k,v in backbone.state_dict().items()}
    assert same(start, timm_model('vit_tiny_patch16_224').state_dict())==(control!='random_init')
    fitted = fit_full(backbone, mine, FullRecipe(epochs=1, backbone_lr=1e-4), 3)
    assert not same(fitted.backbone.state_dict(), start) and len(fitted.predictions(mine.loader('eval')))==12

def test_real_photographs(real):
    churches = load_churches(str(real/'photos'))
    data = TrainData(churches, make_split(churches), 224)
    asked,train = other_task(data),list(data.split.train)
    assert asked.names==LIGHT and asked.labels[train].value_counts(normalize=True).between(.24, .26).all()
    assert other_questions(data).v.to_dict()=={'light':pytest.approx(0, abs=.1)}
    table = pd.crosstab(data.labels[train], asked.labels[train], normalize='index') # light says little about style
    assert (table-table.mean()).abs().max().max()<.2

def test_a_control_with_one_seed_in_common_is_no_evidence_over_seeds(root):
    planted(root, 'full', 3.)
    for f in root.glob('tiny-clip-other_task-seed1/run.json'): f.unlink()
    row = verdict_of(root)
    assert row.verdict=='no more than any training' and row.not_beyond=='other_task' and row.p_joint==1
