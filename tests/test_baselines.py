"Baselines against second implementations, untrained twins of every kind of source, and tables of baselines against plain pandas and scipy."
import zlib
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pandas as pd, pytest, timm, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from ssl_wikichurches.study import blind_baselines
from ssl_wikichurches.attention.capture import fuse_heads, pooled_maps
from ssl_wikichurches.backbones.encoders import TINY, Backbone, attention_projections, load_backbone, save_backbone
from ssl_wikichurches.attention.baselines import baseline_maps, edge_maps, prior_maps, saliency_maps, suppress_border
from ssl_wikichurches.finetune.controls import randomly_initialized
from ssl_wikichurches.data.churches import ChurchDataset, box_mask, eval_transform
from ssl_wikichurches.data.download import load_churches
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.runs import run_study
from ssl_wikichurches.attention.maps import load_maps
from ssl_wikichurches.attention.metrics import auroc, iou_at_percentile, n_kept, rank_pixels, upsample
from ssl_wikichurches.study.blind_baselines import FAMILY, IDENTICAL_MAPS, baseline_scores, baseline_table, border_scores, border_table, compare_baselines, score_like, top_pixels
from ssl_wikichurches.study.reader import OpenStudy, open_study

close = lambda x, y, tol=1e-9: np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tol, rtol=0)
def textured(seed, n=2, s=96): # photographs have more of the low frequencies
    x = torch.fft.rfft2(torch.rand(n,3,s,s, generator=torch.Generator().manual_seed(seed)).double())
    f = (torch.fft.fftfreq(s)[:,None]**2+torch.fft.rfftfreq(s)**2).sqrt().clamp(min=1/s)
    x = torch.fft.irfft2(x/f, s=(s,s)); low,high = x.amin((1,2,3), keepdim=True),x.amax((1,2,3), keepdim=True)
    return (x-low)/(high-low)

# ---- spectral residual

def pooled(x, g): # area shares, pixel by pixel
    s,out = len(x),np.zeros((g,g))
    share = lambda i, j: max(0., min((i+1)*g/s, j+1)-max(i*g/s, j))
    w = np.array([[share(i, j) for i in range(s)] for j in range(g)])*s/g # pixels of a row that fall into a cell, with parts
    for a in range(g):
        for b in range(g): out[a,b] = (np.outer(w[a], w[b])*x).sum()
    return out*(g/s)**2 # back to shares: all pixels together count once

def residual_oracle(image, g, work=64, sigma=2.5):
    gray = pooled(image.mean(0), work)
    k = np.exp(-2j*np.pi*np.outer(np.arange(work), np.arange(work))/work)
    spectrum = k@gray@k # the transform as a sum
    amplitude = np.maximum(np.hypot(spectrum.real, spectrum.imag), 1e-6*np.abs(spectrum).max())
    log = np.log(amplitude)
    around = sum(np.roll(log, (i,j), (0,1)) for i in (-1,0,1) for j in (-1,0,1))/9
    kept = np.exp(log-around)*np.exp(1j*np.angle(spectrum))
    power = np.abs(k.conj()@kept@k.conj()/work**2)**2
    r = 10; kernel = np.exp(-.5*(np.arange(-r,r+1)/sigma)**2); kernel /= kernel.sum()
    smooth = lambda x: np.stack([np.convolve(np.pad(row, r, mode='edge'), kernel, mode='valid') for row in x])
    return pooled(smooth(smooth(power).T).T, g)

@pytest.mark.parametrize('s,g', [(64,8), (96,12), (80,7), (224,14)])
def test_saliency_against_a_second_implementation(s, g):
    x = textured(s, s=s); found = saliency_maps(x, g).numpy()
    want = np.stack([residual_oracle(i.numpy(), g) for i in x])
    want *= found.sum()/want.sum() # the oracle's units are means of pixels, the map's are sums
    close(found/found.max(), want/found.max(), 1e-9)

def test_saliency_against_opencv():
    cv2 = pytest.importorskip('cv2', reason='OpenCV is no dependency: its filters check the spectral residual where it is installed')
    for x in textured(5, 4, 64):
        gray = x.mean(0).numpy(); f = cv2.dft(gray, flags=cv2.DFT_COMPLEX_OUTPUT)
        amplitude,phase = cv2.cartToPolar(f[...,0], f[...,1])
        log = np.log(np.maximum(amplitude, 1e-6*amplitude.max()))
        around = cv2.blur(cv2.copyMakeBorder(log, 1, 1, 1, 1, cv2.BORDER_WRAP), (3,3))[1:-1,1:-1]
        re,im = cv2.polarToCart(np.exp(log-around), phase)
        back = cv2.idft(np.dstack([re,im]), flags=cv2.DFT_SCALE)
        want = cv2.GaussianBlur(cv2.magnitude(back[...,0], back[...,1])**2, (21,21), 2.5, borderType=cv2.BORDER_REPLICATE)
        found = saliency_maps(x[None], 64)[0].numpy()
        close(found/found.max(), want/want.max(), 1e-3) # cartToPolar rounds the phase
        author = cv2.blur(log, (3,3), borderType=cv2.BORDER_REPLICATE) # ends of the spectrum and of the picture as in the published code
        re,im = cv2.polarToCart(np.exp(log-author), phase); back = cv2.idft(np.dstack([re,im]), flags=cv2.DFT_SCALE)
        published = cv2.GaussianBlur(cv2.magnitude(back[...,0], back[...,1])**2, (11,11), 2.5, borderType=cv2.BORDER_CONSTANT)
        assert stats.spearmanr(found[8:-8,8:-8].ravel(), published[8:-8,8:-8].ravel())[0]>.8 # away from the border they tell about the same

@settings(max_examples=20, deadline=None)
@given(st.integers(0,10**6), st.floats(.02,1))
def test_saliency_ignores_brightness_and_follows_mirrors(seed, c):
    x = textured(seed, 1); found = saliency_maps(x, 12)
    close(saliency_maps(x*c, 12)/found.max(), found/found.max(), 1e-9)
    for axis in (-1,-2): close(saliency_maps(x.flip(axis), 12)/found.max(), found.flip(axis)/found.max(), 1e-9)
    close(saliency_maps(x, 6)/found.sum(), found.reshape(1,6,2,6,2).sum((2,4))/found.sum(), 1e-12)

@pytest.mark.parametrize('period', [4,8])
@pytest.mark.parametrize('row,column', [(r,c) for r in (1,3,6) for c in (1,4,6)])
def test_the_odd_one_out_wins(period, row, column):
    x = (torch.arange(64)%period<period//2).double().expand(64,64).clone()
    at = slice(8*row,8*row+8),slice(8*column,8*column+8); x[at] = x[at].T.clone()
    grain = torch.rand(64,64, generator=torch.Generator().manual_seed(row*8+column)).double()
    found = saliency_maps((x+.02*grain).expand(1,3,64,64)/1.02, 8)
    assert divmod(found.argmax().item(), 8)==(row,column)

# ---- the border

@settings(max_examples=50, deadline=None)
@given(st.integers(3,12), st.integers(1,5), st.integers(0,99))
def test_border(g, ring, seed):
    m = torch.rand(2,3,g,g, generator=torch.Generator().manual_seed(seed))
    if 2*ring>=g:
        with pytest.raises(ValueError, match='leaves some'): suppress_border(m, ring)
        return
    out = suppress_border(m, ring)
    for i in range(g):
        for j in range(g): assert torch.equal(out[...,i,j], m[...,i,j]*(min(i, j, g-1-i, g-1-j)>=ring))
    assert torch.equal(suppress_border(out, ring), out)

def test_baselines_hold_the_new_ones(images):
    masks = torch.rand(4,96,96, generator=torch.Generator().manual_seed(0))>.9
    found = baseline_maps(images, masks, 12, list('aabc'))
    assert [*found]==['uniform','random','center','prior','inner prior','edges','saliency','boxes']
    assert torch.equal(found['inner prior'], suppress_border(prior_maps(masks, 12, list('aabc')))) and torch.equal(found['saliency'], saliency_maps(images, 12))

@pytest.mark.parametrize('call,match', [
    (lambda: saliency_maps(torch.rand(3,64,64), 8), 'expected'), (lambda: saliency_maps(torch.stack([torch.rand(3,64,64), torch.full((3,64,64), .5)]), 8), 'stands out'),
    (lambda: suppress_border(torch.ones(4,5)), 'leaves some'), (lambda: suppress_border(torch.ones(5,5), 0), 'leaves some')])
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match): call()

# ---- untrained twins

def check_twin(trained):
    "Nothing that differs from the library's start is in the twin, nor is a seed's draw in another's."
    before = torch.random.get_rng_state()
    one,again,two = randomly_initialized(trained, 0),randomly_initialized(trained, 0),randomly_initialized(trained, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    t,a,b,c = (m.model.state_dict() for m in (trained, one, again, two))
    assert t.keys()==a.keys() and all(torch.equal(a[k], b[k]) for k in a) and not {p.data_ptr() for p in one.parameters()}&{p.data_ptr() for p in trained.parameters()}
    drawn = [k for k in a if not torch.equal(a[k], c[k])]
    assert drawn and all(not torch.equal(a[k], t[k]) for k in drawn) # what chance decides
    level = [k for k in a if k not in drawn and a[k].is_floating_point() and not torch.equal(a[k], t[k])] # what training moved from a fixed start
    assert all(a[k].amax()==a[k].amin() for k in level)
    assert one.spec==trained.spec and not one.training and all(p.dtype==torch.float32 for p in one.parameters())
    x = torch.rand(1,3,trained.spec.size,trained.spec.size, generator=torch.Generator().manual_seed(0))
    found = pooled_maps(one, x)
    assert found.shape==pooled_maps(trained, x).shape and torch.equal(found, pooled_maps(again, x)) and not torch.equal(found, pooled_maps(two, x))
    return a,t

@pytest.mark.parametrize('name', TINY)
def test_twins_of_the_toys(name):
    a,t = check_twin(load_backbone(name))
    start = load_backbone(f'{name}-random').model.state_dict()
    for k in t: # every tensor that pretraining changed is changed back
        if not torch.equal(t[k], start[k]): assert not torch.equal(a[k], t[k]), k
    same = randomly_initialized(load_backbone(name), zlib.crc32(f'{name}-random'.encode())).model.state_dict()
    assert all(torch.equal(same[k], start[k]) for k in start)

def test_twins_of_folders_files_and_other_sizes(tmp_path):
    for name in ('tiny-mae','tiny-siglip2','tiny-supervised'):
        check_twin(load_backbone(save_backbone(load_backbone(name), tmp_path/name)))
        check_twin(load_backbone(name, size=64))
    load_backbone('tiny-dinov3').model.save_pretrained(tmp_path/'hub') # a folder of the hub
    check_twin(load_backbone(tmp_path/'hub', size=64))
    torch.manual_seed(7)
    save_file(timm.create_model('vit_tiny_patch16_224').state_dict(), tmp_path/'checkpoint.safetensors')
    source = f"timm/vit_tiny_patch16_224@{tmp_path/'checkpoint.safetensors'}"
    check_twin(load_backbone(source)); check_twin(load_backbone(source, size=96))

def test_twin_of_real_weights(real): check_twin(load_backbone(f"timm/vit_tiny_patch16_224@{real/'vit_tiny_in1k'/'model.safetensors'}"))

def test_what_has_no_twin():
    b = load_backbone('tiny-clip')
    targets = [n for block in attention_projections(b) for n in (block['q'],block['v'])]
    with pytest.raises(ValueError, match='adapters'): randomly_initialized(Backbone(b.spec, get_peft_model(load_backbone('tiny-clip').model, LoraConfig(target_modules=targets)), b.architecture))
    with pytest.raises(ValueError, match='another architecture'): randomly_initialized(Backbone(b.spec, b.model, load_backbone('tiny-siglip').architecture))
    with pytest.raises(ValueError, match='is untrained'): randomly_initialized(randomly_initialized(b, 3), 3)
    one = randomly_initialized(b, 3) # a single block that was left trained is noticed
    survivor = next(k for k in one.model.state_dict() if k.endswith('2.self_attn.q_proj.weight'))
    state = b.model.state_dict(); state[survivor] = one.model.state_dict()[survivor]; b.model.load_state_dict(state)
    with pytest.raises(ValueError, match='1 weights .*q_proj'): randomly_initialized(b, 3)

# ---- in a study

def here(study, home):
    with ThreadPoolExecutor(1) as pool: return run_study(study, home, pool, device='cpu', progress=False)

@pytest.fixture(scope='module')
def done(drawn, tmp_path_factory):
    "A model with its named twin beside it, and fine-tuned runs of two seeds. Not to be changed."
    recipes = dict(linear=dict(epochs=2), lora=dict(epochs=1, lr=1e-2))
    return here(Study('blind', data=str(drawn), models=('tiny-clip','tiny-clip-random'), tiers=('linear','lora'), seeds=(0,1), size=64, val=.3, recipes=recipes), tmp_path_factory.mktemp('runs'))

def t_ends(d): return [*stats.ttest_1samp(d, 0).confidence_interval(.95)]

def recipe_test(grid):
    "Interval and p of shifts (churches, seeds) from an analysis of variance by statsmodels."
    long = grid.rename_axis(columns='k').stack().rename('y').rename_axis(['i','k']).reset_index()
    m = anova_lm(ols('y ~ C(i)+C(k)', long).fit()); ms = (m.sum_sq/m.df).to_numpy()
    total = max(ms@[1,1,-1], *ms[:2]); df = max(total**2/(ms**2/m.df.to_numpy()).sum(), min(grid.shape)-1)
    se = (total/grid.size)**.5; mean = grid.to_numpy().mean()
    return [mean-stats.t.ppf(.975, df)*se, mean+stats.t.ppf(.975, df)*se], 2*stats.t.sf(abs(mean)/se, df)

@pytest.fixture(params=[False,True], ids=['one each','in pairs'])
def pairs(request, monkeypatch):
    "Drawn churches have one annotated image each; in pairs, two names are taken for one church."
    name = (lambda n: str(int(n.split('_')[0][1:])//2)) if request.param else (lambda n: n.split('_')[0])
    monkeypatch.setattr(OpenStudy, 'groups', lambda self, names: [name(n) for n in names])
    return name

def one_by_one(maps, masks, f): return np.array([f(upsample(m, len(k)), k).item() for m,k in zip(maps, masks)])

def read(root, model):
    study,stored = open_study(root).study,load_maps(root/f'{model}-frozen')
    items = [*ChurchDataset(load_churches(study.data), stored.images, eval_transform(64, study.geometry))]
    return stored,torch.stack([i['image'] for i in items]),torch.stack([box_mask(i['boxes'], 64) for i in items])

def test_scores_against_a_loop(done, pairs):
    s = baseline_scores(open_study(done), seeds=(4,))
    assert len(s)==2*12*12 and not s.duplicated(['model','map','image']).any() and s[['model','map']].drop_duplicates()['map'].tolist()[:12]==['model','inner model','uniform','center','prior','inner prior','edges','saliency','boxes','random','other image','untrained']
    stored,images,masks = read(done, 'tiny-clip')
    own,groups = stored.maps[:,-1].mean(1),[pairs(n) for n in stored.images]
    mine = s[s.model=='tiny-clip'].set_index(['map','image'])
    assert mine.church.loc['prior'].tolist()==groups
    iou = lambda m: one_by_one(m, masks, iou_at_percentile)
    value = lambda name: mine.value.loc[name].loc[[*stored.images]].to_numpy()
    close(value('model'), iou(own), 1e-6); close(value('inner model'), iou(torch.nn.functional.pad(own[:,1:7,1:7], (1,)*4)), 1e-6); close(value('edges'), iou(edge_maps(images, 8)), 1e-6); close(value('saliency'), iou(saliency_maps(images, 8)), 1e-6)
    others = [np.mean([m.numpy()/m.sum().item() for m,h in zip(masks, groups) if h!=g], axis=0) for g in groups] # of other churches, each image counting the same
    prior = torch.tensor(np.array(others)).reshape(-1,8,8,8,8).sum((2,4))
    close(prior_maps(masks, 8, groups), prior, 1e-6)
    inner = torch.zeros_like(prior); inner[:,1:7,1:7] = prior[:,1:7,1:7]
    close(value('prior'), iou(prior.float()), 1e-6); close(value('inner prior'), iou(inner.float()), 1e-6)
    close(value('untrained'), iou(fuse_heads(pooled_maps(randomly_initialized(load_backbone('tiny-clip', size=64), 4), images)[:,-1].half().float())), 1e-6)
    close(mine.chance.loc['model'], mine.chance.loc['boxes'])

def test_nobody_gets_the_map_of_its_own_church(done, pairs, monkeypatch):
    stored,seen = load_maps(done/'tiny-clip-frozen'),[]
    own,groups = stored.maps[:,-1].mean(1),[pairs(n) for n in stored.images]
    monkeypatch.setattr(blind_baselines, 'score_like', lambda photographs, maps, metric: seen.append(maps) or score_like(photographs, maps, metric))
    baseline_scores(open_study(done), seeds=tuple(range(5)), untrained=False)
    given = [maps['other image'] for maps in seen if 'other image' in maps][:5] # of the first model
    orders = [[next(j for j,o in enumerate(own) if torch.equal(o, row)) for row in m] for m in given]
    assert len(orders)==5 and len(set(map(tuple, orders)))>1 and all(sorted(p)==[*range(12)] for p in orders)
    assert all(groups[i]!=groups[j] for p in orders for i,j in enumerate(p))

def test_seeds_are_averaged(done):
    both,each = baseline_scores(open_study(done), 'auroc', seeds=(0,1)),[baseline_scores(open_study(done), 'auroc', seeds=(s,)) for s in (0,1)]
    close(both.value, (each[0].value+each[1].value)/2); assert (each[0].value!=each[1].value).groupby(both['map']).any()[['random','other image','untrained']].all()
    fixed = ~both['map'].isin(['random','other image','untrained']); assert (each[0].value==each[1].value)[fixed].all()

def test_a_run_of_the_twin_is_the_twin(done):
    opened = open_study(done)
    found = blind_baselines._untrained(opened.photographs('tiny-clip'), load_backbone('tiny-clip', size=64), zlib.crc32(b'tiny-clip-random'), -1, 'cpu')
    assert torch.equal(found, opened.mean_maps('tiny-clip-random-frozen'))

@pytest.mark.parametrize('q', (50,75,90,95))
def test_the_short_way_finds_the_pixels_of_the_long_one(q):
    "Also where many pixels are equal, where an attention of zero is kept, and where -0 meets 0."
    maps = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(q))
    maps[1] = maps[1].round(decimals=1); maps[2] = 1/64; maps[3] = 0; maps[3,2,2] = 1; maps[4,:4] = -0.
    up,k = upsample(maps, 64),n_kept(64*64, q)
    want = torch.zeros(6, 64*64, dtype=torch.bool).scatter(1, rank_pixels(up).order[:,:k], True)
    assert torch.equal(top_pixels(maps, 64, q).flatten(1), want)

@pytest.mark.parametrize('metric', ['coverage','nss','emd','information_gain'])
def test_models_score_what_their_runs_stored(done, metric):
    s = baseline_scores(open_study(done), metric)
    if metric=='coverage':
        frozen = pd.read_parquet(done/'tiny-clip-frozen'/'metrics.parquet').query("metric=='coverage' and block==3 and head=='mean'").set_index('image').value
        mine = s[(s.model=='tiny-clip')&(s['map']=='model')].set_index('image').value
        close(mine, frozen.loc[mine.index])
    best = s.groupby('map').value.mean(); assert best.idxmin()=='boxes' if metric=='emd' else best.idxmax()=='boxes'

@pytest.mark.parametrize('of', ['model','inner model'])
def test_table_against_pandas_and_scipy(done, pairs, of):
    s = baseline_scores(open_study(done)); t = compare_baselines(s, of=of).set_index(['model','baseline'])
    assert len(t)==2*11 and (t.n==s.church.nunique()).all()
    wide = s.pivot_table(index=['model','church'], columns='map', values='value', aggfunc='mean')
    for (model,b),r in t.iterrows():
        d = wide.loc[model]; gain = d[of]-d[b]
        close([r.score,r.baseline_score,r.difference], [d[of].mean(),d[b].mean(),gain.mean()])
        close([r.low,r.high], t_ends(gain))
        close(r.p, stats.ttest_rel(d[of], d[b]).pvalue)
    family = t.index.get_level_values('baseline').isin(FAMILY)
    close(t.p_holm[family], multipletests(t.p[family], method='holm')[1]); assert t.p_holm[~family].isna().all() and family.sum()==14
    if of=='model': pd.testing.assert_frame_equal(baseline_table(open_study(done), family=('prior',)).drop(columns='p_holm'), compare_baselines(s).drop(columns='p_holm'))
    with pytest.raises(ValueError, match="no scores of 'priro'"): compare_baselines(s, ('priro',))

def test_identical_maps_are_noted():
    s = pd.DataFrame([dict(model='m', map=k, image=f'{c}{i}', church=c, value=v) for c,v in zip('abcd', (.1,.2,.4,.3)) for i in range(2) for k,v in dict(model=v, same=v, apart=v-.05, other=v**2).items()])
    t = compare_baselines(s, ('same','apart','other')).set_index('baseline')
    assert t.note['same']==IDENTICAL_MAPS and t.note['apart'] not in ('',IDENTICAL_MAPS) and t.note['other']=='' and t.p[['same','apart']].isna().all() and t.p_holm['other']==t.p['other']

def test_border_against_pandas_and_scipy(done, pairs):
    s = border_scores(open_study(done), 'auroc'); t = border_table(s).set_index('model')
    assert (t.tier=='lora').all() and (t.seeds==2).all() and len(s)==2*2*12
    shifts = open_study(done).scores('auroc').query("tier=='lora'")
    close(s.merge(shifts, on=['model','seed','image']).eval('tuned-after'), 0, 1e-6)
    for model in t.index:
        stored,_,masks = read(done, model); inner = lambda m: torch.nn.functional.pad(m[:,1:-1,1:-1], (1,)*4)
        frozen = stored.maps[:,-1].mean(1); tuned = [load_maps(done/f'{model}-lora-seed{k}').maps[:,-1].mean(1) for k in (0,1)]
        a = lambda m: one_by_one(m, masks, auroc)
        d = pd.DataFrame(dict(church=[pairs(n) for n in stored.images], frozen=a(frozen), inside=a(inner(frozen)), tuned0=a(tuned[0]), tuned1=a(tuned[1]), tuned_inside0=a(inner(tuned[0])),
                              tuned_inside1=a(inner(tuned[1])), ring=[1-m[1:-1,1:-1].sum().item()/m.sum().item() for m in frozen])).groupby('church').mean()
        d = d.assign(tuned=(d.tuned0+d.tuned1)/2, tuned_inside=(d.tuned_inside0+d.tuned_inside1)/2)
        r = t.loc[model]
        close([r['shift'],r.suppressed,r.beyond,r.inside,r.ring_before], [(d.tuned-d.frozen).mean(),(d.inside-d.frozen).mean(),(d.tuned-d.inside).mean(),(d.tuned_inside-d.inside).mean(),d.ring.mean()], 1e-6)
        for name,kind in (('beyond','tuned'), ('inside','tuned_inside')):
            ends,p = recipe_test(d[[f'{kind}0',f'{kind}1']].sub(d.inside, axis=0))
            close([r[f'{name}_low'],r[f'{name}_high']], ends, 1e-5); close(r[f'{name}_p'], p, 1e-4)
    for name in ('beyond','inside'): close(t[f'{name}_holm'], multipletests(t[f'{name}_p'], method='holm')[1])

def test_a_grid_has_baselines_of_its_own(drawn, tmp_path):
    torch.manual_seed(11); save_file(timm.create_model('vit_tiny_patch16_224').state_dict(), tmp_path/'w.safetensors')
    root = here(Study('grids', data=str(drawn), models=('tiny-clip',f"coarse=timm/vit_tiny_patch16_224@{tmp_path/'w.safetensors'}"), tiers=(), size=64), tmp_path/'runs')
    s = baseline_scores(open_study(root)).groupby(['model','map'], sort=False).value.mean().unstack('map')
    assert s.boxes['coarse']<s.boxes['tiny-clip'] and s.edges['coarse']!=s.edges['tiny-clip']
    _,images,masks = read(root, 'tiny-clip')
    close(s.edges['coarse'], one_by_one(edge_maps(images, 4), masks, iou_at_percentile).mean(), 1e-6)

@pytest.mark.parametrize('call,error,match', [
    (lambda d: baseline_scores(open_study(d), 'iuo@90'), ValueError, 'no metric'), (lambda d: baseline_scores(open_study(d), seeds=()), ValueError, 'at least one'), (lambda d: baseline_scores(open_study(d/'tiny-clip-frozen')), FileNotFoundError, 'no folder of a study'),
    (lambda d: border_scores(open_study(d), ring=4), ValueError, 'leaves some')])
def test_refusals(done, call, error, match):
    with pytest.raises(error, match=match): call(done)
