"Styles, parts, blocks and heads against plain recomputation from metrics.parquet and maps."
import itertools, json, re, shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt
from scipy import stats
from torch.nn import functional as F
from ssl_wikichurches.data.churches import STYLES, ChurchDataset, eval_transform, read_churches
from ssl_wikichurches.study.detail import (FEW, best_block_table, best_heads, block_table, examples, extreme_images, gallery, head_grid, head_table, part_kinds,
                                     part_scores, part_table, sensitivity_table, style_table, style_tests, styled_scores, tuned_pairs)
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.runs import _declared_metric, received_scores, run_study
from ssl_wikichurches.stats.seeds import moderation, seed_variance, shift_grid
from ssl_wikichurches.stats.tests import sign_flip_p
from ssl_wikichurches.attention.scores import higher_is_better
from ssl_wikichurches.study.blind_baselines import border_scores, border_table
from ssl_wikichurches.attention.maps import load_maps, save_maps
from ssl_wikichurches.study.figures import block_plot, grid_plot, ranking_plot, slope_plot
from ssl_wikichurches.study.analysis import analyse, read_tables
from ssl_wikichurches.study.reader import open_study, rescore
from ssl_wikichurches.attention.scores import score_maps
from ssl_wikichurches.study.report import report_figures, write_report
from ssl_wikichurches.study.tables import study_table

@pytest.fixture(scope='module')
def done(drawn, few_questions, tmp_path_factory):
    "A complete study with two seeds. Not to be changed."
    recipes = dict(linear=dict(epochs=1), lora=dict(epochs=1, lr=3e-2))
    study = Study('deep', data=str(drawn), models=('tiny-clip','tiny-siglip'), tiers=('linear','lora'), seeds=(0,1), size=64, val=.3, recipes=recipes)
    with ThreadPoolExecutor(1) as pool: return run_study(study, tmp_path_factory.mktemp('runs'), pool, device='cpu', progress=False)

@pytest.fixture
def root(done, tmp_path): return Path(shutil.copytree(done, tmp_path/done.name))

def table_of(folder, metric='iou@90'):
    d = pd.read_parquet(folder/'metrics.parquet')
    return d[d.metric==metric]

def boxed(drawn, names, size=64):
    "Per image a list of (part, bool mask), by comparing coordinates one box at a time."
    churches,c,out = read_churches(drawn, verify=False), np.arange(size)+.5, []
    for item in ChurchDataset(churches, names, eval_transform(size, 'squash')):
        found = []
        for (x0,y0,x1,y1),p in zip(item['boxes'].numpy(), item['parts']): found.append((p, np.outer((c>=y0)&(c<y1), (c>=x0)&(c<x1))))
        out.append(found)
    return churches,out

# ---- styles

def test_style_and_area_of_every_image(done, drawn):
    s = styled_scores(open_study(done))
    assert set(s.tier)=={'lora'} and set(s.unit)=={'iou@90'}
    names = [*s.image.unique()]
    churches,found = boxed(drawn, names)
    for n,boxes in zip(names, found):
        rows = s[s.image==n]
        tags = [STYLES[q] for q in churches.images.styles[n] if q in STYLES]
        assert set(rows['style'])=={tags[0]} and np.allclose(rows.area, np.any([m for _,m in boxes], axis=0).mean(), atol=1e-12)

def made_scores(rng, churches=20, per=2, seeds=(0,1), styles=('Gothic','Baroque','Romanesque'), effect=0.):
    rows = [dict(model='m', tier='lora', seed=k, image=f'Q{c}_wd{i}.jpg', church=f'Q{c}', style=styles[c%len(styles)], area=.05+.01*((7*c+i)%13), unit='iou@90', before=rng.random(), after=0.)
            for k in seeds for c in range(churches) for i in range(per)]
    d = pd.DataFrame(rows)
    before = d.groupby('image').before.first() # one frozen run
    return d.assign(before=d.image.map(before), after=lambda d: d.before+.02*rng.normal(size=len(d))+effect*(d['style']=='Gothic'))

def test_style_table_by_plain_means():
    s = made_scores(np.random.default_rng(0))
    t = style_table(s).set_index('style')
    for style,g in s.groupby('style'):
        d = g.assign(d=g.after-g.before).groupby(['church','image']).d.mean().groupby('church').mean()
        r = t.loc[style]
        assert r.n==len(d)==g.church.nunique() and r.images==g.image.nunique() and r.seeds==2 and abs(r['shift']-d.mean())<1e-14 and r.low<=r['shift']<=r.high
        assert abs(r.area-g.drop_duplicates('image').area.median())<1e-15
    assert [*t.index]==['Romanesque','Gothic','Baroque'] # order of the classes

def test_style_table_does_not_depend_on_order_and_turns_with_its_sign():
    s = made_scores(np.random.default_rng(1))
    t = style_table(s)
    pd.testing.assert_frame_equal(style_table(s.sample(frac=1, random_state=3)), t, rtol=1e-9)
    back = style_table(s.rename(columns=dict(before='after', after='before')))
    np.testing.assert_allclose(back['shift'], -t['shift'], atol=1e-14); np.testing.assert_allclose(back.d_z, -t.d_z, atol=1e-12)
    assert (style_tests(s).p-style_tests(s.rename(columns=dict(before='after', after='before'))).p).abs().max()<1e-6

def test_a_style_of_two_churches_has_no_interval_and_one_without_label_no_test():
    s = made_scores(np.random.default_rng(2), churches=9)
    s.loc[s.church.isin(['Q0','Q3']), 'style'] = 'Renaissance'
    s.loc[s.church=='Q1', 'style'] = 'other'
    t = style_table(s).set_index('style')
    assert t.note['Renaissance']==FEW and np.isnan(t.low['Renaissance']) and t.n['Renaissance']==2 and t.index[-1]=='other'
    assert style_tests(s).n.item()==8 and style_tests(s).styles.item()==4

def test_joint_test_is_the_f_test_of_nested_models():
    s = made_scores(np.random.default_rng(3), per=1, seeds=(0,))
    d = (s.after-s.before).to_numpy(); log = np.log2(s.area.to_numpy())
    small = np.c_[np.ones(len(d)), log]; full = np.c_[small, s['style']=='Gothic', s['style']=='Baroque'].astype(float)
    rss = lambda X: ((d-X@np.linalg.lstsq(X, d, rcond=None)[0])**2).sum()
    f = (rss(small)-rss(full))/2/(rss(full)/(len(d)-4))
    r = style_tests(s).iloc[0]
    assert r.test=='least squares, F' and abs(r.p-stats.f.sf(f, 2, len(d)-4))<1e-9 and abs(r.per_doubling-np.linalg.lstsq(full, d, rcond=None)[0][1])<1e-10
    assert abs(r.p_bh-r.p)<1e-15 # a family of one

def test_joint_test_with_several_rows_is_the_mixed_model():
    s = made_scores(np.random.default_rng(4), effect=.05)
    r = style_tests(s).iloc[0]
    photographs = s.assign(shift=s.after-s.before).groupby(['image','church','style'], as_index=False)[['shift','area']].mean()
    m = moderation(photographs).set_index('term')
    assert r.test=='mixed model, Wald' and r.p==m.p['style, jointly']<1e-4 and r['rows']==40 and r.n==20
    assert style_tests(made_scores(np.random.default_rng(4))).p.item()>.01

@pytest.mark.parametrize('change,note', [(lambda s: s.assign(style='Gothic'), 'one style'), (lambda s: s[s.church.isin(['Q0','Q1','Q2','Q3'])], 'too few'), (lambda s: s.assign(after=s.before), 'the same'),
                                         (lambda s: s.assign(area=.1).query('seed==0').drop_duplicates('church'), 'told apart')])
def test_no_joint_test_says_why(change, note):
    r = style_tests(change(made_scores(np.random.default_rng(5)))).iloc[0]
    assert note in r.note and np.isnan(r.p) and np.isnan(r.p_bh) and not r.discovery

# ---- sensitivity

def test_sensitivity_against_other_ways(done):
    opened = open_study(done); t = sensitivity_table(opened).set_index(['model','tier'])
    assert {*t.index}=={*opened.study.family} and t[t.choice=='declared'].says_the_same.all()
    for key,g in t.groupby(level=['model','tier']):
        rows,metrics = g.set_index('choice'),g[g.choice=='metric'].set_index('metric')
        s = opened.scores(); s = s[(s.model==key[0])&(s.tier==key[1])]; d = shift_grid(s)
        assert rows['shift']['declared']==pytest.approx(d.to_numpy().mean())
        for k in d: # seeds left out one by one
            assert rows['shift'][f'without seed {k}']==pytest.approx(d.drop(columns=k).to_numpy().mean()) and rows.over[f'without seed {k}']==('one model' if d.shape[1]==2 else 'churches and seeds')
        a = opened.scores('auroc'); a = a[(a.model==key[0])&(a.tier==key[1])]
        assert metrics['shift']['auroc']==pytest.approx(shift_grid(a).to_numpy().mean())
        assert rows.p['sign flips of churches']==pytest.approx(sign_flip_p(d.mean(axis=1), 9_999).p.item())
        inside = border_table(border_scores(opened)).set_index(['model','tier']).loc[key]
        assert (rows['shift']['border suppressed'],rows.low['border suppressed'],rows.p['border suppressed'])==pytest.approx((inside.inside,inside.inside_low,inside.inside_p))
        sure = g.p.lt(.05).where(g.p.notna(), g.low*g.high>0)
        worse = g.metric.map(lambda m: 1 if higher_is_better(m) else -1)*np.sign(g['shift'])*sure
        assert (g.says_the_same==(worse==worse[g.choice=='declared'].item())).all()

def test_heads_and_blocks_of_the_sensitivity_table(done):
    opened = open_study(done); t = sensitivity_table(opened).query("model=='tiny-clip'").set_index(['tier','choice'])['shift']
    for tier in t.index.unique('tier'):
        b,a = opened.church_cells('tiny-clip', tier); heads = [h for h in b.columns.unique('head') if h!='mean']; last = b.columns.unique('block').max()
        assert t[tier,"mean of the heads' scores"]==pytest.approx((a[last][heads]-b[last][heads]).to_numpy().mean())
        assert t[tier,'block -2']==pytest.approx((a[last-1]['mean']-b[last-1]['mean']).mean())
    pooled = sensitivity_table(opened).query("model=='tiny-siglip'") # whose pooling head has one map
    assert not pooled.choice.str.startswith('block').any()

# ---- parts

def test_kinds_of_a_graph():
    parts = lambda *rows: pd.DataFrame(rows, columns=['name','parents'])
    assert part_kinds(parts(('a',[]), ('b',[0]), ('c',[1]), ('d',[4]), ('e',[]), ('f',[2,3])))==dict(a=('a',), b=('a',), c=('a',), d=('e',), e=('e',), f=('a','e'))
    assert part_kinds(parts(('x',[1]), ('y',[0])))==dict(x=('x',), y=('y',)) # a circle
    assert part_kinds(parts(('w',[]), ('v',[]), ('u',[0]), ('u',[1])))['u']==('v','w') # one name twice

def recall_of(stored, i, mask, size=64):
    "By sorting the pixels of a map in plain numpy."
    heat = F.interpolate(stored.maps[i,-1].mean(0)[None,None], (size,size), mode='bilinear', align_corners=False).numpy().ravel()
    top = np.argsort(-heat, kind='stable')[:round(.1*size*size)]
    return mask.ravel()[top].sum()/mask.sum(), (heat.astype(float)/heat.sum(dtype=float))[mask.ravel()].sum()

@pytest.mark.parametrize('level', ['kind','part'])
def test_part_scores_pixel_by_pixel(done, drawn, level):
    recall,lift = (part_scores(open_study(done), of, level).set_index(['model','seed','image','part']) for of in ('recall','lift'))
    assert recall.index.is_unique and recall.index.equals(lift.index) and set(recall.tier)=={'lora'}
    seen = 0
    for model in ('tiny-clip','tiny-siglip'):
        frozen,tuned = load_maps(done/f'{model}-frozen'),[load_maps(done/f'{model}-lora-seed{k}') for k in (0,1)]
        churches,found = boxed(drawn, frozen.images)
        names = {p:{p} for p in churches.parts.name} if level=='part' else {r.name:{churches.parts.name[j] for j in r.parents} or {r.name} for r in churches.parts.itertuples(index=False)}
        if level=='kind': names = {p:set().union(*(names[k] for k in ks)) for p,ks in names.items()} # the drawn ontology is two deep
        for i,(n,boxes) in enumerate(zip(frozen.images, found)):
            for kind in {k for p,m in boxes for k in names[p]}:
                masks = [m for p,m in boxes if kind in names[p]]; union = np.any(masks, axis=0)
                if not union.any(): continue
                for k in (0,1):
                    r,l = recall.loc[model,k,n,kind],lift.loc[model,k,n,kind]; seen += 1
                    assert r.boxes==sum(m.any() for m in masks) and abs(r.area-union.mean())<1e-12 and abs(r.chance-round(.1*64*64)/64**2)<1e-12 and l.chance==1
                    for s,a,b in ((frozen,r.before,l.before), (tuned[k],r.after,l.after)):
                        hit,mass = recall_of(s, i, union)
                        assert abs(a-hit)<1e-12 and abs(b-mass/union.mean())<1e-5
    assert seen==len(recall)>40

def test_an_even_map_has_lift_one_and_the_recall_of_the_first_rows(root, drawn):
    stored = load_maps(root/'tiny-clip-frozen')
    save_maps(root/'tiny-clip-frozen'/'maps.safetensors', replace(stored, maps=torch.full_like(stored.maps, 1/64)))
    lift,recall = (part_scores(open_study(root), of, 'part').query("model=='tiny-clip'") for of in ('lift','recall'))
    assert np.allclose(lift.before, 1, atol=1e-6)
    _,found = boxed(drawn, stored.images)
    first = (np.arange(64*64)<round(.1*64*64)).reshape(64,64) # ties go to the earlier pixel
    for r in recall.itertuples():
        union = np.any([m for p,m in found[stored.images.index(r.image)] if p==r.part], axis=0)
        assert abs(r.before-(union&first).sum()/union.sum())<1e-12

def test_parts_turn_with_before_and_after(root):
    s = part_scores(open_study(root))
    for f in ('tiny-clip-frozen','tiny-clip-lora-seed0'): (root/f/'maps.safetensors').rename(root/f/'was.safetensors')
    for a,b in (('tiny-clip-frozen','tiny-clip-lora-seed0'), ('tiny-clip-lora-seed0','tiny-clip-frozen')): shutil.copy(root/a/'was.safetensors', root/b/'maps.safetensors')
    pick = lambda d: d.query("model=='tiny-clip' and seed==0").reset_index(drop=True)
    pd.testing.assert_frame_equal(pick(part_scores(open_study(root))).rename(columns=dict(before='after', after='before'))[s.columns], pick(s))

def test_maps_in_another_order_are_refused(root):
    path = root/'tiny-clip-lora-seed1'
    m = load_maps(path)
    save_maps(path/'maps.safetensors', replace(m, images=m.images[::-1], maps=m.maps.flip(0)))
    with pytest.raises(ValueError, match='in another order'): part_scores(open_study(root))
    for bad in (dict(of='iou'), dict(level='box')):
        with pytest.raises(ValueError, match="'recall' or 'lift'"): part_scores(open_study(root), **bad)

def test_part_table_by_plain_pandas_and_scipy(done):
    s = part_scores(open_study(done), level='part')
    t = part_table(s, least=3)
    counts = s.groupby('part').church.nunique()
    assert set(t.part)=={*counts[counts>=3].index} and set(counts[counts>=3].index)!={*counts.index}
    for r in t.itertuples():
        g = s[(s.model==r.model)&(s.tier==r.tier)&(s.part==r.part)]
        m = g.groupby(['church','image'])[['before','after']].mean().groupby('church').mean()
        one = g[g.seed==0]
        assert r.n==len(m) and r.boxes==one.boxes.sum() and r.images==len(one) and r.seeds==2 and abs(r.area-one.area.median())<1e-12 and abs(r.shift-(m.after-m.before).mean())<1e-12
        grid = g.assign(d=g.after-g.before).groupby(['church','seed']).d.mean().unstack('seed')
        if np.ptp(grid)>1e-12:
            both = seed_variance(grid).iloc[2]
            assert r.over=='churches and seeds' and abs(r.p-2*stats.t.sf(abs(both.estimate/both.se), both.df))<1e-12 and abs(r.low-both.low)<1e-12 and abs(r.high-both.high)<1e-12
        else: assert np.isnan(r.p) and r.note
    has = t.p.notna()
    np.testing.assert_allclose(t.p_bh[has], stats.false_discovery_control(t.p[has]))
    assert (t.groupby(['model','tier'])['shift'].diff().dropna()<=0).all()
    pd.testing.assert_frame_equal(part_table(s.sample(frac=1, random_state=1).sort_values(['model','tier'], kind='stable'), 3).sort_values(['model','tier','part'], ignore_index=True), t.sort_values(['model','tier','part'], ignore_index=True), rtol=1e-9)
    assert part_table(s, least=13).empty and 'p_bh' in part_table(s, least=13)

# ---- blocks and heads

def test_cells_are_the_scores_of_the_study(done):
    for model,shape in (('tiny-clip',(4,5)), ('tiny-siglip',(1,5))):
        before,after = open_study(done).church_cells(model, 'lora')
        assert before.shape==after.shape==(12, shape[0]*shape[1]) and before.columns.equals(after.columns)
        for block,head in before.columns:
            pick = lambda run: (d := table_of(done/run))[(d.block==block)&(d['head']==head)].set_index('image').value
            s = pd.DataFrame(dict(before=pick(f'{model}-frozen'), after=(pick(f'{model}-lora-seed0')+pick(f'{model}-lora-seed1'))/2))
            g = s.groupby(s.index.str.split('_').str[0]).mean()
            np.testing.assert_allclose(before[block,head], g.before); np.testing.assert_allclose(after[block,head], g.after)

def test_several_photographs_and_seeds_by_hand(root):
    for f,values in (('tiny-clip-frozen',[0,0,0]), ('tiny-clip-lora-seed0',[.1,.3,.5]), ('tiny-clip-lora-seed1',[.3,.5,.1])):
        rows = [dict(image=n, block=0, head=h, metric='iou@90', value=v, chance=0, ceiling=1) for h in ('0','10','2','mean') for n,v in zip(('Q1_wd0.jpg','Q1_wd1.jpg','Q2_wd0.jpg'), values)]
        pd.DataFrame(rows).to_parquet(root/f/'metrics.parquet', index=False)
    (root/'images.csv').unlink() # these images are of no data set, and their names say the church
    before,after = open_study(root).church_cells('tiny-clip', 'lora')
    assert [h for _,h in after]==['0','2','10','mean'] and (before==0).all(axis=None)
    np.testing.assert_allclose(after.loc['Q1'], (.2+.4)/2); np.testing.assert_allclose(after.loc['Q2'], .3)

def all_signs(d):
    "Single-step p of the largest |t|, by trying every pattern of signs."
    t = lambda x: np.abs(x.mean(0)/(x.std(0, ddof=1)/len(x)**.5))
    seen = t(d)
    largest = np.array([t(d*np.array(s)[:,None]).max() for s in itertools.product((1,-1), repeat=len(d))])
    return (largest[:,None]>=seen-1e-9).mean(0)

def test_blocks_by_every_pattern_of_signs(done):
    t = block_table(open_study(done))
    clip = t[t.model=='tiny-clip']
    before,after = (d.xs('mean', axis=1, level='head') for d in open_study(done).church_cells('tiny-clip', 'lora'))
    d = (after-before).to_numpy()
    np.testing.assert_allclose(clip.t, stats.ttest_1samp(d, 0).statistic, rtol=1e-8); np.testing.assert_allclose(clip.p_max_t, all_signs(d), atol=1e-12)
    np.testing.assert_allclose(clip.before, before.mean()); np.testing.assert_allclose(clip.after-clip.before, clip['shift'], atol=1e-15)
    assert (clip.n==12).all() and (clip.seeds==2).all() and (clip.p_step_down<=clip.p_max_t).all()
    last = study_table(open_study(done)).query("tier=='lora'").set_index('model')['shift']
    for m,g in t[t.reader!='received'].groupby('model'): assert abs(g['shift'].iloc[-1]-last[m])<1e-14
    siglip = t[t.model=='tiny-siglip']; blocks = siglip[siglip.reader=='received']; assert siglip.reader.tolist()==['pooling head']+['received']*4*(len(blocks)//4) and (clip.reader=='class token').all()
    stored = open_study(done).maps('tiny-siglip-frozen'); seen = open_study(done).photographs('tiny-siglip')
    for k in (0,3): # by hand, of the frozen model
        own = score_maps(stored.received[:,k].mean(1), seen.boxes, [*seen.names], seen.size, only=['iou@90']).set_index('image').value
        assert blocks[blocks.block==k].before.iloc[0]==pytest.approx(own.groupby(open_study(done).groups(own.index)).mean().mean(), abs=1e-12)

def set_levels(root, run, levels, noise=0., seed=0):
    "Give every image of a run these levels by block and head; 'mean' is their mean."
    levels,rng = np.atleast_2d(levels),np.random.default_rng(seed)
    d = table_of(root/run); d = d[d.block==d.block.max()].drop_duplicates('image')
    base = np.random.default_rng(99).normal(0, .02, len(d)) # difficulty, the same in every run
    rows = []
    for b in range(levels.shape[0]):
        per = levels[b]+base[:,None]+noise*rng.normal(size=(len(d), levels.shape[1]))
        for k,h in enumerate([*map(str, range(levels.shape[1])),'mean']): rows.append(d.assign(block=b, head=h, value=per.mean(1) if h=='mean' else per[:,k]))
    pd.concat(rows).to_parquet(root/run/'metrics.parquet', index=False)

def test_relocation_is_seen_as_relocation(root):
    set_levels(root, 'tiny-clip-frozen', [[.1],[.3],[.1],[.1]])
    for k in (0,1): set_levels(root, f'tiny-clip-lora-seed{k}', [[.1],[.1],[.1],[.3]])
    r = best_block_table(open_study(root)).set_index('model').loc['tiny-clip']
    assert (r.frozen_block,r.tuned_block,r.blocks,r.n,r.divisions)==(1,3,4,12,100) and abs(r.last_to_last-.2)<1e-12 and abs(r.best_to_best)<1e-12
    siglip = best_block_table(open_study(root)).query("model=='tiny-siglip'").set_index('reader')
    assert siglip.blocks.to_dict()=={'pooling head':1, 'received':4} and 'nothing to choose' in siglip.note['pooling head'] and not siglip.note['received']

# ---- the blocks of a model with a pooling head, by what patches receive

def by_hand(opened, runs, block, head):
    "The metric of stored maps of received attention, by church; a mean over runs."
    seen = opened.photographs('tiny-siglip')
    def one(run):
        maps = opened.maps(run).received[:,block]
        maps = maps.mean(1) if head=='mean' else maps[:,int(head)]
        t = score_maps(maps, seen.boxes, [*seen.names], seen.size, only=['iou@90']).set_index('image').value
        return t.groupby(opened.groups(t.index)).mean()
    return sum(map(one, runs))/len(runs)

def test_depth_of_a_pooling_head_is_asked_of_received_attention(done):
    opened = open_study(done); frozen,tuned = ['tiny-siglip-frozen'],[f'tiny-siglip-lora-seed{k}' for k in (0,1)]
    before,after = opened.received_cells('tiny-siglip', 'lora')
    heads = ['0','1','2','3']
    assert before.columns.tolist()==after.columns.tolist()==[(b,h) for b in range(4) for h in (*heads,'mean')]
    for b,h in ((0,'3'),(2,'mean'),(3,'0')):
        for cells,runs in ((before,frozen),(after,tuned)): np.testing.assert_allclose(cells[b,h], by_hand(opened, runs, b, h), atol=1e-12)
    g = head_grid(opened, 'tiny-siglip', 'lora'); own,blocks = (g[g.reader==k] for k in ('pooling head','received'))
    assert len(own)==4 and len(blocks)==16 and (blocks.n==12).all() and (blocks.seeds==2).all()
    np.testing.assert_allclose(blocks.estimate, (after-before)[[(b,h) for b in range(4) for h in heads]].mean())
    np.testing.assert_allclose(blocks.p_max_t, all_signs((after-before).drop(columns='mean', level='head').to_numpy()), atol=1e-12) # a family of its own
    t = head_table(pd.concat([g, head_grid(opened, 'tiny-clip', 'lora')]))
    assert [*zip(t.model, t.reader, t.heads)]==[('tiny-siglip','pooling head',4), ('tiny-siglip','received',16), ('tiny-clip','class token',16)]
    b = best_heads(opened).query("model=='tiny-siglip'").set_index(['reader','of'])
    assert b.heads.groupby('reader').first().to_dict()=={'pooling head':4, 'received':16} and b.naive['received','frozen']==before.drop(columns='mean', level='head').mean().max()
    best = best_block_table(opened).query("model=='tiny-siglip'").set_index('reader')
    last = block_table(opened).query("model=='tiny-siglip' and block==3")['shift'].iloc[0]
    assert best.last_to_last['received']==pytest.approx(last, abs=1e-15) and best.frozen_block['received'] in range(4) and best.divisions['received']==100

def test_a_study_without_blocks_of_its_pooling_head_has_its_one_map(root):
    "As older ones are; and one whose maps are of other images is refused."
    for name in ('tiny-siglip-lora-seed1','tiny-siglip-lora-seed0'):
        stored = open_study(root).maps(name)
        save_maps(root/name/'maps.safetensors', replace(stored, received=stored.received[:,:0])); (root/name/'received.parquet').unlink()
        opened = open_study(root)
        assert opened.received_cells('tiny-siglip', 'lora')==() and [*opened.cells_by_reader('tiny-siglip', 'lora')]==['pooling head']
    for table in (block_table(opened), best_block_table(opened), head_grid(opened, 'tiny-siglip', 'lora'), best_heads(opened)): assert set(table[table.model=='tiny-siglip'].reader)=={'pooling head'}
    kept = opened.maps('tiny-siglip-frozen')
    for name in ('tiny-siglip-lora-seed0','tiny-siglip-lora-seed1'): save_maps(root/name/'maps.safetensors', replace(kept, images=kept.images[1:]+kept.images[:1]))
    with pytest.raises(ValueError, match='other images'): open_study(root).received_cells('tiny-siglip', 'lora')

def test_what_blocks_receive_is_scored_once_at_the_end_of_a_run(root, monkeypatch):
    "By the declared metric; computed where that is not stored, to the same bits and once; never with maps of other images."
    names,asked = [p.parent.name for p in sorted(root.glob('tiny-siglip-*/run.json'))],[]
    def counted(*args, **how): asked.append(args); return received_scores(*args, **how)
    monkeypatch.setattr('ssl_wikichurches.study.reader.received_scores', counted)
    both = lambda opened: [opened.received_cells('tiny-siglip', 'lora', m) for m in ('iou@90','iou@90')][-1]
    stored = both(open_study(root)); assert not asked and all((root/n/'received.parquet').is_file() for n in names) and len(names)==5
    other = open_study(root).received_cells('tiny-siglip', 'lora', 'iou@area'); assert len(asked)==3 # frozen and two seeds
    for n in names: (root/n/'received.parquet').unlink()
    for was,now in zip(stored, both(open_study(root))): pd.testing.assert_frame_equal(was, now, check_exact=True)
    assert len(asked)==6
    said = json.loads((root/'study.json').read_text()); (root/'study.json').write_text(json.dumps(said|dict(analysis=dict(metric='iou@area'))))
    assert _declared_metric(root)=='iou@area' and rescore(open_study(root), progress=False)
    for was,now in zip(other, open_study(root).received_cells('tiny-siglip', 'lora', 'iou@area')): pd.testing.assert_frame_equal(was, now, check_exact=True)
    assert len(asked)==6 and not [*root.glob('tiny-clip-*/received.parquet')]
    t = pd.read_parquet(root/names[1]/'received.parquet'); t.iloc[::-1].to_parquet(root/names[1]/'received.parquet', index=False)
    with pytest.raises(ValueError, match='other images'): open_study(root).received_cells('tiny-siglip', 'linear', 'iou@area')

def test_tables_that_do_not_say_whose_attention_are_still_drawn(done, tmp_path):
    new = analyse(open_study(done))
    folder = Path(shutil.copytree(new.path, tmp_path/'tables')); said = json.loads((folder/'tables.json').read_text())
    for k in ('head_grid','heads','best_heads'):
        t = pd.read_csv(folder/f'{k}.csv', keep_default_na=False); t[t.reader!='received'].drop(columns='reader').to_csv(folder/f'{k}.csv', index=False); del said['tables'][k]['columns']['reader']
    (folder/'tables.json').write_text(json.dumps(said))
    old = read_tables(folder)
    assert 'reader' not in old['head_grid'] and [ax.get_title() for ax in report_figures(old)['heads'].axes[:2]]==['tiny-clip  lora','tiny-siglip  lora']
    assert 'tiny-siglip  lora\nreceived' in [ax.get_title() for ax in report_figures(new)['heads'].axes]
    assert '<h2>Heads</h2>' in write_report(old, tmp_path/'r.html').read_text()

def test_heads_by_every_pattern_of_signs_and_by_rank(done):
    g = head_grid(open_study(done), 'tiny-clip', 'lora')
    before,after = (d.drop(columns='mean', level='head') for d in open_study(done).church_cells('tiny-clip', 'lora'))
    np.testing.assert_allclose(g.p_max_t, all_signs((after-before).to_numpy()), atol=1e-12)
    r = head_table(pd.concat([g, head_grid(open_study(done), 'tiny-siglip', 'lora')])).set_index('model').loc['tiny-clip']
    assert abs(r.rank_correlation-stats.spearmanr(before.mean(), after.mean()).statistic)<1e-12 and r.heads==16 and r.largest==g.estimate.max()
    assert r.up+r.down==(g.p_step_down<.05).sum()

def test_the_best_of_many_heads_is_luck(root):
    rng = np.random.default_rng(0)
    set_levels(root, 'tiny-clip-frozen', np.full((12,12), .1), .05, 1)
    for k in (0,1): set_levels(root, f'tiny-clip-lora-seed{k}', np.full((12,12), .1), .05, 2+k)
    b = best_heads(open_study(root)).query("model=='tiny-clip'").set_index('of')
    assert b.chosen['shift']>.03 and abs(b.other['shift'])<.015 and b.naive['shift']>.02 and (b.heads==144).all() # nothing but noise
    before,after = open_study(root).church_cells('tiny-clip', 'lora')
    m = (after-before).drop(columns='mean', level='head').mean()
    assert b.naive['shift']==m.max() and (b.block['shift'],b['head']['shift'])==m.idxmax()
    assert not (head_grid(open_study(root), 'tiny-clip', 'lora').p_step_down<.01).any()

# ---- what is lacking

def test_incomplete_studies(root):
    (root/'tiny-clip-lora-seed0'/'run.json').unlink()
    assert tuned_pairs(open_study(root)).set_index('model').seeds.to_dict()=={'tiny-clip':1, 'tiny-siglip':2}
    assert set(style_table(styled_scores(open_study(root))).model)=={'tiny-clip','tiny-siglip'}
    (root/'tiny-clip-frozen'/'run.json').unlink()
    for t in (part_table(part_scores(open_study(root))), block_table(open_study(root)), best_block_table(open_study(root)), best_heads(open_study(root)), tuned_pairs(open_study(root))): assert set(t.model)=={'tiny-siglip'}
    with pytest.raises(ValueError, match="no complete frozen run of 'tiny-clip'"): head_grid(open_study(root), 'tiny-clip', 'lora')
    with pytest.raises(ValueError, match="none of tier 'full'"): head_grid(open_study(root), 'tiny-siglip', 'full')
    html = write_report(analyse(open_study(root))).read_text() # only a pooling head is left
    assert 'no depth to look into' not in html and 'received' in html and 'pooling head' in html and len(html)<3_000_000

def test_linear_probes_have_nothing_to_divide(root):
    for k in (0,1):
        for m in ('tiny-clip','tiny-siglip'): (root/f'{m}-lora-seed{k}'/'run.json').unlink()
    tables = style_table(styled_scores(open_study(root))), style_tests(styled_scores(open_study(root))), part_scores(open_study(root)), part_table(part_scores(open_study(root))), block_table(open_study(root)), best_block_table(open_study(root)), best_heads(open_study(root)), tuned_pairs(open_study(root))
    assert all(t.empty and len(t.columns)>3 for t in tables)
    html = write_report(analyse(open_study(root))).read_text()
    assert html.count('nothing to divide')==5 and html.count('<svg ')==5 and '<img' not in html and all(f'<h2>{s}</h2>' in html for s in ('By style','By part','By block','Heads','Shift'))

def test_other_metrics_and_unknown_ones(done):
    assert set(block_table(open_study(done), 'auroc').unit)=={'auroc'} and set(styled_scores(open_study(done), 'coverage').unit)=={'coverage'}
    for f in (block_table, best_block_table, best_heads, styled_scores):
        with pytest.raises(ValueError, match="metric 'iuo'"): f(open_study(done), 'iuo')

def test_report_shows_the_detail(done, tmp_path):
    html = write_report(analyse(open_study(done)), tmp_path/'r.html').read_text()
    for word in ('p_step_down','p_bh','frozen_block','rank_correlation','least squares, F','at least 5 churches','pooling head'): assert word in html, word
    assert not re.search(r'(src|href)="(?!data:|#)', html) and len(html)<3_000_000 and not re.search('>nan<', html, re.I)

def test_a_study_whose_churches_have_few_parts_says_so(root, monkeypatch):
    for module in ('analysis','report'): monkeypatch.setattr(f'ssl_wikichurches.study.{module}.LEAST', 13)
    html = write_report(analyse(open_study(root))).read_text()
    assert 'No kind of building part is boxed in at least 13 churches.' in html and html.count('nothing to divide')==0

# ---- photographs

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, allow_nan=False), min_size=1, max_size=12), st.integers(1, 5))
def test_extremes_are_the_ends_of_the_order(shifts, k):
    d = pd.DataFrame(dict(image=[f'i{j}' for j in range(len(shifts))], before=0., after=shifts))
    names = extreme_images(d, k); found = [shifts[int(n[1:])] for n in names]
    assert len(names)==len(set(names))==min(2*k, len(shifts)) and found==sorted(found, reverse=True)
    assert found[0]==max(shifts) and found[-1]==min(shifts)
    if len(shifts)>2*k: assert sorted(found)==sorted(sorted(shifts)[:k]+sorted(shifts)[-k:])

def test_gallery(done):
    found = examples(open_study(done), 'tiny-clip', 'lora', k=2)
    s = open_study(done).scores().query("model=='tiny-clip' and tier=='lora' and seed==0").set_index('image')
    for e in found:
        assert (e.before,e.after)==(s.before[e.image],s.after[e.image])
        for m,f in zip(e.maps, ('tiny-clip-frozen','tiny-clip-lora-seed0')):
            stored = load_maps(done/f)
            assert torch.equal(m, stored.maps[stored.images.index(e.image),-1].mean(0))
    fig = gallery(open_study(done), 'tiny-clip', 'lora', k=2)
    assert len(fig.axes)==16 and 'chosen by the outcome' in fig.get_suptitle()
    with pytest.raises(ValueError, match='at least one'): extreme_images(s.reset_index(), 0)

# ---- figures

def test_slope_plot_draws_levels_and_intervals_of_the_shift():
    t = pd.DataFrame([dict(model='mae', tier=k, before=.1, after=.1+s, low=s-.01, high=s+.02) for k,s in (('linear',0.), ('lora',.03))])
    ax = slope_plot(t)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [.1,.1,.13])
    bars = [l.get_ydata() for l in ax.lines if len(l.get_ydata())==2]
    assert len(bars)==1 and np.allclose(bars[0], [.12,.15]) # none for the linear probe
    plt.close('all')

def test_grid_plot_is_centered_on_zero_and_frames_what_is_sure():
    t = pd.DataFrame([dict(block=b, head=str(h), estimate=.01*(b-h), p_step_down=.01 if (b,h)==(1,10) else .2) for b in range(2) for h in range(11)])
    ax = grid_plot(t)
    assert ax.images[0].get_clim()==(-.1,.1) and ax.images[0].get_cmap().name=='RdBu_r' and len(ax.patches)==1
    assert np.allclose(ax.patches[0].get_xy(), (10-.44,1-.44)) and ax.images[0].get_array()[1,10]==pytest.approx(-.09) # head 10 after head 9
    assert grid_plot(t, limit=.5).images[0].get_clim()==(-.5,.5)
    assert grid_plot(t.assign(estimate=0.)).images[0].get_clim()[1]>0
    plt.close('all')

def test_block_plot_fills_what_is_sure_and_ranking_plot_sorts():
    t = pd.DataFrame(dict(model='clip', tier='lora', block=range(4), before=.1, after=[.1,.2,.3,.4], p_step_down=[1,.01,.2,.04]))
    filled = [l for l in block_plot(t).lines if l.get_ls()=='None' and l.get_mfc()!='white']
    assert len(filled)==1 and [*filled[0].get_xdata()]==[1,3]
    r = pd.DataFrame([dict(part=p, model='clip', tier='lora', n=n, shift=s, low=np.nan, high=np.nan) for p,n,s in (('a',5,-.1),('b',7,.2))])
    assert [l.get_text() for l in ranking_plot(r).get_yticklabels()]==['b  n=7','a  n=5']
    for f in (block_plot, ranking_plot, grid_plot, slope_plot):
        with pytest.raises(ValueError, match='has no columns'): f(pd.DataFrame(dict(x=[1])))
    plt.close('all')
