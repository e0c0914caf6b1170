"The table of all metrics: against single calls, in any order, memory, device and number of threads; by part; from files; on real photographs."
import numpy as np, pandas as pd, pytest, torch
from ssl_wikichurches.attention.baselines import baseline_maps
from ssl_wikichurches.attention.capture import pooled_maps
from ssl_wikichurches.backbones.encoders import load_backbone
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.data.churches import ChurchDataset, box_mask, eval_transform, read_churches
from ssl_wikichurches.attention.saliency_metrics import (area_matched_iou, average_precision, best_box, box_masks, box_scores, correlation, dilate, emd, information_gain, kl_divergence, loo_prior, mass_iou, n_holding, nss, pointing_game,
    rank_accuracy, shuffled_auroc, similarity, soft_target)
from ssl_wikichurches.attention.metrics import auroc, coverage, iou_at_percentile, iou_ceiling, iou_chance, upsample
from ssl_wikichurches.attention.scores import BYTES_PER_PIXEL, METRICS, Metric, ScoreOptions, higher_is_better, image_iou, metric_names, read_boxes, read_maps, score_maps

T,KEY = torch.tensor,['image','block','head','metric']
close = lambda x, y, tol=1e-9: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tol, rtol=0)
ordered = lambda t: t.sort_values(KEY, ignore_index=True)

def some(n=5, s=24, L=2, H=3, g=6, seed=7):
    r = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, s-8, (n,3,2), generator=r).float(); boxes = list(torch.cat([corner, corner+torch.randint(3, 9, (n,3,2), generator=r)], -1))
    return torch.rand(n,L,H,g,g, generator=r)**3, boxes, list('abcdefghij'[:n])

def test_table_equals_single_calls():
    maps,boxes,names = some(); groups = list('aabbc'); masks = torch.stack([box_mask(b, 24) for b in boxes])
    options = ScoreOptions(percentiles=(50,90), q=80, mass=.5, tolerance=2, eps=.01, prior_eps=.3, emd_grid=3)
    table = score_maps(maps, boxes, names, 24, groups, options=options)
    assert len(table)==5*2*4*len(metric_names(options)) and not table.isna().any().any() and (table.dtypes[['value','chance','ceiling']]==float).all()
    assert set(table.metric)==set(metric_names(options))
    row = table.set_index(KEY).sort_index()
    prior,others = loo_prior(masks, groups, .3),loo_prior(masks, groups, 0)
    for i,name in enumerate(names):
        m,t,parts = masks[i],soft_target(masks[i], 6),box_masks(boxes[i], 24)
        for block in range(2):
            for head,x in [*((str(h),maps[i,block,h]) for h in range(3)), ('mean',maps[i,block].mean(0))]:
                up = upsample(x, 24)
                pooled = x.double().reshape(3,2,3,2).sum((1,3))
                want = {'iou@50':iou_at_percentile(up, m, 50), 'iou@90':iou_at_percentile(up, m), 'coverage':coverage(up, m), 'lift':coverage(up, m)/m.double().mean(), 'auroc':auroc(up, m),
                        'iou@area':area_matched_iou(up, m), 'rank_accuracy':rank_accuracy(up, m), 'mass_iou@50':mass_iou(up, m, .5), 'average_precision':average_precision(up, m), 'pointing@2':pointing_game(up, m, 2),
                        'nss':nss(up, m), 'shuffled_auroc':shuffled_auroc(up, m, others[i]), 'information_gain':information_gain(up, m, prior[i], .01), 'kl':kl_divergence(x, t, .01), 'similarity':similarity(x, t),
                        'correlation':correlation(x, t), 'emd':emd(pooled, soft_target(m, 3)), 'recall@80':box_scores(up, parts, 'recall', 80).mean(), 'best_iou@80':best_box(up, parts, 'iou', 80), 'best_coverage':best_box(up, parts, 'coverage')}
                for k,v in want.items(): assert row.value[name,block,head,k]==pytest.approx(v.item(), abs=1e-9), k
                k = n_holding(up, .5).item(); assert row.chance[name,block,head,'mass_iou@50']==pytest.approx(iou_chance(int(m.sum()), 576, 100*(1-k/576)), abs=1e-12)
                assert row.ceiling[name,block,head,'mass_iou@50']==pytest.approx(iou_ceiling(int(m.sum()), 576, 100*(1-k/576)), abs=1e-12)
                assert row.chance[name,block,head,'pointing@2']==pytest.approx(dilate(m, 2).double().mean().item(), abs=1e-12)
    lower = row.index.get_level_values('metric').isin(['kl','emd'])
    assert (np.where(lower, row.value-row.ceiling, row.ceiling-row.value)>=-1e-9).all()

def test_a_metric_is_one_record(monkeypatch):
    "What stands in the table is asked for, scored, and given the levels of even attention and of the target."
    maps,boxes,names = some()
    monkeypatch.setitem(METRICS, 'peak', Metric('peak', 'largest value', lambda c: c.maps.patches.amax((-2,-1)).double(), better='lower', patches=True))
    table = score_maps(maps, boxes, names, 24, only=['peak']); assert {*table.metric}=={'peak'} and not higher_is_better('peak')
    close(table[table['head']=='2'].value, maps[:,:,2].amax((-2,-1)).flatten())
    assert (table.chance==1).all(); close(table[(table.block==0)&(table['head']=='mean')].ceiling, [soft_target(box_mask(b, 24), 6).max() for b in boxes])
    assert metric_names()[-1]=='peak' and 'peak' in {*score_maps(maps, boxes, names, 24).metric}

def test_iou_of_a_backbone():
    churches = load_churches('synthetic'); names = [*churches.boxes.image.unique()[:3], churches.images.index.difference(churches.boxes.image)[0]]
    ds,b = ChurchDataset(churches, names, eval_transform(96)),load_backbone('tiny-clip').requires_grad_(False)
    for q in (90, 70):
        found = image_iou(b, ds, q, batch=2); assert [*found.index]==names[:3]
        for item in [*ds][:3]:
            heat = upsample(pooled_maps(b, item['image'][None]).half().float()[0,-1].mean(0), 96)
            assert found[item['name']]==pytest.approx(iou_at_percentile(heat, box_mask(item['boxes'], 96), q).item(), abs=2e-3)

def test_memory_and_threads_change_nothing():
    maps,boxes,names = some(); one = BYTES_PER_PIXEL*24*24; threads = torch.get_num_threads(); tables = []
    try:
        for n,m in ((1,one), (2,3*one), (3,2**29)):
            torch.set_num_threads(n); tables.append(score_maps(maps, boxes, names, 24, memory=m)); assert torch.get_num_threads()==n
    finally: torch.set_num_threads(threads)
    for t in tables[1:]: pd.testing.assert_frame_equal(t, tables[0], check_exact=True)
    with pytest.raises(ValueError, match='takes'): score_maps(maps, boxes, names, 24, memory=one-1)

def test_parts_of_one_image_or_of_several_at_once():
    "Different numbers of maps fit the memory: some maps of an image, all of one, or all of several; of targets from one pixel to the whole image, of different numbers of boxes and parts."
    r = torch.Generator().manual_seed(5); maps,_,names = some(n=7, L=2, H=2); corner = torch.randint(0, 16, (7,5,2), generator=r).float()
    boxes = [b[:1+i%5] for i,b in enumerate(torch.cat([corner, corner+torch.randint(3, 9, (7,5,2), generator=r)], -1))]; boxes[2] = T([[0.,0,24,24],[3,3,4,4]]); maps[3] = .2; maps[4] = maps[4].round()+.1
    of_parts = [list('xyxzy')[:len(b)] for b in boxes]
    for m,parts in ((maps, of_parts), (maps[:,0,0], of_parts), (maps[:,0,0], None)):
        tables = [score_maps(m, boxes, names, 24, parts=parts, memory=k*BYTES_PER_PIXEL*24*24) for k in (1, 5, 13, 1000)]
        for t in tables[1:]: pd.testing.assert_frame_equal(t, tables[0], check_exact=True)
        for bad in (0, 6):
            broken = m.clone(); broken[bad].view(-1)[3] = float('nan')
            with pytest.raises(ValueError, match='finite'): score_maps(broken, boxes, names, 24, parts=parts)

def test_order_of_images_and_parallel_doubling():
    maps,boxes,names = some()
    a = ordered(score_maps(maps, boxes, names, 24, list('aabbc')))
    b = ordered(score_maps(maps.flip(0), boxes[::-1], names[::-1], 24, list('cbbaa')))
    c = ordered(score_maps(maps*2, boxes, names, 24, list('aabbc')))
    for other in (b, c):
        assert a[KEY].equals(other[KEY])
        for col in ('value','chance','ceiling'): close(a[col], other[col], 1e-10)

def test_mirror_images_score_the_same():
    maps,boxes,names = some()
    mirrored = [torch.stack([24-b[:,2], b[:,1], 24-b[:,0], b[:,3]], 1) for b in boxes]
    ties = ('iou@area','rank_accuracy','mass_iou@60') # of pixels with equal values the earlier one is kept
    a,b = (ordered(t[~t.metric.isin(ties)&~t.metric.str.match('iou@|recall|best_iou')]) for t in (score_maps(maps, boxes, names, 24), score_maps(maps.flip(-1), mirrored, names, 24)))
    close(a.value, b.value, 1e-3); close(a.ceiling, b.ceiling, 1e-9) # rounding of the interpolation makes or breaks ties at the border

def test_many_images_with_one_map_equal_each_alone(monkeypatch):
    "Blocks of images, of which some have an even target, some many boxes; and levels by a plain loop."
    r = torch.Generator().manual_seed(3); corner = torch.randint(0, 16, (20,9,2), generator=r).float(); boxes = [b[:1+i%9] for i,b in enumerate(torch.cat([corner, corner+torch.randint(3, 9, (20,9,2), generator=r)], -1))]
    boxes[4] = T([[0.,0,24,24]]); maps,names = torch.rand(20,6,6, generator=r)**3,[f'{i:02}' for i in range(20)]; maps[7] = .3; maps[8] = maps[8].round()+.1
    table = score_maps(maps, boxes, names, 24)
    for at_once in (1, 3):
        monkeypatch.setattr('ssl_wikichurches.attention.scores.IMAGES_AT_ONCE', at_once); pd.testing.assert_frame_equal(score_maps(maps, boxes, names, 24), table, check_exact=True)
    both = table.set_index(KEY).join(pd.concat([score_maps(m[None], [b], [n], 24) for m,b,n in zip(maps, boxes, names)]).set_index(KEY).add_suffix('_alone'), how='inner')
    assert len(both)==len(table)-2*20 and all((both[k]==both[k+'_alone']).all() for k in ('value','chance','ceiling'))
    row = table.set_index(['metric','image'])
    for n,m,b in zip(names, maps, boxes):
        each = [box_mask(x[None], 24).flatten() for x in b]; mask = box_mask(b, 24); worth = sum(e.double()/e.sum() for e in each)/len(each)
        close(row.ceiling['recall@90',n], worth.sort(descending=True).values[:58].sum()); close(row.chance['emd',n], emd(torch.ones(6,6), soft_target(mask, 6))); close(row.ceiling['kl',n], kl_divergence(soft_target(mask, 6), soft_target(mask, 6)))
        heat = upsample(m, 24).flatten(); close(row.value['best_coverage',n], max(heat.double()[e].sum()/heat.double().sum() for e in each))
        assert [iou_chance(int(mask.sum()), 576, q) for q in (50,90)]==[row.chance[f'iou@{q}',n] for q in (50,90)]

def test_only_what_is_asked():
    maps,boxes,names = some(); whole = ordered(score_maps(maps, boxes, names, 24))
    for only in (['iou@90'], ['iou'], ['emd','auroc'], ['mass_iou'], ['shuffled_auroc'], ['best_coverage','recall@90'], *([k] for k in whole.metric.unique())):
        part = score_maps(maps, boxes, names, 24, only=only)
        want = whole[[m in only or m.split('@')[0] in only for m in whole.metric]].reset_index(drop=True)
        pd.testing.assert_frame_equal(ordered(part), want, check_exact=True)
    signed = maps-.5 # gradients have a sign: a ranking can be scored, a share cannot
    assert score_maps(signed, boxes, names, 24, only=['iou','auroc','average_precision']).value.notna().all()
    with pytest.raises(ValueError, match='negative'): score_maps(signed, boxes, names, 24)

def test_one_map_per_image_and_arrays():
    maps,boxes,names = some(); mean = maps[:,1].mean(1)
    want = score_maps(maps[:,1:], boxes, names, 24).query("head=='mean'").reset_index(drop=True)
    for m in (mean, mean.numpy(), mean.double()):
        got = score_maps(m, [b.numpy() for b in boxes], names, 24); assert set(got['head'])=={'mean'} and set(got.block)=={0}
        pd.testing.assert_frame_equal(got, want, check_exact=False, atol=1e-6, rtol=0)
    pixels = score_maps(upsample(mean, 24), boxes, names, 24, only=['iou','auroc','nss']) # maps of pixels, as other programs make them
    close(ordered(pixels).value, ordered(want[want.metric.isin(pixels.metric)]).value, 1e-6)

def test_a_single_church_has_no_others():
    maps,boxes,names = some()
    for groups in (list('aaaaa'),):
        table = score_maps(maps, boxes, names, 24, groups); assert not {'shuffled_auroc','information_gain'}&set(table.metric)
    with pytest.raises(ValueError, match='needs other churches'): score_maps(maps[:1], boxes[:1], names[:1], 24, only=['information_gain'])

def test_by_part():
    maps,boxes,names = some(); parts = [['door','tower','door'],['tower']*3,['door','gable','tower'],['a','b','c'],['door']*3]
    table = score_maps(maps, boxes, names, 24, parts=parts).set_index(['image','part','block','head','metric']).sort_index()
    for i,name in enumerate(names):
        assert [*dict.fromkeys(parts[i])]==[p for p in dict.fromkeys(parts[i]) if (name,p) in table.index]
        for part in set(parts[i]):
            mine = [b for b,p in zip(boxes[i], parts[i]) if p==part]
            alone = score_maps(maps[i:i+1], [torch.stack(mine)], [name], 24).set_index(['block','head','metric'])
            both = table.loc[name,part].join(alone.add_suffix('_alone'), how='inner'); assert len(both)==len(alone)
            for col in ('value','chance','ceiling'): close(both[col], both[col+'_alone'], 1e-12)
    each = score_maps(maps, boxes, names, 24, parts=[range(3)]*5, only=['recall']) # every box by itself
    whole = score_maps(maps, boxes, names, 24, only=['recall'])
    close(each.groupby(['image','block','head']).value.mean(), whole.groupby(['image','block','head']).value.mean(), 1e-12)

def test_a_box_that_is_the_whole_image_and_one_that_is_no_pixel():
    maps,boxes,names = some(n=3); boxes[0] = T([[0.,0,24,24],[3.1,3.1,3.3,3.4]])
    table = score_maps(maps, boxes, names, 24); one = table[table.image=='a'].set_index('metric').value
    assert not table.drop(columns='head').isna().any().any() and not {'correlation','auroc'}&set(one.index) and {*one.index}|{'correlation','auroc'}=={*metric_names()} # nothing is outside, nothing can correlate with an even target
    for k in ('iou@area','rank_accuracy','average_precision','pointing@0','best_coverage','coverage'): close(one[k], 1)
    close(one['nss'], 0); assert (one['recall@90']<.11).all() # of the one box that is left

def test_chance_of_many_pixels_is_exact_within_rounding():
    from scipy.stats import hypergeom
    for area,k in ((1,5018), (3000,5018), (45000,25088), (50176,9), (12345,49000)):
        x = np.arange(max(0, k+area-50176), min(k, area)+1)
        assert iou_chance(area, 50176, 100*(1-k/50176))==pytest.approx((hypergeom(50176, area, k).pmf(x)*x/(k+area-x)).sum(), rel=1e-8)

def test_real_photographs(real):
    churches = read_churches(real/'photos', on_error='skip', verify=False)
    items = [i for i in ChurchDataset(churches, [*churches.boxes.image.unique()][:6], eval_transform(224)) if len(i['boxes'])]
    boxes,names = [i['boxes'] for i in items],[i['name'] for i in items]; groups = churches.groups(names)
    found = baseline_maps(torch.stack([i['image'] for i in items]), torch.stack([box_mask(b, 224) for b in boxes]), 14, groups)
    table = score_maps(torch.stack(list(found.values()), 1)[:,:,None], boxes, names, 224, groups).query("head=='mean'")
    mean = table.assign(map=np.array(list(found))[table.block]).pivot_table(index='metric', columns='map', values='value')
    strict = mean.drop(index=[k for k in mean.index if k.startswith('iou@') and k not in ('iou@90','iou@95','iou@area')]) # at low percentiles, most pixels that are kept are outside every box
    higher = strict.drop(index=['kl','emd'])
    assert (higher.boxes>=higher.drop(columns='boxes').max(axis=1)-1e-12).all() and (mean.boxes[['kl','emd']]<mean.drop(columns='boxes').min(axis=1)[['kl','emd']]).all()

# ---- files from elsewhere

def test_maps_and_boxes_from_files(tmp_path):
    maps,boxes,names = some(); mean = maps[:,0].mean(1)
    cells = pd.DataFrame([(n,r,c,mean[i,r,c].item()) for i,n in enumerate(names) for r in range(6) for c in range(6)], columns=['image','row','column','value'])
    shuffled = cells.sample(frac=1, random_state=0); shuffled.to_csv(tmp_path/'m.csv', index=False)
    rows = pd.DataFrame([(n,*b.tolist(),p) for n,bs in zip(names, boxes) for b,p in zip(bs, ['door','1','007'])], columns=['image','left','top','right','bottom','part']); rows.to_csv(tmp_path/'b.csv', index=False)
    got,theirs = read_maps(tmp_path/'m.csv'); assert got==[*shuffled.image.unique()]
    for n,m in zip(got, theirs): close(m, mean[names.index(n)], 1e-7)
    again,same = read_maps(tmp_path/'m.csv', names[::-1]); assert again==names[::-1]; close(same, mean.flip(0), 1e-7)
    found,parts = read_boxes(tmp_path/'b.csv', got)
    for n,b in zip(got, found): assert torch.equal(b, boxes[names.index(n)])
    assert parts==[['door','1','007']]*5
    rows.drop(columns='part').to_csv(tmp_path/'n.csv', index=False); assert read_boxes(tmp_path/'n.csv', got)[1] is None

@pytest.mark.parametrize('change,match', [
    (lambda m: m[:-1], 'expected 36 cells'), (lambda m: pd.concat([m, m[:1]]), 'none twice'), (lambda m: m.assign(row=m.row-1), 'expected'), (lambda m: m.drop(columns='row'), 'lacks the columns'),
    (lambda m: m.assign(value=m.value.where(m.index!=3)), 'first row 5')])
def test_bad_map_files(tmp_path, change, match):
    cells = pd.DataFrame([('a',r,c,1.) for r in range(6) for c in range(6)], columns=['image','row','column','value']); change(cells).to_csv(tmp_path/'m.csv', index=False)
    with pytest.raises(ValueError, match=match): read_maps(tmp_path/'m.csv')

def test_bad_box_files(tmp_path):
    rows = pd.DataFrame([('a',1,2,3,4),('b',1,2,1,4)], columns=['image','left','top','right','bottom'])
    rows.to_csv(tmp_path/'b.csv', index=False); rows[:1].to_csv(tmp_path/'a.csv', index=False)
    with pytest.raises(ValueError, match='no area, first row 3'): read_boxes(tmp_path/'b.csv', ['a'])
    with pytest.raises(ValueError, match='no box of 1 images, first c'): read_boxes(tmp_path/'a.csv', ['a','c'])

maps,boxes,names = some(n=2)
@pytest.mark.parametrize('call,match', [
    (lambda: score_maps(maps, boxes, names[:1], 24), 'same number'), (lambda: score_maps(maps[:0], [], [], 24), 'at least one'), (lambda: score_maps(maps[:,0], boxes, names, 24), 'blocks, heads'),
    (lambda: score_maps(maps[...,:3], boxes, names, 24), 'blocks, heads'), (lambda: score_maps(maps, boxes, names, 24, ['a']), 'groups'), (lambda: score_maps(maps, boxes, names, 24, parts=[['a'],['b']]), 'a part for each'),
    (lambda: score_maps(maps, boxes, ['a','a'], 24), 'same name'), (lambda: score_maps(maps, [boxes[0],boxes[1][:0]], names, 24), 'b: boxes'), (lambda: score_maps(maps, [boxes[0],boxes[1]+50], names, 24), 'b: box .* outside the frame of 24'),
    (lambda: score_maps(maps*float('nan'), boxes, names, 24), 'finite'), (lambda: score_maps(maps*0, boxes, names, 24), 'zero'), (lambda: score_maps(maps, boxes, names, 24, only=['iuo']), "no metric 'iuo'"),
    (lambda: score_maps(maps, boxes, names, 24, only=['iou@91']), 'percentiles'),
    (lambda: score_maps(maps, boxes, names, 24, options=ScoreOptions(mass=2)), 'share'), (lambda: score_maps(maps, boxes, names, 24, options=ScoreOptions(q=100)), 'percentile')])
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match): call()
